"""kernels/lora_linear.py and engines/hf/products.py: outputs and gradients of PEFT's layer, for every weight."""

from pathlib import Path
from typing import Any

import pytest
from support.tolerances import roundoff, sum_error

torch = pytest.importorskip("torch")
from peft import LoraConfig, get_peft_model

from tutor.engines.hf.loading import load_base
from tutor.engines.hf.products import product
from tutor.stages.train.kernels.fast_dropout import replace_dropout
from tutor.stages.train.kernels.lora_linear import LoraLinear

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]

TOKENS = 50


def layer_of(tiny: Path, quantization: str, target: str = "gate_proj", dropout: float = 0.0) -> Any:
    """Return the first gate of the tiny model, with a LoRA on `target` that changes the outputs."""
    lora = LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=[target])
    torch.manual_seed(1)
    model = get_peft_model(load_base(tiny, quantization, "fp32"), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    replace_dropout(model)
    return model.train().get_base_model().model.layers[0].mlp.gate_proj


def compare(found: Any, wanted: Any) -> None:
    bound = sum_error(2 * 128 + TOKENS)  # at most 128 numbers a product, two products one after the other
    torch.testing.assert_close(found, wanted, rtol=0, atol=bound * 10 * wanted.abs().max().item())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("target", ["gate_proj", "q_proj"], ids=["adapted", "frozen"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layer_equals_pefts(quantization: str, target: str, dropout: float, tiny: Path) -> None:
    layer = layer_of(tiny, quantization, target, dropout)
    x, other = torch.randn(TOKENS, 64, requires_grad=True), torch.randn(TOKENS, 64)
    onto, gradient = torch.randn(TOKENS, 128), torch.randn(TOKENS, 128)
    torch.manual_seed(2)
    wanted = layer(x)
    wanted.backward(gradient)
    linear = LoraLinear(layer, torch.float32, unpack=True)
    matrices = linear.matrices()
    assert len(matrices) == (2 if target == "gate_proj" else 0)
    torch.manual_seed(2)
    with torch.no_grad():
        y, kept = linear.forward(x, matrices, onto)
        of_x, found = linear.backward(gradient, x, matrices, kept, onto=other)
        no_x, again = linear.backward(gradient, x, matrices, kept, needs_input=False)
    compare(y, wanted.detach() + onto)
    compare(of_x, x.grad + other)
    for part, matrix in zip(found, matrices, strict=True):
        compare(part, matrix.grad)
    assert no_x is None
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))


def test_unpacked_weights_give_equal_bits(tiny: Path) -> None:
    layer, x, results = layer_of(tiny, "nf4"), torch.randn(TOKENS, 64), []
    for unpack in (False, True):
        linear = LoraLinear(layer, torch.float32, unpack=unpack)
        assert (linear.unpacked is not None) == unpack
        with torch.no_grad():
            y, kept = linear.forward(x, linear.matrices())
            of_x, found = linear.backward(y, x, linear.matrices(), kept)
        results.append([y, of_x, *found])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_evaluation_has_no_dropout(tiny: Path) -> None:
    layer = layer_of(tiny, "none", dropout=0.3).eval()
    linear, x = LoraLinear(layer, torch.float32, unpack=False), torch.randn(TOKENS, 64)
    with torch.no_grad():
        y, kept = linear.forward(x, linear.matrices())
        compare(y, layer(x))
    assert len(kept) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.double])
@pytest.mark.parametrize("onto", [False, True])
def test_product_takes_any_strides(dtype: Any, *, onto: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    x, weight = torch.randn(70, 33, generator=draw).to(dtype), torch.randn(21, 70, generator=draw).to(dtype)
    added = torch.randn(40, 33, generator=draw).to(dtype)[:, 5:26] if onto else None
    for one, two in ((x.t(), weight), (x.t().contiguous(), weight.t().contiguous().t())):
        shape = added[: len(one)] if added is not None else None
        found = product(one, two, shape)
        wanted = one.double() @ two.double().t() + (0 if shape is None else shape.double())
        assert found.dtype == dtype
        bound = sum_error(71, torch.float32, exact=True) + 2 * roundoff(dtype)
        assert (found.double() - wanted).abs().max() < bound * (one.abs().double() @ two.abs().double().t()).max()


def test_product_of_nothing_is_empty() -> None:
    assert product(torch.empty(0, 8), torch.empty(3, 8)).shape == (0, 3)
