"""Packed rows and fused layers of each family: hidden states and gradients are those of transformers, row by row."""

from collections.abc import Sequence
from typing import Any

import pytest
from support.models.families import FAMILIES, family_folder
from support.models.training import apart, moved
from support.tolerances import backward_error, forward_error

torch = pytest.importorskip("torch")
from peft import LoraConfig, get_peft_model

from tutor.engines.hf.loading import load_base
from tutor.formats.architectures import ARCHITECTURES
from tutor.recipe.values import LINEAR_LAYERS
from tutor.stages.train.kernels.fused_layers import fuse_layers
from tutor.stages.train.kernels.packed_attention import LENGTHS, use_packed_attention, window_mask

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]

WIDTHS = (9, 3, 140, 1)
"""Tokens of each row: longer and shorter than the windows of the tiny models, which are 8 and 128."""


def rows() -> list[Any]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 250, (1, width), generator=draw) for width in WIDTHS]


def step(model: Any, batches: Sequence[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Return the last hidden states of all batches in one, and the gradients of a weighted sum of them."""
    model.zero_grad()
    decoder = model.get_base_model().base_model
    hidden = torch.cat([decoder(**batch, use_cache=False).last_hidden_state for batch in batches], dim=1)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(6))
    (hidden * weights).sum().backward()
    named = model.named_parameters()
    return hidden.detach(), {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_packed_and_fused_rows_equal_single_rows(
    name: str, quantization: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(LINEAR_LAYERS))
    torch.manual_seed(1)
    base = load_base(family_folder(tmp_path_factory, name), quantization, "fp32")
    model = moved(get_peft_model(base, config)).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    wanted, wanted_gradients = step(model, [{"input_ids": row} for row in rows()])
    assert len(wanted_gradients) == 2 * 7 * base.config.num_hidden_layers  # all-linear: A and B of each matrix
    bounds = forward_error(base.config, max(WIDTHS)) * wanted.abs().max(), backward_error(base.config, sum(WIDTHS))

    use_packed_attention(base)
    positions = torch.cat([torch.arange(width) for width in WIDTHS])[None]
    packed = {"input_ids": torch.cat(rows(), dim=1), "position_ids": positions, LENGTHS: WIDTHS}
    for fuse in (False, True):
        if fuse:
            plain = ARCHITECTURES[FAMILIES[name].model_type].plain_layers
            layers = base.config.num_hidden_layers if plain else 0
            assert fuse_layers(model, torch.float32, unpack=True) == layers
        found, gradients = step(model, [packed])
        assert (found - wanted).abs().max() < bounds[0]
        assert apart(gradients, wanted_gradients) < bounds[1]


def test_window_mask_shows_the_window_before_each_token() -> None:
    mask = window_mask(4, 2, torch.device("cpu"))
    assert mask is not None
    assert mask.int()[0, 0].tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert window_mask(4, 4, torch.device("cpu")) is None
    assert window_mask(4, 0, torch.device("cpu")) is None
