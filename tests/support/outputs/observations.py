"""Observations of a fake engine, as the parity stage compares them."""

from dataclasses import replace
from typing import Any

from support.outputs.parity import trace
from tutor.engines.trace import Score
from tutor.stages.parity.compare import Observation, Tolerance

TIGHT = Tolerance(kl=1e-3, mean=0.01, worst=0.1, margin=0.2)
SUBJECTS = ("prompt", "tokens", "log-probabilities", "greedy answer", "end")
"""Names of the comparisons of two engines, in their order."""


def scored(*logprobs: float, best: bool = True) -> Score:
    """A given answer of these log-probabilities; `best`: its last id, EOS, is the most probable one."""
    places = [((index, value), (99, value - 2.0)) for index, value in enumerate(logprobs)]
    if not best:
        places[-1] = ((99, logprobs[-1] + 2.0), (len(logprobs) - 1, logprobs[-1]))
    return Score(logprobs, tuple(places))


def observation(**changes: Any) -> Observation:
    return replace(
        Observation("code", "Instrucción: x\nRespuesta:", (1, 5, 6), 3, scored(-0.5, -0.3), trace()), **changes
    )
