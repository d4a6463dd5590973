"""Compare a GGUF's tensors with the folder that it was made of: equal numbers in 16 bits, sums of errors else.

In: a GGUF file, a 16-bit Hugging Face folder, and for the training's share of the error the base's folder. Out:
differences by tensor, as lines and as sums. Holds one piece of one tensor in memory at a time. Sets no limits.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import read_json
from tutor.errors import ArtifactError
from tutor.formats.architectures import architecture_of
from tutor.formats.models.gguf import Gguf, Tensor
from tutor.formats.models.safetensors import WEIGHTS, Stored, folder_weights, read_header

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float32]

SAMPLE = 1 << 16
"""Number of compared numbers of a quantized tensor: whole rows at even distances, from the first to the last."""
PIECE = 1 << 22
"""Number of numbers compared at once."""
COMPUTED = ("rope_freqs.weight",)
"""Tensors that the converter computes from config.json, so that no folder holds them."""
NORM = "norm.weight"
"""End of the names of the weights that a converter adds its offset to, as in llama.cpp's conversion/gemma.py."""
FORMS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4"}
"""numpy's type by safetensors' name, which is GGUF's too; numpy has no bfloat16."""
PLAIN = {"F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
"""numpy's type by GGUF's name, for the types that the gguf package does not dequantize."""


@dataclass(frozen=True)
class Weight:
    """A matrix or vector of a model folder that a GGUF holds too."""

    tensor: Stored
    heads: int = 0  # of q and k, whose rows (of a bias: numbers) the converter reorders; else 0
    offset: float = 0.0  # what the converter adds to a norm's weights


@dataclass(frozen=True)
class ErrorSums:
    """Sums over the compared numbers of one tensor: w the folder's, q the file's, d = w - the base's."""

    kind: str  # type in the file
    count: int
    squares: float  # of w
    error: float  # squares of q - w
    moved: float  # squares of d
    kept: float  # (q - w + d) * d: equals `moved` where the error is independent of d

    @property
    def relative(self) -> float:
        """Root mean square of the error over that of the weights."""
        return math.sqrt(self.error / self.squares) if self.squares else math.sqrt(self.error)


def weights_of(model: Path) -> dict[str, Weight]:
    """Return a folder's weights by their names in a GGUF.

    Raises ArtifactError for a weight without such a name, and where a file is damaged.
    """
    names, found = _Names(model), {}
    for tensor in folder_weights(model).values():
        name, heads = names.of(tensor.name, tensor.path)
        found[name] = Weight(tensor, heads, names.offset(tensor.name))
    return found


def adapter_weights_of(adapter: Path, model: Path) -> dict[str, Weight]:
    """Return the matrices of a PEFT adapter of `model` by their names in a GGUF. Raises as `weights_of`."""
    names, found = _Names(model), {}
    for path in sorted(adapter.glob(WEIGHTS)):
        for tensor in read_header(path):
            matrix, _, half = tensor.name.removeprefix("base_model.model.").rpartition(".lora_")
            name, heads = names.of(f"{matrix}.weight", path)
            # The converter reorders rows of the product, which are those of B
            found[f"{name}.lora_{half[:1].lower()}"] = Weight(tensor, heads if half[:1] == "B" else 0)
    return found


class _Names:
    """Names of a model's weights in a GGUF, and the number of heads whose rows the converter reorders in each."""

    def __init__(self, model: Path) -> None:
        import gguf

        config = read_json(model / "config.json")
        self.family = architecture_of(config.get("model_type"), str(model))
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        try:
            self.names = gguf.get_tensor_name_map(numbers[self.family.gguf], config["num_hidden_layers"])
            queries = config["num_attention_heads"]
        except KeyError as missing:
            raise ArtifactError(f"{model / 'config.json'} lacks {missing}") from None
        heads = {"attn_q": queries, "attn_k": config.get("num_key_value_heads") or queries}
        self.heads = {name: heads[name] for name in self.family.permuted}

    def of(self, name: str, path: Path) -> tuple[str, int]:
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ArtifactError(f"{path}: a GGUF has no name for {name}")
        return found, self.heads.get(found.split(".")[-2], 0)

    def offset(self, name: str) -> float:
        return self.family.norm_offset if name.endswith(NORM) else 0.0


def check_names(gguf: Gguf, weights: Mapping[str, Weight]) -> list[str]:
    """Return a line for each tensor that only one side has, or that has another shape."""
    lines = [f"{name} is missing" for name in weights if name not in gguf.tensors]
    for name, tensor in gguf.tensors.items():
        if name in weights and weights[name].tensor.shape != tensor.shape[::-1]:
            lines.append(f"{name} has the shape {tensor.shape[::-1]} instead of {weights[name].tensor.shape}")
        elif name not in weights and name not in COMPUTED:
            lines.append(f"{name} belongs to no weight")
    return lines


def check_exact(path: Path, gguf: Gguf, weights: Mapping[str, Weight]) -> list[str]:
    """Compare all numbers of a 16-bit file; return a line for each tensor with other numbers than the folder's."""
    import numpy as np

    if lines := check_names(gguf, weights):
        return lines
    for name, weight in weights.items():
        tensor = gguf.tensors[name]
        if tensor.kind not in FORMS:
            lines.append(f"{name} is {tensor.kind}")
            continue
        for rows in all_rows(weight.tensor.shape):
            ours, theirs = (
                _rounded(each, tensor.kind) for each in (_folder_rows(weight, rows), file_rows(path, tensor, rows))
            )
            if not np.array_equal(ours, theirs):
                lines.append(f"{name} has other numbers than {weight.tensor.path}")
                break
    return lines


def _rounded(numbers: "Numbers", kind: str) -> "NDArray[Any]":
    """Numbers in the precision of a type, by the rounding of llama.cpp's converter."""
    import gguf
    import numpy as np

    if kind == "BF16":
        return gguf.quantize(np.ascontiguousarray(numbers), gguf.GGMLQuantizationType.BF16)  # type: ignore[no-any-return]
    return numbers.astype(FORMS[kind])


def error_sums(
    path: Path, gguf: Gguf, weights: Mapping[str, Weight], base: Mapping[str, Weight] | None = None
) -> dict[str, ErrorSums]:
    """Compare a sample of each tensor of a quantized file with the folder's and, where given, with the base's."""
    import numpy as np

    found = {}
    for name, weight in weights.items():
        rows = _sampled(weight.tensor.shape)
        ours, theirs = _folder_rows(weight, rows), file_rows(path, gguf.tensors[name], rows)
        with np.errstate(
            invalid="ignore"
        ):  # infinite minus infinite; the error is then no number, and over every limit
            error = theirs - ours
        moved = ours - _folder_rows(base[name], rows) if base else None
        found[name] = ErrorSums(
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


def all_rows(shape: tuple[int, ...]) -> "Iterator[NDArray[np.intp]]":
    """All row numbers, some at a time; a vector is one row."""
    import numpy as np

    rows, length = (1, *shape)[-2:]
    step = max(1, PIECE // length)
    return (np.arange(start, min(start + step, rows)) for start in range(0, rows, step))


def _sampled(shape: tuple[int, ...]) -> "NDArray[np.intp]":
    """Row numbers at even distances with about SAMPLE numbers together; all where there are fewer."""
    import numpy as np

    rows, length = (1, *shape)[-2:]
    return np.unique(np.linspace(0, rows - 1, min(rows, max(2, SAMPLE // length))).astype(np.intp))


def _folder_rows(weight: Weight, rows: "NDArray[np.intp]") -> "Numbers":
    """Rows of a folder's weight, in the order of a GGUF."""
    import numpy as np

    tensor = weight.tensor
    shape = (1, *tensor.shape)[-2:]
    stored = np.memmap(tensor.path, FORMS[tensor.dtype], "r", tensor.start, shape)
    # The converter's permute() interleaves the two halves of each head's rows; a bias is one row here
    order = np.arange(tensor.shape[0])
    if weight.heads:
        order = order.reshape(weight.heads, 2, -1).swapaxes(1, 2).reshape(-1)
    read = stored[order[rows]] if len(tensor.shape) > 1 else stored[:, order]
    if tensor.dtype == "BF16":
        numbers = (read.astype(np.uint32) << 16).view(np.float32)
    elif weight.offset and tensor.dtype == "F16":
        return (read + np.float16(weight.offset)).astype(np.float32)  # the converter adds in the folder's own type
    else:
        numbers = read.astype(np.float32)
    return numbers + np.float32(weight.offset) if weight.offset else numbers


def file_rows(path: Path, tensor: Tensor, rows: "NDArray[np.intp]") -> "Numbers":
    """Rows of a GGUF's tensor, dequantized."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[tensor.kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    length, count = tensor.shape[0], math.prod(tensor.shape[1:])
    stored = np.memmap(path, np.uint8, "r", tensor.start, (count, length // block * size))
    data = stored[rows]
    numbers = data.view(PLAIN[tensor.kind]) if tensor.kind in PLAIN else _dequantized(data, kind)
    with np.errstate(over="ignore"):
        read: Numbers = numbers.astype(np.float32, copy=False)
    return read.reshape(len(rows), length)


def _dequantized(data: "NDArray[np.uint8]", kind: "gguf.GGMLQuantizationType") -> "Numbers":
    import gguf

    try:
        read: Numbers = gguf.dequantize(data, kind)
    except NotImplementedError:
        raise ArtifactError(f"the gguf package cannot read numbers of type {kind.name}") from None
    return read
