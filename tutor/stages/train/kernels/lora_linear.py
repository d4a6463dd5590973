"""A frozen linear layer with its LoRA adapter as a few products, forward and backward.

In: a layer of PEFT, or one without an adapter; an input, or the gradient of the output. Out: the output, or the
gradients of input and adapter; a bias is frozen, too. Their numbers are those of PEFT's layer, rounded elsewhere. The
caller differentiates: no function here is seen by autograd. Does not compute int8 layers, which round their input.
"""

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor

from tutor.engines.hf.products import product
from tutor.stages.train.kernels.fast_dropout import FastDropout

ADAPTER = "default"
"""Name that PEFT gives the only adapter."""

Kept = tuple[Tensor, ...]
"""Tensors of a forward pass for its backward pass: A's output and the dropout's mask, where there are any."""


class LoraLinear:
    """One layer that computes in `dtype`; `unpack` keeps 4-bit weights in it, otherwise every product unpacks them."""

    def __init__(self, layer: Any, dtype: torch.dtype, *, unpack: bool) -> None:
        self.base = getattr(layer, "base_layer", layer)
        self.layer = layer if hasattr(layer, "lora_A") else None
        self.dtype = dtype
        self.unpacked = self._unpack() if unpack and isinstance(self.base, Linear4bit) else None

    def weight(self) -> Tensor:
        """Return the frozen weight, [outputs, inputs]."""
        if isinstance(self.base, Linear4bit):
            return self._unpack() if self.unpacked is None else self.unpacked
        weight: Tensor = self.base.weight
        return weight.detach().to(self.dtype)

    def matrices(self) -> list[Tensor]:
        """Return the adapter's matrices A and B; nothing for a layer without an adapter."""
        return [] if self.layer is None else [self.layer.lora_A[ADAPTER].weight, self.layer.lora_B[ADAPTER].weight]

    def forward(self, x: Tensor, matrices: Sequence[Tensor], onto: Tensor | None = None) -> tuple[Tensor, Kept]:
        """Return the output for x [tokens, inputs], plus `onto`, and what the backward pass needs."""
        y = product(x, self.weight(), onto)
        if self.base.bias is not None:
            y.add_(self.base.bias.detach())
        if self.layer is None:
            return y, ()
        first, second = (matrix.to(x.dtype) for matrix in matrices)
        drop, factor = self.layer.lora_dropout[ADAPTER], self.layer.scaling[ADAPTER]
        if isinstance(drop, FastDropout) and drop.training:
            mask = drop.mask(x.shape)
            inner = product(x * mask, first).mul_(factor * drop.factor)
            return product(inner, second, y), (inner, mask)
        inner = product(x, first).mul_(factor)
        return product(inner, second, y), (inner,)

    def backward(
        self,
        gradient: Tensor,
        x: Tensor,
        matrices: Sequence[Tensor],
        kept: Sequence[Tensor],
        *,
        onto: Tensor | None = None,
        needs_input: bool = True,
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Return the gradients of x plus `onto` (None unless it is needed), and of A and B."""
        grown = product(gradient, self.weight().t(), onto) if needs_input else None
        if self.layer is None:
            return grown, []
        first, second = (matrix.to(x.dtype) for matrix in matrices)
        inner, *masks = kept
        factor = self.layer.scaling[ADAPTER] * (self.layer.lora_dropout[ADAPTER].factor if masks else 1.0)
        back = product(gradient, second.t()).mul_(factor)
        # The narrow matrix first: twice as fast as the other way round.
        of_first = product(back.t(), (x * masks[0] if masks else x).t())
        of_second = product(inner.t(), gradient.t()).t()
        if grown is not None and masks:
            grown.addcmul_(product(back, first.t()), masks[0].to(x.dtype))
        elif grown is not None:
            grown = product(back, first.t(), grown)
        return grown, [part.to(matrix.dtype) for part, matrix in zip((of_first, of_second), matrices, strict=True)]

    def _unpack(self) -> Tensor:
        weight = self.base.weight
        return dequantize_4bit(weight.data, weight.quant_state).to(self.dtype)  # type: ignore[no-any-return]
