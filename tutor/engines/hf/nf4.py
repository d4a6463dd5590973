"""What a 4-bit model holds of a weight: NF4 in blocks of 64, its scales in 8 bits, and back, piece by piece.

As bitsandbytes' quantize_4bit and dequantize_4bit do it with a whole tensor; only the codes are held of all of it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes import functional

KIND = "nf4"
SCALES = 256
"""Scales in a block of the double quantization, as quantize_4bit has it."""


def round_trip(pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The pieces of one weight as a 4-bit layer gives them back, in their own dtype and on their own device.

    Every piece but the last must hold a multiple of 64 numbers, so that no block is cut.
    """
    held: list[tuple[torch.Tensor, Any, torch.Size]] = []
    for piece in pieces:
        codes, state = functional.quantize_4bit(piece.reshape(-1), quant_type=KIND)
        held.append((codes, state, piece.shape))
    scales = torch.cat([state.absmax for _, state, _ in held])
    mean = scales.mean()
    coded, nested = functional.quantize_blockwise(scales - mean, blocksize=SCALES)
    scales = functional.dequantize_blockwise(coded, nested) + mean
    first = 0
    while held:
        codes, state, shape = held.pop(0)
        last = first + len(state.absmax)
        state.absmax = scales[first:last]
        first = last
        yield functional.dequantize_4bit(codes, state).reshape(shape)
