"""formats/models/gguf_weights.py: the tensors of a GGUF against the weights of its model folder."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from support.models.gguf_bytes import tensor, whole
from support.models.small_weights import (
    HIDDEN,
    MLP,
    NAMES,
    SHAPES,
    random_weights,
    write_gguf,
    write_model,
)

from tutor.errors import ArtifactError
from tutor.formats.models import gguf_weights
from tutor.formats.models.gguf import Gguf, Tensor, read_gguf
from tutor.formats.models.gguf_weights import check_exact, check_names, weights_of


def exact(path: Path, model: Path) -> list[str]:
    return check_exact(path, read_gguf(path), weights_of(model))


def test_equal_numbers_have_no_difference(tmp_path: Path) -> None:
    weights = random_weights()
    assert exact(write_gguf(tmp_path / "a.gguf", weights), write_model(tmp_path / "m", weights)) == []


def test_unpermuted_q_and_k_are_found(tmp_path: Path) -> None:
    """Ollama's own conversion of adapters makes this fault: all numbers are present, in the wrong rows."""
    weights = random_weights()
    lines = exact(write_gguf(tmp_path / "a.gguf", weights, as_is=True), write_model(tmp_path / "m", weights))
    parts = {f"blk.0.attn_{part}.{kind}" for part in "qk" for kind in ("weight", "bias")}
    assert {line.split()[0] for line in lines} == parts


@pytest.mark.parametrize("name", SHAPES)
def test_one_changed_number_in_any_tensor_is_found(tmp_path: Path, name: str) -> None:
    weights = random_weights()
    model = write_model(tmp_path / "m", weights)
    weights[name].reshape(-1)[-1] += np.float16(0.125)
    assert [line.split()[0] for line in exact(write_gguf(tmp_path / "a.gguf", weights), model)] == [NAMES[name]]


def test_comparison_in_pieces_covers_the_last_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_weights, "PIECE", 3 * HIDDEN)
    weights = random_weights()
    model = write_model(tmp_path / "m", weights)
    assert exact(write_gguf(tmp_path / "a.gguf", weights), model) == []
    weights["model.embed_tokens.weight"][-1, -1] += np.float16(0.125)
    assert len(exact(write_gguf(tmp_path / "b.gguf", weights), model)) == 1


def test_bfloat16_weights_are_decoded(tmp_path: Path) -> None:
    weights = random_weights()
    bits = {name: (value.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for name, value in weights.items()}
    model = write_model(tmp_path / "m", bits)
    path = model / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].replace(b'"U16"', b'"BF16"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    short = {name: (value.astype(np.uint32) << 16).view(np.float32) for name, value in bits.items()}
    assert exact(write_gguf(tmp_path / "a.gguf", short), model) == []


def test_unmatched_tensors_and_weights_are_named(tmp_path: Path) -> None:
    weights = random_weights()
    less = {name: value for name, value in weights.items() if "down" not in name}
    down = "blk.0.ffn_down.weight"
    missing = check_names(
        read_gguf(write_gguf(tmp_path / "a.gguf", less)),
        weights_of(write_model(tmp_path / "m", weights)),
    )
    assert missing == [f"{down} is missing"]
    more = check_names(
        read_gguf(write_gguf(tmp_path / "b.gguf", weights)),
        weights_of(write_model(tmp_path / "l", less)),
    )
    assert more == [f"{down} belongs to no weight"]
    other = {**weights, f"{MLP}down_proj.weight": weights[f"{MLP}down_proj.weight"].T.copy()}
    shape = check_names(
        read_gguf(write_gguf(tmp_path / "c.gguf", other)),
        weights_of(write_model(tmp_path / "o", weights)),
    )
    assert shape == [f"{down} has the shape (256, 128) instead of (128, 256)"]


def test_converters_own_tensors_need_no_weight() -> None:
    tensors = {"rope_freqs.weight": Tensor("F32", (8,))}
    assert check_names(Gguf({}, tensors), {}) == []


def test_weight_without_gguf_name_raises_artifact_error(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", {"model.vision.weight": np.zeros((2, 2), np.float16)})
    with pytest.raises(ArtifactError, match=r"no name for model\.vision\.weight"):
        weights_of(model)


def test_sample_has_whole_rows_from_first_to_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_weights, "SAMPLE", 100)
    assert gguf_weights._sampled((1000, 10)).tolist() == [111 * number for number in range(10)]
    assert gguf_weights._sampled((3, 1000)).tolist() == [0, 2]
    assert gguf_weights._sampled((5, 10)).tolist() == [0, 1, 2, 3, 4]
    assert gguf_weights._sampled((7,)).tolist() == [0]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("F64", "<f8"), ("I8", "<i1"), ("I16", "<i2"), ("I32", "<i4"), ("I64", "<i8")]
)
def test_numbers_of_plain_types_are_read(tmp_path: Path, kind: str, dtype: str) -> None:
    """The gguf package dequantizes none of them."""
    numbers = np.arange(-32, 32, dtype=dtype)
    number = int(gguf.GGMLQuantizationType[kind])
    (tmp_path / "a.gguf").write_bytes(whole(tensors=(tensor(shape=(8, 8), kind=number),), data=numbers.tobytes()))
    read = gguf_weights.file_rows(tmp_path / "a.gguf", read_gguf(tmp_path / "a.gguf").tensors["a"], np.array([1, 7]))
    assert np.array_equal(read, numbers.astype(np.float32).reshape(8, 8)[[1, 7]])
