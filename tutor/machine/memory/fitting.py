"""Settings with which a training fits where the recipe's do not. In: a shape, a training, bytes. Out: the mildest."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tutor.machine.memory.estimate import Shape, Training, memory

Change = tuple[str | int, dict[str, Any]]
"""A setting's value, and what it makes of the training."""
LENGTHS = (512, 384, 256, 128)
MIB = 1 << 20


def fitting(
    shape: Shape, training: Training, budget: int, known: Collection[str], size: Callable[[Mapping[str, int]], int]
) -> dict[str, str | int] | None:
    """The fewest, mildest settings with which a training fits into `budget` bytes; None where none do.

    By their names in the recipe's `train` section, of which `known` are those that may be proposed; empty when it fits.
    `size` says how much of an estimate has to fit: all of it, or what is certain.
    """
    chosen: dict[str, Change] = {}

    def fits(given: Mapping[str, Change]) -> bool:
        changed = replace(training, **{name: value for _, change in given.values() for name, value in change.items()})
        if changed.resident is not None and (changed.quantization == "int8" or not changed.checkpointing):
            return False  # the recipe refuses both
        return size(memory(shape, changed)) <= budget

    for name, value, change in _milder(shape, training, budget):
        if fits(chosen):
            break
        if name in known:
            chosen[name] = (value, change)
    if not fits(chosen):
        return None
    for name in list(chosen):
        rest = {other: change for other, change in chosen.items() if other != name}
        chosen = rest if fits(rest) else chosen
    return {name: value for name, (value, _) in chosen.items()}


def _milder(shape: Shape, training: Training, budget: int) -> Iterator[tuple[str, str | int, dict[str, Any]]]:
    """Settings that take less and less: name, value, and what they change. Those that only cost time come first."""
    if not training.checkpointing:
        yield "gradient_checkpointing", True, {"checkpointing": True}
    tokens = training.tokens
    while tokens > training.longest:
        tokens = max(training.longest, tokens // 2)
        if training.packed:
            yield "pass_tokens", tokens, {"tokens": tokens}
        else:
            rows = max(1, tokens // training.longest)
            yield "batch_size", rows, {"tokens": rows * training.longest}
    if training.quantization != "nf4":
        yield "quantization", "nf4", {"quantization": "nf4"}
    # Layers in main memory are slow, but shorter rows are other rows.
    for resident in range(shape.layers - 1, -1, -1) if training.gpu else ():
        yield "max_memory.gpu", f"{budget // MIB}MiB", {"resident": resident}
    for length in LENGTHS:
        if length < training.longest:
            yield "max_length", length, {"tokens": length, "longest": length}
