"""A GGUF's tensors against the folder that it was made of: the same numbers in F16, near enough where quantized.

In: a GGUF file, a 16-bit Hugging Face folder, and for what training changed the base's folder. Out: differences by
tensor, in words and in numbers. Memory holds one piece of one tensor at a time. Decides nothing.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.errors import ArtifactError
from tutor.formats.models.gguf import Gguf, Tensor
from tutor.formats.models.model_folder import WEIGHTS, open_weights, read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float32]

SAMPLE = 1 << 16
"""Numbers of a quantized tensor that are compared: whole rows at even distances, the first and the last among them."""
PIECE = 1 << 22
"""Numbers compared at once."""
MADE_UP = ("rope_freqs.weight",)
"""What the converter computes from config.json, so that no folder holds it."""
FORMS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4"}
"""numpy's names for safetensors' types; it has no bfloat16."""


@dataclass(frozen=True)
class Weight:
    """Where a matrix or vector of a model folder lies."""

    path: Path
    form: str  # safetensors' name
    shape: tuple[int, ...]  # rows first
    start: int
    heads: int = 0  # of q and k, whose rows the converter puts into another order; else 0


@dataclass(frozen=True)
class Compared:
    """Sums over the compared numbers of one tensor: w the folder's, q the file's, d what training added to the base."""

    kind: str  # the file's
    count: int
    squares: float  # of w
    error: float  # squares of q - w
    moved: float  # squares of d
    kept: float  # (q - w + d) * d: equals `moved` where the error has nothing to do with d

    @property
    def relative(self) -> float:
        """The error's root mean square over that of the weights."""
        return math.sqrt(self.error / self.squares) if self.squares else math.sqrt(self.error)


def weights_of(model: Path) -> dict[str, Weight]:
    """A folder's weights by the names that they have in a GGUF.

    Raises ArtifactError for one that has none, and where a file is damaged.
    """
    known, found = _Names(model), {}
    for path in sorted(model.glob(WEIGHTS)):
        for name, weight in _header(path).items():
            if name.endswith(".rotary_emb.inv_freq"):
                continue
            called, heads = known.of(name, path)
            found[called] = Weight(**{**weight, "heads": heads})
    return found


def adapter_weights_of(adapter: Path, model: Path) -> dict[str, Weight]:
    """The pairs of a PEFT adapter of `model` by the names that they have in a GGUF. Raises ArtifactError likewise."""
    known, found = _Names(model), {}
    for path in sorted(adapter.glob(WEIGHTS)):
        for name, weight in _header(path).items():
            matrix, _, half = name.removeprefix("base_model.model.").rpartition(".lora_")
            called, heads = known.of(f"{matrix}.weight", path)
            # Heads are a matter of the product's rows, and those are B's.
            found[f"{called}.lora_{half[:1].lower()}"] = Weight(**{**weight, "heads": heads if half[:1] == "B" else 0})
    return found


class _Names:
    """What a model's weights are called in a GGUF, and how many heads' rows the converter reorders in each."""

    def __init__(self, model: Path) -> None:
        import gguf

        config = read_json(model / "config.json")
        try:
            self.names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
            queries = config["num_attention_heads"]
        except KeyError as missing:
            raise ArtifactError(f"{model / 'config.json'} lacks {missing}") from None
        self.heads = {"attn_q": queries, "attn_k": config.get("num_key_value_heads") or queries}

    def of(self, name: str, path: Path) -> tuple[str, int]:
        called = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise ArtifactError(f"{path}: a GGUF has no name for {name}")
        return called, self.heads.get(called.split(".")[-2], 0)


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of its tensors. Raises ArtifactError where it is not whole."""
    with open_weights(path, "np"), path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        said = json.loads(file.read(size))
    return {
        name: {
            "path": path,
            "form": entry["dtype"],
            "shape": tuple(entry["shape"]),
            "start": 8 + size + entry["data_offsets"][0],
        }
        for name, entry in said.items()
        if name != "__metadata__"
    }


def check_names(gguf: Gguf, weights: Mapping[str, Weight]) -> list[str]:
    """A line for each tensor that only one side has, or that has another shape."""
    lines = [f"{name} is missing" for name in weights if name not in gguf.tensors]
    for name, tensor in gguf.tensors.items():
        if name in weights and weights[name].shape != tensor.shape[::-1]:
            lines.append(f"{name} has the shape {tensor.shape[::-1]} instead of {weights[name].shape}")
        elif name not in weights and name not in MADE_UP:
            lines.append(f"{name} belongs to no weight")
    return lines


def check_exact(path: Path, gguf: Gguf, weights: Mapping[str, Weight]) -> list[str]:
    """A line for each tensor of an F16 file that is not the folder's number for number, all of them compared."""
    import numpy as np

    if lines := check_names(gguf, weights):
        return lines
    for name, weight in weights.items():
        tensor = gguf.tensors[name]
        if tensor.kind not in ("F16", "F32"):
            lines.append(f"{name} is {tensor.kind}")
            continue
        form = np.dtype("f2" if tensor.kind == "F16" else "f4")
        for rows in _pieces(weight.shape):
            ours, theirs = _folder_rows(weight, rows).astype(form), _file_rows(path, tensor, rows).astype(form)
            if not np.array_equal(ours, theirs):
                lines.append(f"{name} has other numbers than {weight.path}")
                break
    return lines


