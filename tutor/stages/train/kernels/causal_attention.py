"""Causal attention with grouped queries on the CPU, row by row, by the kernel behind PyTorch's own.

In: queries, keys and values of packed rows, [tokens, heads x size], and the rows' lengths. Out: the attention, or its
gradients. Keys and values are copied for their group of queries, one row at a time, and nothing of that is kept. The
caller differentiates: no function here is seen by autograd. Does not compute padded rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """Numbers of heads of an attention, and what scales its scores."""

    queries: int
    keys: int
    size: int
    scale: float

    @property
    def group(self) -> int:
        """Number of heads of queries that share a head of keys."""
        return self.queries // self.keys


States = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values."""


def attend(states: States, lengths: Sequence[int], heads: Heads) -> tuple[Tensor, list[Tensor]]:
    """Return the attention of packed rows, [tokens, queries x size], and the logarithms of each row's sums."""
    out, sums = torch.empty_like(states[0]), []
    for row in _rows(lengths):
        found, logarithms = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_by_head(states, row, heads), dropout_p=0.0, is_causal=True, scale=heads.scale
        )
        out[row].view(-1, heads.queries, heads.size).copy_(found[0].transpose(0, 1))
        sums.append(logarithms)
    return out, sums


def attend_backward(
    gradient: Tensor, states: States, found: tuple[Tensor, Sequence[Tensor]], lengths: Sequence[int], heads: Heads
) -> States:
    """Return the gradients of queries, keys and values; `gradient` is that of the attention, `found` what it was."""
    of_query, of_key, of_value = (torch.empty_like(part) for part in states)
    attended, sums = found
    for row, logarithms in zip(_rows(lengths), sums, strict=True):
        given, out = (_columns(part[row], heads.queries) for part in (gradient, attended))
        by_head, causal = _by_head(states, row, heads), {"dropout_p": 0.0, "is_causal": True, "scale": heads.scale}
        grown, *shared = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            given, *by_head, out, logarithms, **causal
        )
        of_query[row].view(-1, heads.queries, heads.size).copy_(grown[0].transpose(0, 1))
        for target, part in zip((of_key, of_value), shared, strict=True):
            summed = part[0].view(heads.keys, heads.group, -1, heads.size).sum(dim=1)
            target[row].view(-1, heads.keys, heads.size).copy_(summed.transpose(0, 1))
    return of_query, of_key, of_value


def _rows(lengths: Sequence[int]) -> Iterator[slice]:
    """Yield the tokens of each row."""
    first = 0
    for count in lengths:
        yield slice(first, first := first + count)


def _by_head(states: States, row: slice, heads: Heads) -> States:
    """Return one row's states as [1, queries, tokens, size]: keys and values once for each of their queries."""
    query, key, value = (
        _columns(part[row], count) for part, count in zip(states, (heads.queries, heads.keys, heads.keys), strict=True)
    )
    return query, key.repeat_interleave(heads.group, dim=1), value.repeat_interleave(heads.group, dim=1)


def _columns(states: Tensor, count: int) -> Tensor:
    """Return a view of [tokens, heads x size] as [1, heads, tokens, size]."""
    return states.view(1, len(states), count, -1).transpose(1, 2)
