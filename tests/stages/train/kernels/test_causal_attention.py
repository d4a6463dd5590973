"""stages/train/kernels/causal_attention.py: the attention of PyTorch over every row, and its gradients."""

from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from tutor.stages.train.kernels.causal_attention import Heads, attend, attend_backward

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (5, 165, 1, 128, 257)
GROUPED, EQUAL = Heads(6, 2, 8, 8**-0.5), Heads(3, 3, 4, 0.7)


def packed(heads: Heads, lengths: Sequence[int] = LENGTHS, dtype: Any = torch.double, seed: int = 0) -> list[Any]:
    """Return queries, keys and values of rows."""
    draw = torch.Generator().manual_seed(seed)
    widths = (heads.queries * heads.size, heads.keys * heads.size, heads.keys * heads.size)
    shapes = [(sum(lengths), width) for width in widths]
    return [torch.randn(shape, generator=draw, dtype=torch.double).to(dtype) for shape in shapes]


def by_pytorch(parts: Sequence[Any], heads: Heads) -> Any:
    """Return scaled_dot_product_attention of each row, every key copied for its group of queries."""
    out = []
    for row in zip(*(torch.split(part, LENGTHS) for part in parts), strict=True):
        states = [part.view(len(part), -1, heads.size).transpose(0, 1) for part in row]
        query, key, value = (part.repeat_interleave(heads.queries // len(part), dim=0)[None] for part in states)
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=heads.scale)
        out.append(found[0].transpose(0, 1).reshape(len(row[0]), -1))
    return torch.cat(out)


@pytest.mark.parametrize("heads", [GROUPED, EQUAL], ids=["grouped", "equal"])
def test_attention_and_gradients_equal_pytorchs(heads: Heads) -> None:
    parts = [part.requires_grad_() for part in packed(heads)]
    wanted = by_pytorch(parts, heads)
    gradient = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    wanted_gradients = torch.autograd.grad(wanted, parts, gradient)
    with torch.no_grad():
        attended, sums = attend(parts, LENGTHS, heads)
        found = attend_backward(gradient, parts, (attended, sums), LENGTHS, heads)
    torch.testing.assert_close(attended, wanted)
    for one, other in zip(found, wanted_gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_bf16_attention_is_rounded_once() -> None:
    parts = packed(GROUPED, dtype=torch.bfloat16)
    found, _ = attend(parts, LENGTHS, GROUPED)
    exact, _ = attend([part.float() for part in parts], LENGTHS, GROUPED)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=2**-7, atol=2**-7)


def test_row_does_not_attend_to_its_neighbours() -> None:
    parts, others = packed(GROUPED, dtype=torch.float32), packed(GROUPED, dtype=torch.float32, seed=2)
    own = slice(LENGTHS[0], LENGTHS[0] + LENGTHS[1])
    for part, other in zip(parts, others, strict=True):
        other[own] = part[own]
    assert torch.equal(attend(parts, LENGTHS, GROUPED)[0][own], attend(others, LENGTHS, GROUPED)[0][own])


def test_token_does_not_attend_to_later_ones() -> None:
    parts, place = packed(GROUPED, (256,)), 133
    changed = [part.clone() for part in parts]
    for part in changed:
        part[place:] += 1
    before, after = (attend(states, (256,), GROUPED)[0] for states in (parts, changed))
    assert torch.equal(before[:place], after[:place])
    assert not torch.equal(before[place], after[place])
