"""Dropout on a CPU without PyTorch's generator, which draws one number after the other on one core.

In: a model with adapters. Out: the same model, whose dropout draws 16 random bits a number, several times faster, and
keeps a byte a number for the backward pass where PyTorch keeps four. The seeds come from PyTorch's generator: what a
checkpoint saves of it repeats these draws too.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LEVELS = 1 << 16


class Dropout(nn.Module):
    """nn.Dropout: while training, zero each number with the chance `p` and scale the others by 1 / (1 - p).

    The chance is a multiple of 2^-16, the nearest to `p`, and the scale is that of this chance.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropped = round(p * LEVELS)

    def forward(self, x: Tensor) -> Tensor:
        """`x` with some of its numbers zeroed; any shape."""
        if not self.training:
            return x
        return (x * _kept(x.shape, self.dropped)).mul_(LEVELS / (LEVELS - self.dropped))

    def extra_repr(self) -> str:
        """How it prints."""
        return f"p={self.dropped / LEVELS:.5f}"


def quicken_dropout(model: nn.Module) -> int:
    """Replace every nn.Dropout of a model that trains on a CPU; how many were."""
    found: list[tuple[Any, str, float]] = [
        (parent, name, child.p)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout and 0 < child.p < 1
    ]
    for parent, name, p in found:
        setattr(parent, name, Dropout(p).train(parent.training))
    return len(found)


def _kept(shape: torch.Size, dropped: int) -> Tensor:
    """Which of the numbers of a tensor stay: `dropped` of 65,536 do not, on average."""
    count = shape.numel()
    bits = np.random.SFC64(int(torch.randint(2**63 - 1, ()))).random_raw(-(-count // 4)).view(np.uint16)[:count]
    return torch.from_numpy(bits >= dropped).view(shape)