def compare(
    path: Path, gguf: Gguf, weights: Mapping[str, Weight], base: Mapping[str, Weight] | None = None
) -> dict[str, Compared]:
    """How far a sample of each tensor of a quantized file is from the folder's, and what of the training is in it."""
    found = {}
    for name, weight in weights.items():
        rows = _sampled(weight.shape)
        ours, theirs = _folder_rows(weight, rows), _file_rows(path, gguf.tensors[name], rows)
        error = theirs - ours
        moved = ours - _folder_rows(base[name], rows) if base else None
        found[name] = Compared(
            kind=gguf.tensors[name].kind,
            count=ours.size,
            squares=_dot(ours, ours),
            error=_dot(error, error),
            moved=_dot(moved, moved) if moved is not None else 0.0,
            kept=_dot(error + moved, moved) if moved is not None else 0.0,
        )
    return found


def _dot(left: "Numbers", right: "Numbers") -> float:
    import numpy as np

    return float(np.einsum("ij,ij->", left, right, dtype=np.float64))


def _pieces(shape: tuple[int, ...]) -> "Iterator[NDArray[np.intp]]":
    """All rows, some at a time; a vector is one row."""
    import numpy as np

    rows, length = (1, *shape)[-2:]
    step = max(1, PIECE // length)
    return (np.arange(start, min(start + step, rows)) for start in range(0, rows, step))


def _sampled(shape: tuple[int, ...]) -> "NDArray[np.intp]":
    """Rows at even distances that hold SAMPLE numbers together, all where there are no more."""
    import numpy as np

    rows, length = (1, *shape)[-2:]
    return np.unique(np.linspace(0, rows - 1, min(rows, max(2, SAMPLE // length))).astype(np.intp))


def _folder_rows(weight: Weight, rows: "NDArray[np.intp]") -> "Numbers":
    """Rows of a folder's weight, in the order of a GGUF."""
    import numpy as np

    shape = (1, *weight.shape)[-2:]
    stored = np.memmap(weight.path, FORMS[weight.form], "r", weight.start, shape)
    if weight.heads:
        # The converter's permute(): the two halves of each head's rows are shuffled into each other.
        order = np.arange(shape[0]).reshape(weight.heads, 2, -1).swapaxes(1, 2).reshape(-1)
        rows = order[rows]
    read = stored[rows]
    if weight.form == "BF16":
        return (read.astype(np.uint32) << 16).view(np.float32)
    return read.astype(np.float32)


def _file_rows(path: Path, tensor: Tensor, rows: "NDArray[np.intp]") -> "Numbers":
    """Rows of a GGUF's tensor, dequantized."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[tensor.kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    length, count = tensor.shape[0], math.prod(tensor.shape[1:])
    stored = np.memmap(path, np.uint8, "r", tensor.start, (count, length // block * size))
    read: Numbers = gguf.dequantize(stored[rows], kind).astype(np.float32, copy=False)
    return read.reshape(len(rows), length)
