"""The weights of a merged model, computed in pieces when they are read: base, adapter, one rounding at the end.

In: a base's tensors and an adapter. Out: pieces in the output's dtype, each checked for values beyond its range. The
base is the original, or its NF4 round trip, which 4-bit training saw. Does not write files and does not load a model.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tutor.errors import ArtifactError
from tutor.formats.models.safetensors import Stored
from tutor.formats.models.tensor_streams import Bits, largest_magnitude, pieces
from tutor.stages.merge.peft_adapter import Adapter, apply_delta

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""torch's dtypes by their names in safetensors."""
INFINITY_BITS = {"F16": 0x7C00, "BF16": 0x7F80}
"""Bit patterns of infinity; without its sign bit, a pattern that is not below them is infinite or NaN."""
LARGEST_VALUES = {"F16": "FP16's 65504", "BF16": "BF16's 3.39e38"}
"""Largest finite values, as an error names them."""
TIED = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors that share their values in a base with tie_word_embeddings."""


@dataclass(frozen=True)
class MergedWeights:
    """The weights of a merged model by name."""

    base: Mapping[str, Stored]
    adapter: Adapter
    dtype: str  # F16 or BF16
    nf4: torch.dtype | None = None  # compute dtype of the 4-bit training; None: merge into the original base

    def pieces(self, name: str) -> Iterator[tuple[Bits, float]]:
        """Yield a tensor in pieces, each with the adapter's largest change of one of its values.

        Raises ArtifactError for NaN and for a value beyond the range of `dtype`.
        """
        stored = self.base[name]
        if not self.is_quantized(name) and name not in self.adapter.shapes and stored.dtype == self.dtype:
            for bits in pieces(stored):
                if largest_magnitude(bits) >= INFINITY_BITS[self.dtype]:
                    raise _out_of_range(name, self.dtype, as_tensor(bits, self.dtype))
                yield bits, 0.0
            return
        first = 0
        for weight in self._base_pieces(stored):
            new, change = weight, 0.0
            if name in self.adapter.shapes:
                new = self._adapted(name, weight, first)
                change = (new - weight.float()).abs().max().item()
            first += len(weight)
            bits = new.to(DTYPES[self.dtype]).reshape(-1).view(torch.int16).numpy().view(np.uint16)
            if largest_magnitude(bits) >= INFINITY_BITS[self.dtype]:
                raise _out_of_range(name, self.dtype, new)
            yield bits, change

    def is_quantized(self, name: str) -> bool:
        """Return whether the base weight is its NF4 round trip: bitsandbytes quantizes all matrices of the layers."""
        return self.nf4 is not None and ".layers." in name and len(self.base[name].shape) == 2

    def _base_pieces(self, stored: Stored) -> Iterator[torch.Tensor]:
        """Yield the base's rows, in the file's dtype or after the NF4 round trip."""
        shape = (-1, *stored.shape[1:])
        read = (as_tensor(bits, stored.dtype).reshape(shape) for bits in pieces(stored))
        if not self.is_quantized(stored.name):
            return read
        from tutor.engines.hf.nf4 import round_trip

        assert self.nf4 is not None
        dtype = self.nf4
        # Training quantized on the GPU when there is one; its last bits differ from the CPU's.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return (piece.cpu() for piece in round_trip(piece.to(device, dtype) for piece in read))

    def _adapted(self, name: str, weight: torch.Tensor, first: int) -> torch.Tensor:
        """Return the rows from `first` on with the adapter applied, in fp32."""
        if delta := self.adapter.deltas.get(name):
            return apply_delta(weight, delta, first)
        rows = slice(first, first + len(weight))
        if name in self.adapter.bias_deltas:
            return weight.float() + self.adapter.bias_deltas[name][rows]
        return self.adapter.replacements[name][rows]


def require_fit(base: Mapping[str, Stored], adapter: Adapter, config: Mapping[str, Any]) -> None:
    """Raise ArtifactError when the adapter is of another base: a tensor is missing, has another shape or is tied."""
    missing = sorted(name for name in adapter.shapes if name not in base)
    if missing:
        count = f"{len(missing)} of {len(adapter.shapes)} adapted tensors missing"
        raise ArtifactError(f"the base has no {missing[0]} ({count})")
    for name, shape in adapter.shapes.items():
        if base[name].shape != shape:
            raise ArtifactError(f"{name} is {base[name].shape} in the base, {shape} in the adapter")
        if name in TIED and config.get("tie_word_embeddings"):
            raise ArtifactError(f"the adapter changes {name}, which the base ties to another", "adapt the layers alone")


def as_tensor(bits: Bits, dtype: str) -> torch.Tensor:
    """Return the values of the bits as a tensor that shares their memory."""
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(DTYPES[dtype])


def _out_of_range(name: str, dtype: str, tensor: torch.Tensor) -> ArtifactError:
    worst = tensor.float().abs().max().item()
    if math.isnan(worst):
        return ArtifactError(f"{name} holds NaN", "fetch the base again, or train again")
    hint = "set merge.dtype to bf16" if dtype == "F16" and math.isfinite(worst) else "fetch the base again"
    return ArtifactError(f"{name} holds {worst:g}, beyond {LARGEST_VALUES[dtype]}", hint)
