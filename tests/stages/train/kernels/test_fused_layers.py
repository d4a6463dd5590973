"""stages/train/kernels/fused_layers.py: loss and gradients are those of transformers' and PEFT's layers."""

import copy
from pathlib import Path
from typing import Any

import pytest
from support.models.training import apart, moved
from support.tolerances import backward_error, forward_error

torch = pytest.importorskip("torch")
from peft import LoraConfig, get_peft_model

from tutor.engines.hf.loading import DTYPES, load_base
from tutor.stages.train.kernels.fast_dropout import replace_dropout
from tutor.stages.train.kernels.fused_layers import fuse_layers
from tutor.stages.train.kernels.packed_attention import LENGTHS, use_packed_attention

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDTHS = (9, 31, 140, 2)


def loaded(tiny: Path, quantization: str = "none", precision: str = "fp32", dropout: float = 0.0, **lora: Any) -> Any:
    """Return a PEFT model in training mode whose adapter changes the outputs."""
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=list(lora.get("targets", ALL)))
    torch.manual_seed(1)
    model = moved(get_peft_model(load_base(tiny, quantization, precision), config))
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    use_packed_attention(model.get_base_model())
    replace_dropout(model)
    return model.train()


def batch() -> dict[str, Any]:
    ids = torch.randint(3, 250, (1, sum(WIDTHS)), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(width) for width in WIDTHS])[None]
    return {"input_ids": ids, "position_ids": positions, LENGTHS: WIDTHS}


def step(model: Any, precision: str = "fp32") -> tuple[Any, dict[str, Any]]:
    """Return the last hidden states of a batch, and the gradients of a weighted sum of them."""
    torch.manual_seed(5)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        hidden = model.get_base_model().base_model(**batch(), use_cache=False).last_hidden_state.float()
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(6))
    (hidden * weights).sum().backward()
    named = model.named_parameters()
    return hidden.detach(), {name: matrix.grad.clone() for name, matrix in named if matrix.grad is not None}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("targets", [ALL, ALL[:4], ("k_proj", "up_proj")], ids=["all", "attention", "two"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_fused_layers_equal_plain_ones(quantization: str, targets: tuple[str, ...], dropout: float, tiny: Path) -> None:
    model = loaded(tiny, quantization, dropout=dropout, targets=targets)
    wanted, wanted_gradients = step(model)
    assert fuse_layers(model, torch.float32, unpack=True) == 2
    found, gradients = step(model)
    config = model.get_base_model().config
    assert (found - wanted).abs().max() < forward_error(config, max(WIDTHS)) * wanted.abs().max()
    assert len(gradients) == 2 * 2 * len(targets)
    assert apart(gradients, wanted_gradients) < backward_error(config, sum(WIDTHS))


def test_fused_bf16_is_nearer_to_fp32_than_plain(tiny: Path) -> None:
    exact, exact_gradients = step(loaded(tiny, precision="fp32"))
    model = loaded(tiny, precision="bf16")
    plain, plain_gradients = step(model, "bf16")
    fuse_layers(model, DTYPES["bf16"], unpack=False)
    found, gradients = step(model, "bf16")
    assert {matrix.dtype for matrix in gradients.values()} == {torch.float32}
    assert (found - exact).norm() < 1.2 * (plain - exact).norm()
    assert apart(gradients, exact_gradients) < 1.5 * apart(plain_gradients, exact_gradients)


def kept(model: Any) -> int:
    """Return the bytes that a forward pass keeps for the backward pass."""
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(saved: Any) -> Any:
        if saved.untyped_storage().data_ptr() not in own:
            sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        hidden = model.get_base_model().base_model(**batch(), use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(sizes.values())


def test_fused_layers_keep_less(tiny: Path) -> None:
    model = loaded(tiny)
    before = kept(model)
    fuse_layers(model, torch.float32, unpack=False)
    assert kept(model) < 0.65 * before


def test_checkpointing_recomputes_fused_layers(tiny: Path) -> None:
    model = loaded(tiny, dropout=0.2)
    fuse_layers(model, torch.float32, unpack=False)
    before = kept(model)
    wanted, wanted_gradients = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found, gradients = step(model)
    assert kept(model) < 0.3 * before
    assert torch.equal(found, wanted)
    assert all(torch.equal(gradients[name], wanted_gradients[name]) for name in wanted_gradients)


def test_padded_batches_and_generation_stay_plain(tiny: Path) -> None:
    model = loaded(tiny).eval()
    fused = copy.deepcopy(model)
    assert fuse_layers(fused, torch.float32, unpack=False) == 2
    ids = torch.tensor([[0, 0, 0, 5, 6, 7], [8, 9, 10, 11, 12, 13]])
    attention = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    for given in ({"input_ids": ids, "attention_mask": attention}, {"input_ids": ids[1:], "use_cache": True}):
        with torch.no_grad():
            assert torch.equal(*(one(**given).logits for one in (model, fused)))


def test_equal_rows_without_padding_are_fused(tiny: Path) -> None:
    model = loaded(tiny).eval()
    ids = torch.tensor([[5, 6, 7, 8], [8, 9, 10, 11]])
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
        fuse_layers(model, torch.float32, unpack=False)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, wanted, rtol=1e-5, atol=1e-5)


def test_int8_layers_stay_plain(tiny: Path) -> None:
    assert fuse_layers(loaded(tiny, "int8"), torch.float32, unpack=False) == 0
