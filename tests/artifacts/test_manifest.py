"""Damage of a folder, and the manifest that names what made it."""

import json

import pytest
from support.outputs.stage_folders import write_stage

from tutor.artifacts.manifest import find_damage, find_manifest, is_made, is_ours, read_manifest, require_stage
from tutor.artifacts.stage_folder import writing
from tutor.errors import ArtifactError


def changed(**values):
    """A change of a manifest's text: other values of its fields."""
    return lambda text: json.dumps({**json.loads(text), **values})


DAMAGES = {
    "cut": lambda text: text[: len(text) // 2],
    "other field": lambda text: text.replace('"key"', '"kee"'),
    "another version": lambda text: text.replace('"stage"', '"older": 1, "stage"'),
    "list of outputs": changed(outputs=[]),
    "output without hash": changed(outputs={"top.txt": {"size": 3}}),
    "output that is text": changed(outputs={"top.txt": "3"}),
    "no fields": changed(fields=None),
    "results that are text": changed(results="x"),
    "key that is a number": changed(key=1),
    "seconds that are text": changed(seconds="1"),
}
"""Damage after which the file is still recognised as tutor's."""
UNREADABLE = {"empty": "", "other JSON": "[]", "null": "null", "noise": "\ufffd" * 1000, "other program": '{"name": 1}'}


@pytest.mark.parametrize("name", [*DAMAGES, *UNREADABLE])
def test_read_manifest_of_a_damaged_file_raises(tmp_path, name):
    write_stage(tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    path.write_text(DAMAGES[name](path.read_text()) if name in DAMAGES else UNREADABLE[name])
    with pytest.raises(ArtifactError, match=f"{path} is damaged"):
        read_manifest(tmp_path / "data")
    with pytest.raises(ArtifactError, match="is damaged; run: tutor run --until data"):
        require_stage(tmp_path / "data", "data")
    assert find_manifest(tmp_path / "data") is None
    assert not is_made(tmp_path / "data", {"text": "new"})
    assert is_ours(tmp_path / "data") == (name in DAMAGES)


def test_find_damage_finds_missing_cut_and_changed_files(tmp_path):
    folder = tmp_path / "data"
    write_stage(folder)
    (folder / "top.txt").write_text("NEW")
    assert find_damage(folder) == []
    assert find_damage(folder, content=True) == [f"{folder}/top.txt has changed since it was made"]
    (folder / "top.txt").write_text("ne")
    assert find_damage(folder) == [f"{folder}/top.txt has 2 bytes instead of 3"]
    (folder / "top.txt").unlink()
    assert find_damage(folder) == [f"{folder}/top.txt is missing"]
    (folder / "manifest.json").unlink()
    assert find_damage(folder) == [f"{folder}/manifest.json is missing"]
    assert read_manifest(folder) is None


def test_require_stage_names_the_command_that_makes_the_folder(tmp_path):
    with pytest.raises(ArtifactError, match="is not there; run: tutor run --until train"):
        require_stage(tmp_path / "adapter", "train")
    write_stage(tmp_path / "adapter")
    (tmp_path / "adapter" / "top.txt").write_text("")
    with pytest.raises(ArtifactError, match="has 0 bytes instead of 3; run: tutor run --until train"):
        require_stage(tmp_path / "adapter", "train")


def test_fingerprint_depends_on_content_alone(tmp_path):
    write_stage(tmp_path / "a", "same", version=1)
    write_stage(tmp_path / "b", "same", version=2)
    write_stage(tmp_path / "c", "other", version=1)
    a, b, c = (require_stage(tmp_path / name, "data") for name in "abc")
    assert a.key != b.key
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_is_made_of_equal_fields_and_whole_files_alone(tmp_path):
    write_stage(tmp_path / "data")
    assert is_made(tmp_path / "data", {"text": "new"})
    assert not is_made(tmp_path / "data", {"text": "new", "more": 1})
    assert not is_made(tmp_path / "none", {"text": "new"})
    (tmp_path / "data" / "top.txt").unlink()
    assert not is_made(tmp_path / "data", {"text": "new"})


def test_other_fields_are_those_with_another_value(tmp_path):
    write_stage(tmp_path / "data", rank=8)
    manifest = require_stage(tmp_path / "data", "data")
    assert manifest.other_fields({"rank": 8}) == []
    assert manifest.other_fields({"text": "old", "rank": 8, "alpha": 1}) == ["text", "alpha"]


def test_changes_name_files_of_code_and_no_moved_ones(tmp_path):
    sources = {"a.py": "1", "b.py": "2"}
    with writing(tmp_path / "data", "data", {"code": "x", "rank": 8}, sources=sources):
        pass
    manifest = require_stage(tmp_path / "data", "data")
    assert manifest.changes({"code": "x", "rank": 8}, {}) == []
    moved = {"moved.py": "1", "b.py": "3", "c.py": "4"}
    assert manifest.changes({"code": "y", "rank": 9}, moved) == [
        "code.b.py: 2 -> 3",
        "code.c.py: (absent) -> 4",
        "rank: 8 -> 9",
    ]
    assert manifest.changes({"code": "y", "rank": 8}, sources) == ["code: x -> y"]
