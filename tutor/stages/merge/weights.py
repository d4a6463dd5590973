"""The weights of a merged model, made piece by piece when they are asked for: base, adapter, one rounding at the end.

In: a base's files and an adapter. Out: pieces in the output's type, each checked for what that type cannot hold. The
base is the original, or what 4-bit training saw of it (NF4 and back). Writes nothing and loads no model.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tutor.errors import ArtifactError
from tutor.formats.models.safetensors import Bits, Stored, pieces
from tutor.stages.merge.peft_adapter import Adapter, changed

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
ENDLESS = {"F16": 0x7C00, "BF16": 0x7F80}
"""The bits of infinity: whatever is not below them, sign aside, is infinite or no number."""
LARGEST = {"F16": "FP16's 65504", "BF16": "BF16's 3.39e38"}
TIED = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Merged:
    """A merged model's weights by name; `nf4` is the type that training computed in, None merges into the original."""

    base: Mapping[str, Stored]
    adapter: Adapter
    dtype: str  # F16 or BF16
    nf4: torch.dtype | None = None

    def pieces(self, name: str) -> Iterator[tuple[Bits, float]]:
        """A tensor from first to last, each piece with the adapter's largest change of one of its numbers.

        Raises ArtifactError for a value that is no number or beyond what `dtype` holds.
        """
        stored = self.base[name]
        if not self.rounded(name) and name not in self.adapter.shapes and stored.dtype == self.dtype:
            for bits in pieces(stored):
                if _largest(bits) >= ENDLESS[self.dtype]:
                    raise _unfit(name, self.dtype, as_tensor(bits, self.dtype))
                yield bits, 0.0
            return
        first = 0
        for weight in self._base_pieces(stored):
            new, change = weight, 0.0
            if name in self.adapter.shapes:
                new = self._adapted(name, weight, first)
                change = (new - weight.float()).abs().max().item()
            first += len(weight)
            bits = new.to(TYPES[self.dtype]).reshape(-1).view(torch.int16).numpy().view(np.uint16)
            if _largest(bits) >= ENDLESS[self.dtype]:
                raise _unfit(name, self.dtype, new)
            yield bits, change

    def tensors(self, name: str) -> Iterator[torch.Tensor]:
        """The same pieces as tensors of whole rows, for a model that is to compute with them."""
        shape = self.base[name].shape
        return (as_tensor(bits, self.dtype).reshape(-1, *shape[1:]) for bits, _ in self.pieces(name))

    def rounded(self, name: str) -> bool:
        """Whether this weight is NF4 and back: all of a layer's matrices, as bitsandbytes quantizes a Llama."""
        return self.nf4 is not None and ".layers." in name and len(self.base[name].shape) == 2

    def _base_pieces(self, stored: Stored) -> Iterator[torch.Tensor]:
        """The base's rows, in the file's type or as 4-bit training saw them."""
        shape = (-1, *stored.shape[1:])
        read = (as_tensor(bits, stored.dtype).reshape(shape) for bits in pieces(stored))
        if not self.rounded(stored.name):
            return read
        from tutor.engines.hf.nf4 import round_trip

        assert self.nf4 is not None
        dtype = self.nf4
        # Where there is a GPU, training quantized on it, and its rounding is not the CPU's to the last bit.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return (piece.cpu() for piece in round_trip(piece.to(device, dtype) for piece in read))

    def _adapted(self, name: str, weight: torch.Tensor, first: int) -> torch.Tensor:
        """Rows from `first` on as the adapter makes them, in fp32."""
        if delta := self.adapter.deltas.get(name):
            return changed(weight, delta, first)
        rows = slice(first, first + len(weight))
        if name in self.adapter.shifts:
            return weight.float() + self.adapter.shifts[name][rows]
        return self.adapter.whole[name][rows]


def refuse_unfit(base: Mapping[str, Stored], adapter: Adapter, config: Mapping[str, Any]) -> None:
    """Raise ArtifactError when an adapter is not one of this base: a tensor missing, another shape, a tied one."""
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
    """The numbers that the bits of a file stand for, in the same memory."""
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(TYPES[dtype])


def _largest(bits: Bits) -> int:
    """The bits of the largest magnitude among 16-bit floats, whose order is their bits' order, sign aside."""
    unsigned = int(bits.max())  # of a negative number, where there is one
    return max(int(bits.view("i2").max()), unsigned - 0x8000)


def _unfit(name: str, dtype: str, tensor: torch.Tensor) -> ArtifactError:
    worst = tensor.float().abs().max().item()
    if math.isnan(worst):
        return ArtifactError(f"{name} holds NaN", "fetch the base again, or train again")
    hint = "set merge.dtype to bf16" if dtype == "F16" and math.isfinite(worst) else "fetch the base again"
    return ArtifactError(f"{name} holds {worst:g}, beyond {LARGEST[dtype]}", hint)
