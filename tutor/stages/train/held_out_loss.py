"""The held-out loss of a model in training, measured so that training goes on as if it had not been.

In: a model, encoded rows. Out: nats a token. Changes neither the model nor its mode nor the random state.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from tutor.engines.hf.score import answer_logprobs
from tutor.errors import ArtifactError
from tutor.machine import distributed
from tutor.prompt import Encoded

QUANTIZED = (Linear4bit, Linear8bitLt)


@contextlib.contextmanager
def scoring(model: Any) -> Iterator[None]:
    """No dropout and no gradients inside, and the model afterwards exactly as it was.

    bitsandbytes 0.50 repacks a 4-bit layer for the CPU the first time it runs in eval mode, for good, and the packed
    kernel has no gradient: training after it goes on with wrong ones. Its 8-bit layers round activations on the CPU in
    eval mode alone, so that training and scoring would see two models. So neither ever sees eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        if isinstance(module, QUANTIZED):
            module.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def refuse_packed(model: Any) -> None:
    """Raise ArtifactError when a 4-bit layer is packed for inference: its gradients would be wrong without a word."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ArtifactError(f"{name} is packed for inference and cannot pass gradients on")


def mean_loss(model: Any, rows: Sequence[Encoded]) -> float:
    """Mean negative log-likelihood (nats) over all supervised tokens of all rows, teacher-forced, in fp32.

    Several processes share the rows, and all get the same. Raises ArtifactError when it is no number.
    """
    mine = distributed.rank_rows(range(len(rows)), len(rows), distributed.rank(), distributed.world_size())
    # Under FSDP all processes have to score as many rows: a blank is any row, and counts for nothing.
    asked = [rows[number % len(rows)] for number in mine]
    with scoring(model):
        scores = answer_logprobs(model, [(row.ids[: row.n_prompt], row.ids[row.n_prompt :]) for row in asked])
    counted = [row for number, row in zip(mine, scores, strict=True) if number < len(rows)]
    scores = [row for part in distributed.all_gather(counted) for row in part]
    loss = -math.fsum(value for row in scores for value in row) / sum(len(row) for row in scores)
    if not math.isfinite(loss):
        raise ArtifactError(f"the held-out loss is {loss}", "lower train.learning_rate, or fetch the base again")
    return loss


def perplexity(loss: float) -> float:
    """exp(loss); the largest number there is where that is beyond it."""
    return math.exp(min(loss, 700.0))
