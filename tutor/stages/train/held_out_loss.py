"""The held-out loss of a model in training, measured without an effect on the training.

In: a model, encoded rows. Out: nats per token. Does not change the model, its mode or the random state.
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
from tutor.prompt.encoding import Encoded

QUANTIZED_LAYERS = (Linear4bit, Linear8bitLt)
"""bitsandbytes' layers, which stay in training mode."""


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Turn dropout and gradients off, then restore every module's mode. Quantized layers stay in training mode.

    On the CPU, bitsandbytes 0.50 repacks a 4-bit layer permanently when it first runs in eval mode, and the packed
    kernel has no gradient: the training after it would continue with wrong gradients. Its 8-bit layers round
    activations on the CPU in eval mode only: training and scoring would use two different models.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        if isinstance(module, QUANTIZED_LAYERS):
            module.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def refuse_inference_layout(model: Any) -> None:
    """Raise ArtifactError when a 4-bit layer is packed for inference: its gradients would be silently wrong."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ArtifactError(f"{name} is packed for inference and cannot pass gradients on")


def mean_loss(model: Any, rows: Sequence[Encoded]) -> float:
    """Return the mean negative log-likelihood (nats) of all supervised tokens, teacher-forced, in fp32.

    The processes of a training share the rows, and all return the same value. Raises ArtifactError for NaN or infinity.
    """
    answers = [pair for row in rows for pair in row.answers()]
    mine = distributed.rank_rows(range(len(answers)), len(answers), distributed.rank(), distributed.world_size())
    with evaluating(model):
        # FSDP needs equal numbers of rows in all processes: a filler is any row, and its result is dropped.
        scores = answer_logprobs(model, [answers[number % len(answers)] for number in mine])
    counted = [row for number, row in zip(mine, scores, strict=True) if number < len(answers)]
    scores = [row for part in distributed.all_gather(counted) for row in part]
    loss = -math.fsum(value for row in scores for value in row) / sum(len(row) for row in scores)
    if not math.isfinite(loss):
        raise ArtifactError(f"the held-out loss is {loss}", "lower train.learning_rate, or fetch the base again")
    return loss


def perplexity(loss: float) -> float:
    """Return exp(loss), at most exp(700), which a float can hold."""
    return math.exp(min(loss, 700.0))
