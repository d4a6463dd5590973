"""TRL's trainer with PyTorch's chunked head on the CPU; on a GPU it is TRL's own trainer, and its own head.

TRL's head folds tiles of 4,096 tokens x 32,768 logits, in one kernel on a GPU, but by plain tensors on the CPU, and
there also for tokens without loss. Measured on one core, 1,790 tokens of 576 numbers and a vocabulary of 49,152, bf16:
5.9 s and 2.1 GB, against 1.3 s and 0.2 GB here.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy
from trl import SFTTrainer

IGNORED = -100
"""The label of an id without loss, by PyTorch's cross entropy."""

CHUNK = LinearCrossEntropyOptions(batch_chunk_size=128)
"""Tokens a tile of logits; between 64 and 256 the time is the same, and the memory grows."""


class Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer; without TRL's own measures (entropy, accuracy) on the CPU."""

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - TRL's signature
        num_items_in_batch: Any = None,
    ) -> Any:
        """The summed loss of a pass, divided by the tokens with loss of all passes of the step, or by its own."""
        if return_outputs or inputs["input_ids"].device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs, labels = {name: value for name, value in inputs.items() if name != "labels"}, inputs["labels"]
        base = self.accelerator.unwrap_model(model).get_base_model()
        with self.accelerator.autocast():
            hidden = base.base_model(**inputs, use_cache=False).last_hidden_state
        count = (labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return summed_loss(hidden, labels, base.get_output_embeddings().weight) / count


def summed_loss(hidden: torch.Tensor, labels: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood (nats) of the next labels under a Llama's head, in fp32; [rows, tokens, size] in."""
    labels = labels[:, 1:]
    kept = labels != IGNORED
    states = hidden[:, :-1][kept]
    products = exact_products() if states.dtype == head.dtype == torch.bfloat16 else contextlib.nullcontext()
    with products:
        return linear_cross_entropy(states.float(), head.float(), labels[kept], reduction="sum", options=CHUNK)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Matrices in fp32 that hold bf16 numbers, multiplied as such and summed in fp32: AMX is made for that.

    The logits are the same but for the order of the sum; gradients of the states, made at once, round to bf16 inside.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
