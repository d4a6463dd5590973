"""Packed micro-batches: several rows in one sequence, without padding and without attention across rows.

In: rows of ids and labels, in micro-batches planned by machine/memory/batching.py. Out: TRL's padding-free batches with
the rows' lengths, and an attention for transformers that uses the lengths. Loss, gradients and the order of the rows
are those of one row per micro-batch. Does not choose which rows are packed together.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tutor.errors import DataError

ATTENTION = "packed"
"""Name of the attention in transformers."""

LENGTHS = "row_lengths"
"""Name of the forward argument with the rows' lengths: Python numbers, which no layer has to copy back from a GPU."""


def add_lengths(collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """Wrap TRL's padding-free collator: it returns LENGTHS instead of the boundaries for other attentions."""

    def collate_with_lengths(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        kept = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
        return {**kept, LENGTHS: tuple(batch["cu_seq_lens_q"].diff().tolist())}

    return collate_with_lengths


def split_rows(batch: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of every row of a batch, packed or padded, as the model receives them.

    Raises DataError when the positions in a packed batch do not restart with every row.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    if LENGTHS in batch:
        lengths = list(batch[LENGTHS])
        if batch["position_ids"].tolist() != [[position for length in lengths for position in range(length)]]:
            raise DataError(
                f"positions do not start again with every row of {lengths} tokens", "a library's doing: report it"
            )
        parts = zip(torch.split(ids[0], lengths), torch.split(labels[0], lengths), strict=True)
    else:
        widths = batch["attention_mask"].sum(dim=1).tolist()
        parts = zip(*([row[:n] for row, n in zip(rows, widths, strict=True)] for rows in (ids, labels)), strict=True)
    return [(row.tolist(), row_labels.tolist()) for row, row_labels in parts]


def use_packed_attention(model: Any) -> None:
    """Set the packed attention on a transformers model; a batch without LENGTHS is computed as by "sdpa"."""
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, packed_mask)
    model.set_attn_implementation(ATTENTION)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute transformers' "sdpa" row by row: [1, heads, tokens, size] in, [1, tokens, heads, size] out."""
    lengths = kwargs.pop(LENGTHS, None)
    packed = attention_mask is not None and attention_mask.numel() == 0
    if lengths is None or len(lengths) == 1:
        if packed:
            raise ValueError(f"positions start again within a batch that comes without {LENGTHS}")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    if not packed:
        raise ValueError("packed rows attend to all of themselves: no padding, and no mask but that of packed_mask")
    assert attention_mask is not None
    window = attention_mask.shape[-1]
    rows = zip(*(torch.split(states, list(lengths), dim=2) for states in (query, key, value)), strict=True)
    masks = (window_mask(length, window, query.device) for length in lengths)
    found = [sdpa_attention_forward(module, *row, mask, **kwargs)[0] for row, mask in zip(rows, masks, strict=True)]
    return torch.cat(found, dim=1), None


def needs_mask(mask: torch.Tensor, lengths: Sequence[int]) -> bool:
    """Return whether a mask is more than causal: it has entries, or a row of packed rows exceeds its window."""
    return mask.numel() > 0 or 0 < mask.shape[-1] < max(lengths)


def window_mask(length: int, window: int, device: torch.device) -> torch.Tensor | None:
    """Return which tokens each token of a row attends to: itself and the `window` - 1 before it (0: all before it).

    None for a row that is no longer than the window: sdpa's own causal mask is faster.
    """
    if window == 0 or length <= window:
        return None
    return torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril_().triu_(1 - window)


def packed_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return transformers' mask for "sdpa", but an empty mask for packed rows instead of tokens x tokens.

    A batch without padding whose mask must not be skipped has positions that restart, so it is packed. The empty mask
    marks it for `packed_attention`, where packed rows without LENGTHS are an error. Its last size is the layers'
    sliding window, 0 for layers without one.
    """
    if attention_mask is None and not allow_is_causal_skip and q_length == kv_length > 1:
        window = kwargs.get("local_size") or 0
        return torch.empty((1, 1, 0, window), dtype=torch.bool, device=kwargs.get("device", "cpu"))
    return sdpa_mask(  # type: ignore[no-any-return]
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
