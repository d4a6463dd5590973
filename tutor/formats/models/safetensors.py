"""Headers of safetensors files: read, checked against the file, and written; and the library's reader of tensors.

In: weight files of a 16-bit model or of an adapter. Out: the files of a model folder that count; name, type, shape and
position of each tensor. Reads no tensor data of its own (tensor_streams.py does) and needs neither numpy nor torch.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json
from tutor.errors import ArtifactError

WEIGHTS = "*.safetensors"
"""Pattern of the weight files in a folder."""
SINGLE = "model.safetensors"
"""Name of the only weight file of a model folder without an index."""
INDEX = "model.safetensors.index.json"
"""Name of the file that names the weight file of each tensor."""
WIDTHS = {"F16": 2, "BF16": 2, "F32": 4}
"""Bytes a number by safetensors' name of its type: the types that a 16-bit model may hold."""
SIXTEEN_BIT = (
    "conversion can fail with models already quantized to 4 bits, it needs one in FP16/FP32 (specification, 7.2): "
    "name the original"
)
"""Next step for a model that is quantized already: the specification's own warning."""
ROTARY_TABLE = ".rotary_emb.inv_freq"
"""End of the name of a table that old checkpoints carry and every program computes for itself."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    path: Path
    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    start: int  # of its data in the file, in bytes

    @property
    def count(self) -> int:
        """Number of its numbers."""
        return prod(self.shape)


@contextlib.contextmanager
def open_weights(path: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file to read tensors from; "np" needs no torch. Raises ArtifactError when it is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework=framework)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} is damaged: {error}", "fetch or make it again") from None
    with file:
        yield file


def read_header(path: Path) -> list[Stored]:
    """Return the tensors of a file in the order of their data.

    Raises ArtifactError for a file that is not whole and for a tensor that is no 16-bit weight.
    """
    with open_weights(path, "np"), path.open("rb") as file:  # the library checks the header against the file
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    found = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in WIDTHS:
            raise ArtifactError(f"{path}: {name} is {entry['dtype']}, no 16-bit weight", SIXTEEN_BIT)
        found.append(Stored(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]))
    return found


def weight_map(model: Path) -> dict[str, str] | None:
    """Return the weight file of each tensor, as the index names it; None for a folder without an index.

    Raises ArtifactError for a damaged index, and for a value that is not the bare name of a file in the folder.
    """
    path = model / INDEX
    if not path.exists():
        return None
    named = read_json(path).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ArtifactError(f"{path} is damaged: it has no weight_map", "fetch it again")
    for tensor, file in named.items():
        if not isinstance(file, str) or not file or file in (".", "..") or {"/", "\\", "\0"} & set(file):
            raise ArtifactError(
                f"{path}: weight_map names {file!r} for {tensor}, which is not the name of a file in the folder",
                "fetch it again",
            )
    return named


def weight_files(model: Path) -> list[Path]:
    """Return the weight files of a model folder that count: those that its index names, else model.safetensors.

    All other files with weights are ignored: transformers and llama.cpp's converter read these alone.
    Raises ArtifactError for a folder without weights, for a damaged index and for a missing file.
    """
    named = weight_map(model)
    if named is None:
        if not (model / SINGLE).is_file():
            raise ArtifactError(f"{model} holds no {SINGLE} and no {INDEX}", "fetch it again")
        return [model / SINGLE]
    files = sorted(set(named.values()))
    if missing := [name for name in files if not (model / name).is_file()]:
        raise ArtifactError(f"{model} lacks {', '.join(missing)}, which its index names", "fetch them again")
    if SINGLE not in files and (model / SINGLE).exists():
        raise ArtifactError(
            f"{model} holds {SINGLE} and an index that does not name it: programs disagree which one counts",
            "remove one of them",
        )
    return [model / name for name in files]


def read_folder(model: Path) -> dict[Path, list[Stored]]:
    """Return the tensors of every weight file of a model folder that counts.

    Raises ArtifactError for a tensor that is in two files, or not in the file that the index names.
    """
    found = {path: read_header(path) for path in weight_files(model)}
    places: dict[str, str] = {}
    for path, stored in found.items():
        for tensor in stored:
            if tensor.name in places:
                raise ArtifactError(f"{path}: {tensor.name} is in {places[tensor.name]} too", "fetch them again")
            places[tensor.name] = path.name
    named = weight_map(model) or places
    if wrong := sorted(name for name in named.keys() | places if named.get(name) != places.get(name)):
        name = wrong[0]
        where = f"in {places[name]}" if name in places else "in no file"
        said = named.get(name, "no file")
        raise ArtifactError(f"{model / INDEX} names {said} for {name}, which is {where}", "fetch it again")
    return found


def folder_weights(model: Path) -> dict[str, Stored]:
    """Return the tensors of a model folder by name, rotary tables left out."""
    tensors = (tensor for stored in read_folder(model).values() for tensor in stored)
    return {tensor.name: tensor for tensor in tensors if not tensor.name.endswith(ROTARY_TABLE)}


def make_header(tensors: Sequence[tuple[str, tuple[int, ...]]], dtype: str | Mapping[str, str]) -> bytes:
    """Return the beginning of a file with these names and shapes in this order, of one type or each of its own."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        kind = dtype if isinstance(dtype, str) else dtype[name]
        start, end = end, end + prod(shape) * WIDTHS[kind]
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
