"""formats/models/safetensors.py and tensor_streams.py, against the safetensors library."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tutor.artifacts.hashing import file_sha256
from tutor.errors import ArtifactError
from tutor.formats.models.safetensors import Stored, make_header, read_folder, read_header
from tutor.formats.models.tensor_streams import AHEAD, BLOCK, PIECE, Writer, open_writer, piece_rows, pieces

SHAPES = {
    "b.weight": (3, 5),
    "a": (7,),
    "ñ": (2, 2, 2),
    "scalar": (),
    "empty": (0, 4),
    "large": (BLOCK + 1, PIECE // BLOCK),
}


def tensors(dtype: Any = np.float16) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {name: np.asarray(random.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}


def whole(stored: Stored) -> Any:
    found = [*pieces(stored)]
    assert all(len(piece) <= PIECE for piece in found)
    return np.concatenate([np.empty(0, f"<u{4 if stored.dtype == 'F32' else 2}"), *found])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_pieces_equal_what_the_library_reads(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(dtype), path, metadata={"format": "pt"})
    held = load_file(path)
    found = read_header(path)
    assert {stored.name: stored.shape for stored in found} == SHAPES
    for stored in found:
        assert whole(stored).tobytes() == held[stored.name].tobytes(), stored.name
    assert read_folder(tmp_path) == {path: found}


def test_written_file_equals_the_librarys_bytes(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    save_file(tensors(), theirs, metadata={"format": "pt"})
    stored = read_header(theirs)
    with open_writer(ours) as file:
        file.write(make_header([(tensor.name, tensor.shape) for tensor in stored], "F16"))
        for tensor in stored:
            for piece in pieces(tensor):
                file.write(piece)
        sha256 = file.finish()
    assert ours.read_bytes() == theirs.read_bytes()
    assert sha256 == file_sha256(theirs)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(st.integers(1, 5000), max_size=3).map(tuple), width=st.sampled_from(["F16", "F32"]))
def test_pieces_are_whole_rows_in_whole_blocks(shape: tuple[int, ...], width: str) -> None:
    stored = Stored(Path(), "name", width, shape, 0)
    row = max(1, stored.count // max(1, shape[0] if shape else 1))
    assert piece_rows(stored) % BLOCK == 0
    assert piece_rows(stored) * row <= max(PIECE, BLOCK * row)
    assert piece_rows(stored) * row % BLOCK == 0


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int64, "I64"), (np.uint8, "U8"), (np.float64, "F64"), (np.bool_, "BOOL")]
)
def test_tensor_of_no_16_bit_type_is_refused_by_name(tmp_path: Path, dtype: Any, name: str) -> None:
    save_file({"some.weight": np.zeros(4, dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ArtifactError, match=rf"model\.safetensors: some\.weight is {name}, no 16-bit weight; .*name the original"
    ):
        read_folder(tmp_path)


def test_file_truncated_while_read_is_an_artifact_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(), path)
    (last,) = (stored for stored in read_header(path) if stored.name == "large")
    path.write_bytes(path.read_bytes()[: last.start + 2 * PIECE])
    with pytest.raises(ArtifactError, match="ends within large"):
        whole(last)


@pytest.mark.parametrize("count", [1, 4 * AHEAD])
def test_full_disk_is_raised_by_write_or_finish(count: int) -> None:
    def fill() -> None:
        with open_writer(Path("/dev/full")) as file:
            for _ in range(count):
                file.write(bytes(1000))
            file.finish()

    with pytest.raises(OSError, match="No space left") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC


def test_callers_error_stops_the_threads_and_is_reraised(tmp_path: Path) -> None:
    opened: list[Writer] = []

    def fail() -> None:
        with open_writer(tmp_path / "file") as file:
            opened.append(file)
            for _ in range(AHEAD):
                file.write(bytes(1 << 20))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with pytest.raises(RuntimeError, match="shutdown"):
        opened[0].write(b"")
