"""The share of the machine's own matrix rate that a training reaches (model FLOPs utilisation).

In: a model's shape, the lengths and supervised tokens of the rows, the adapters' rank. Out: floating-point operations
by part, and the machine's rate at the model's own shapes. Does not train.

What counts is what the task needs, for every implementation alike:
- a frozen matrix 4 operations per weight and token: 2 forward, 2 for the gradient of its input; none for its own
- an adapter's two matrices 6 per weight and token: its own gradient too
- the output head 4 per weight and supervised token
- attention's two products over the causal half, 2 forward and 4 backward per number; no recomputation
Norms, activations, the softmax, casts, dequantization and the optimizer count as nothing.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tutor.machine.memory.estimate import trainable_parameters
from tutor.machine.memory.shapes import Shape

REPEATS = 7
"""Number of timed products of each shape; the median counts."""


def operations(shape: Shape, rows: Sequence[tuple[int, int]], rank: int, targets: Sequence[str]) -> dict[str, int]:
    """Return the operations of one pass over `rows`, (tokens, supervised tokens) of each, by part."""
    tokens, supervised = (sum(column) for column in zip(*rows, strict=True))
    pairs = sum(length * (length + 1) // 2 for length, _ in rows)
    return {
        "frozen weights": 4 * shape.matrix_parameters * tokens,
        "adapters": 6 * trainable_parameters(shape, rank, targets) * tokens,
        "output head": 4 * shape.vocabulary * shape.hidden * supervised,
        "attention": 12 * shape.layers * shape.heads * shape.head_dim * pairs,
    }


def matrix_rate(shape: Shape, tokens: int, precision: str) -> float:
    """Return the operations per second of one layer's products, forward and for the input's gradient.

    By torch.mm or by oneDNN (engines/hf/products.py), whichever is faster. `tokens` are those of a micro-batch.
    """
    import torch

    from tutor.engines.hf.loading import DTYPES

    dtype = DTYPES[precision]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds, done = 0.0, 0
    for inputs, outputs in shape.matrices.values():
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        x, gradient = (torch.randn(tokens, size, device=device).to(dtype) for size in (inputs, outputs))
        seconds += _median_seconds(x, weight) + _median_seconds(gradient, weight.t())
        done += 4 * tokens * inputs * outputs
    return done / seconds


def _median_seconds(x: Any, weight: Any) -> float:
    import torch

    from tutor.engines.hf.products import product

    ways = [torch.nn.functional.linear] if x.is_cuda else [torch.nn.functional.linear, product]
    medians = []
    for way in ways:
        times = []
        for _ in range(REPEATS + 1):  # the first one warms up
            began = time.perf_counter()
            way(x, weight)
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        medians.append(statistics.median(times[1:]))
    return min(medians)


def utilisation(counted: Mapping[str, int], seconds: float, rate: float) -> float:
    """Return the share of `rate` that these operations reach in `seconds`."""
    return sum(counted.values()) / (seconds * rate)
