"""Hashes of values and files, remembered while a file's state stays; a file that changes while it is read."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.json_values import json_values
from support.processes.command import ROOT

from tutor.artifacts import hashing
from tutor.artifacts.disk import write_json
from tutor.artifacts.hashing import cached_sha256, file_sha256, file_state, json_sha256
from tutor.errors import ArtifactError


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Every file counts as unchanged for long."""
    monkeypatch.setattr(hashing, "SETTLED_NS", 0)


@settings(max_examples=30)
@given(st.dictionaries(st.text(), json_values))
def test_json_sha256_depends_on_values_and_not_on_their_order(value):
    assert json_sha256(dict(reversed(value.items()))) == json_sha256(value)
    assert json_sha256({**value, "more": 1}) != json_sha256({**value, "more": 2})


def test_cached_sha256_reads_a_file_again_when_it_changed(tmp_path):
    file, cache = tmp_path / "weights", tmp_path / "new" / "hashes.json"
    file.write_text("one")
    first = cached_sha256(file, cache)
    write_json(cache, json.loads(cache.read_text().replace(first, "0" * 64)))
    assert cached_sha256(file, cache) == "0" * 64  # so it was not read again
    os.utime(file, (0, 0))
    assert cached_sha256(file, cache) == first
    file.write_text("two")
    assert cached_sha256(file, cache) == file_sha256(file) != first
    second = tmp_path / "second"
    second.write_text("six")
    os.utime(second, ns=(0, file.stat().st_mtime_ns))
    second.replace(file)
    assert cached_sha256(file, cache) == file_sha256(file)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"FILE": 5}', '{"FILE": {}}', '{"FILE": {"seen": "SEEN"}}'])
def test_cached_sha256_replaces_a_damaged_cache(tmp_path, text):
    file, cache = tmp_path / "rows", tmp_path / "hashes.json"
    file.write_text("one")
    cache.write_text(text.replace("FILE", str(file)).replace("SEEN", file_state(file)))
    assert cached_sha256(file, cache) == file_sha256(file)
    assert file_sha256(file) in cache.read_text()


def test_file_sha256_of_an_unreadable_file_raises(tmp_path):
    with pytest.raises(ArtifactError, match="cannot read"):
        file_sha256(tmp_path)


def test_file_with_its_old_size_and_mtime_is_read_again(tmp_path):
    file, cache = tmp_path / "weights", tmp_path / "hashes.json"
    file.write_text("one")
    stat = file.stat()
    cached_sha256(file, cache)
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert cached_sha256(file, cache) == file_sha256(file)


def changing(monkeypatch: pytest.MonkeyPatch, file: Path, *contents: str) -> None:
    """Write the next content after each reading of the file, with the size and mtime of the first one."""
    read, stat, left = hashlib.file_digest, file.stat(), list(contents)

    def change(*args):
        found = read(*args)
        if left:
            file.write_text(left.pop(0))
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return found

    monkeypatch.setattr(hashlib, "file_digest", change)


def test_file_that_changes_once_while_read_is_hashed_again(tmp_path, monkeypatch):
    file, cache = tmp_path / "rows", tmp_path / "hashes.json"
    file.write_text("one")
    changing(monkeypatch, file, "two")
    assert cached_sha256(file, cache) == hashlib.sha256(b"two").hexdigest()
    assert cached_sha256(file, cache) == hashlib.sha256(b"two").hexdigest(), "what is remembered is the last content"


def test_file_that_keeps_changing_is_refused_and_not_remembered(tmp_path, monkeypatch):
    file, cache = tmp_path / "rows", tmp_path / "hashes.json"
    file.write_text("one")
    changing(monkeypatch, file, "two", "six")
    with pytest.raises(ArtifactError, match="rows changed while it was read") as caught:
        cached_sha256(file, cache)
    assert caught.value.code == 5
    assert not cache.exists()
    assert cached_sha256(file, cache) == hashlib.sha256(b"six").hexdigest()


def test_file_changed_a_moment_ago_is_not_remembered(tmp_path, monkeypatch):
    """Two changes within one tick of the file system's clock leave one state."""
    monkeypatch.setattr(hashing, "SETTLED_NS", 60 * 10**9)
    file, cache = tmp_path / "rows", tmp_path / "hashes.json"
    file.write_text("one")
    assert cached_sha256(file, cache) == file_sha256(file)
    assert not cache.exists()


WRITER = """
import sys
from pathlib import Path
from tutor.artifacts.hashing import remember_sha256
cache, name = Path(sys.argv[1]), sys.argv[2]
for number in range(60):
    path = cache.with_name(f"{name}{number}")
    path.touch()
    remember_sha256(path, cache, "0" * 64)
"""


def test_cache_that_two_processes_write_is_always_whole(tmp_path):
    """Two hosts may share it. An entry that the other one overwrites is computed again: the cache only saves time."""
    cache = tmp_path / ".hashes.json"
    cache.write_text("{}")
    running = [subprocess.Popen([sys.executable, "-c", WRITER, cache, name], cwd=ROOT) for name in ("a", "b")]
    reads = 0
    while any(process.poll() is None for process in running):
        assert isinstance(json.loads(cache.read_text()), dict)
        reads += 1
    assert [process.returncode for process in running] == [0, 0]
    assert reads > 10
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == [".hashes.json"]
