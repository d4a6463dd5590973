"""The rate of matrix products on this CPU in bf16 and fp32: measured where PyTorch is installed, else a guess.

In: a model's shape, the processor. Out: `MatmulRates`. What processors with equal feature flags reach differs: of two
with AVX-512 bf16 and no AMX, one multiplied 4.2 times as fast in bf16 as in fp32, the other half as fast. Takes a fifth
of a second. Does not decide a precision: device.py does. Only the measurement imports torch.
"""

import functools
import importlib.util
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from tutor.machine.host import Processor
from tutor.machine.memory.shapes import Shape

Name = TypeVar("Name")

TOKENS = 128
"""Rows of the measured products; up to 4096 the rates change little, and a short call is seldom interrupted."""

SIDES = (512, 1536)
"""Minimum and maximum rows and columns of the measured matrix: below, the call itself takes part of the time; above,
the rate no longer changes."""

SECONDS = 0.05
"""Minimum seconds of each of the four measured products."""

GUESSES = {
    "amx_bf16": (175e9, 100e9),
    "avx512f": (50e9, 100e9),
    "avx2": (5e9, 50e9),
    "asimd": (10e9, 20e9),
}
"""Assumed operations per second and core in bf16 and fp32, by processor flag; the first flag found counts."""

SLOWEST = (1e9, 5e9)
"""Assumed operations per second and core of any other processor, in bf16 and fp32."""


@dataclass(frozen=True)
class MatmulRates:
    """Floating-point operations per second of matrix products on all cores of this process."""

    bf16: float
    fp32: float
    measured: bool = True  # else assumed from the processor's flags

    def __str__(self) -> str:
        return f"{self.fp32 / 1e9:.0f} GFLOP/s in fp32, {self.bf16 / 1e9:.0f} in bf16"

    @property
    def gflops(self) -> dict[str, float]:
        """The rates by precision in GFLOP/s, for records."""
        return {"bf16": round(self.bf16 / 1e9, 1), "fp32": round(self.fp32 / 1e9, 1)}


def find_rates(shape: Shape, processor: Processor) -> MatmulRates:
    """The measured rates; without PyTorch the assumed ones."""
    return measure_rates(shape) if importlib.util.find_spec("torch") else guess_rates(processor)


def guess_rates(processor: Processor) -> MatmulRates:
    """The rates that the processor's flags suggest."""
    bf16, fp32 = next((rates for flag, rates in GUESSES.items() if flag in processor.features), SLOWEST)
    return MatmulRates(bf16 * processor.cores, fp32 * processor.cores, measured=False)


@functools.lru_cache
def measure_rates(shape: Shape) -> MatmulRates:
    """Measure with one matrix of the model's MLP what a training computes with each: outputs, and gradients of inputs.

    One core computes, and its rate counts for each core: products on all cores wait for the slowest one, and beside
    another program they reached a twentieth of their rate. PyTorch's random state stays unchanged. A shape is measured
    once a process: a run's forecast and its plan then agree.
    """
    import torch

    from tutor.engines.hf.products import product

    threads = torch.get_num_threads()
    least, most = SIDES
    inputs, outputs = (min(max(side, least), most) for side in (shape.hidden, shape.intermediate))
    random = torch.Generator().manual_seed(0)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        sizes = ((outputs, inputs), (TOKENS, inputs), (TOKENS, outputs))
        weight, states, gradients = (torch.randn(size, generator=random).to(dtype) for size in sizes)
        calls[name, "outputs"] = partial(product, states, weight)
        calls[name, "gradients"] = partial(product, gradients, weight.t())
    torch.set_num_threads(1)
    try:
        best = fastest_seconds(calls)
    finally:
        torch.set_num_threads(threads)
    operations = threads * 2 * 2 * TOKENS * inputs * outputs
    bf16, fp32 = (operations / (best[name, "outputs"] + best[name, "gradients"]) for name in ("bf16", "fp32"))
    return MatmulRates(bf16, fp32)


def fastest_seconds(
    calls: Mapping[Name, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> dict[Name, float]:
    """Seconds of the fastest run of each call; the first one, which compiles kernels, does not count.

    The calls alternate, so that load on the machine slows all of them, until each took SECONDS in all.
    """
    for call in calls.values():
        call()
    best, spent = dict.fromkeys(calls, math.inf), dict.fromkeys(calls, 0.0)
    while waiting := [name for name in calls if best[name] == math.inf or spent[name] < SECONDS]:
        for name in waiting:
            began = clock()
            calls[name]()
            took = clock() - began
            best[name], spent[name] = min(best[name], took), spent[name] + took
    return best
