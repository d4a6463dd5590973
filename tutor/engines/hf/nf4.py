"""Quantize one weight to NF4 and dequantize it again, piece by piece.

In: the pieces of a weight. Out: the pieces with the values that a 4-bit layer computes with, bit for bit those of
bitsandbytes' quantize_4bit and dequantize_4bit on the whole tensor: NF4 codes in blocks of 64, scales in 8 bits.
Does not hold the whole weight, only its 4-bit codes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes import functional

QUANT_TYPE = "nf4"
SCALES_PER_BLOCK = 256
"""Number of scales in a block of the double quantization, the value of quantize_4bit."""


def round_trip(pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the pieces of one weight after quantization and dequantization, in their dtype and on their device.

    Every piece but the last must hold a multiple of 64 numbers, so that no block is cut.
    """
    held: list[tuple[torch.Tensor, Any, torch.Size]] = []
    for piece in pieces:
        codes, state = functional.quantize_4bit(piece.reshape(-1), quant_type=QUANT_TYPE)
        held.append((codes, state, piece.shape))
    scales = torch.cat([state.absmax for _, state, _ in held])
    mean = scales.mean()
    coded, nested = functional.quantize_blockwise(scales - mean, blocksize=SCALES_PER_BLOCK)
    scales = functional.dequantize_blockwise(coded, nested) + mean
    first = 0
    while held:
        codes, state, shape = held.pop(0)
        last = first + len(state.absmax)
        state.absmax = scales[first:last]
        first = last
        yield functional.dequantize_4bit(codes, state).reshape(shape)


def whole_round_trip(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return one weight after bitsandbytes' own quantization and dequantization of the whole, computed in `dtype`."""
    codes, state = functional.quantize_4bit(weight.to(dtype), quant_type=QUANT_TYPE, compress_statistics=True)
    found: torch.Tensor = functional.dequantize_4bit(codes, state)
    return found
