"""JSON is written whole or not at all; a removed link leaves its target. Faults of a disk: test_stage_folder.py."""

import json
import os

import pytest
from hypothesis import given
from support.json_values import json_values
from support.outputs.stage_folders import read_stage, write_stage

from tutor.artifacts.disk import read_json, remove, write_json
from tutor.errors import ArtifactError


@given(value=json_values)
def test_write_json_keeps_any_value(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert json.loads(path.read_text("utf-8")) == value


def test_write_json_writes_all_or_nothing(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"name": os.fsdecode(b"ma\xf1ana")})  # a file's name need not be UTF-8
    assert json.loads(path.read_text("utf-8"))["name"] == os.fsdecode(b"ma\xf1ana")
    with pytest.raises(ValueError, match="nan"):
        write_json(path, float("nan"))
    assert "ma" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_remove_of_a_link_leaves_its_target(tmp_path):
    write_stage(tmp_path / "target")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    remove(tmp_path / "link")
    assert read_stage(tmp_path / "target") == "new"
    remove(tmp_path / "target")
    remove(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "is missing"),
        (b"", "is damaged"),
        (b"\xff", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"[]", "is not a JSON object"),
    ],
)
def test_read_json_of_damaged_content_raises(tmp_path, text, expected):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ArtifactError, match=f"{path} {expected}"):
        read_json(path)
