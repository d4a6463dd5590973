"""Hashes of values and files, remembered while a file's size, mtime and inode stay."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.json_values import json_values

from tutor.artifacts.disk import write_json
from tutor.artifacts.hashing import cached_sha256, file_sha256, json_sha256
from tutor.errors import ArtifactError


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
    stat = file.stat()
    seen = f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"
    cache.write_text(text.replace("FILE", str(file)).replace("SEEN", seen))
    assert cached_sha256(file, cache) == file_sha256(file)
    assert file_sha256(file) in cache.read_text()


def test_file_sha256_of_an_unreadable_file_raises(tmp_path):
    with pytest.raises(ArtifactError, match="cannot read"):
        file_sha256(tmp_path)
