"""Cross entropy over a large vocabulary on the CPU, computed in tiles of a few tokens.

In: hidden states, labels, the head's weight. Out: the summed loss in nats. Does not run on a GPU.
TRL's own chunked loss is one kernel on a GPU. On the CPU it folds tiles of 4,096 tokens x 32,768 logits by plain
tensor operations, and there also for tokens without loss. Measured on one core, 1,790 tokens of 576 numbers and a
vocabulary of 49,152, bf16: 5.9 s and 2.1 GB, against 1.3 s and 0.2 GB here.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy

from tutor.engines.hf.products import product

IGNORE_INDEX = -100
"""Label of ids without loss, the default of PyTorch's cross entropy."""

CHUNK_TOKENS = 128
"""Number of tokens in a tile of logits; from 64 to 256 the time does not change and the memory grows."""


def summed_loss(hidden: torch.Tensor, labels: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return the summed negative log-likelihood (nats, fp32) of the next labels; `hidden` is [rows, tokens, size]."""
    labels = labels[:, 1:]
    kept = labels != IGNORE_INDEX
    states = hidden[:, :-1][kept]
    if states.dtype == head.dtype == torch.float32:
        return TiledLoss.apply(states, head.detach(), labels[kept])  # type: ignore[no-any-return]
    products = bf16_products() if states.dtype == head.dtype == torch.bfloat16 else contextlib.nullcontext()
    options = LinearCrossEntropyOptions(batch_chunk_size=CHUNK_TOKENS)
    with products:
        return linear_cross_entropy(states.float(), head.float(), labels[kept], reduction="sum", options=options)


class TiledLoss(torch.autograd.Function):
    """PyTorch's linear_cross_entropy in fp32, whose products it takes from MKL; the head has no gradient."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        """Return the summed loss; the gradient is computed beside it, while the logits are there."""
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        losses = []
        for first in range(0, len(labels), CHUNK_TOKENS):
            tile = slice(first, first + CHUNK_TOKENS)
            logits, own = product(states[tile], head), labels[tile, None]
            picked, largest = logits.gather(1, own), logits.amax(dim=1, keepdim=True)
            shares = logits.sub_(largest).exp_()
            total = shares.sum(dim=1, keepdim=True)
            losses.append((total.log() + largest - picked).sum())
            if gradient is not None:
                torch.sub(product(shares, head.t()).div_(total), head[own[:, 0]], out=gradient[tile])
        ctx.gradient = gradient
        return torch.stack(losses).sum() if losses else states.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradient of the states."""
        return ctx.gradient * gradients[0], None, None


@contextlib.contextmanager
def bf16_products() -> Iterator[None]:
    """Multiply fp32 matrices that hold bf16 values in bf16 and sum in fp32, which AMX does in hardware.

    The logits differ only by the order of the sum; the gradients of the states are rounded to bf16 inside.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
