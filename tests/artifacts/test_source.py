"""What is read of a Python file: its imports, the file names in it, and a hash of what it does."""

import json
import os
from pathlib import Path

import pytest

from tutor.artifacts import hashing, source
from tutor.artifacts.hashing import file_state
from tutor.artifacts.source import SourceReader, code_tokens, read_source
from tutor.errors import ArtifactError

TEXT = '''"""Words."""

import os
from tutor.formats import html
from tutor.errors import ArtifactError as Fault, HostError

LIMIT = 3
"""Number of tries."""


def run(value: int) -> str:
    """Words."""
    from tutor.prompt import (
        shown,
    )
    # a comment
    if value > LIMIT:  # another
        raise Fault(f"{value!r:>{LIMIT}} of {'x' + f'{os.sep}'}")
    return shown("page.css")
'''
PLAIN = """from tutor.elsewhere import HostError
from tutor.elsewhere import shown, ArtifactError as Fault
from tutor import html
import os
LIMIT = 3
def run(value: int) -> str:
    if value > LIMIT:
        raise Fault(f"{value!r:>{LIMIT}} of {'x' + f'{os.sep}'}")
    return shown("page.css")
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "module.py"
    path.write_text(text, "utf-8")
    return path


def test_code_tokens_leave_out_words_layout_and_paths_of_imports() -> None:
    assert code_tokens(TEXT) == code_tokens(PLAIN)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("LIMIT = 3", "LIMIT = 4"),
        ("value > LIMIT", "value >= LIMIT"),
        ('"page.css"', "'page.css'"),
        ("{value!r:", "{value!s:"),
        ("as Fault", "as Error"),
        ("    return shown", "return shown"),
        ("import os\n", "import os.path\n"),
        ("        raise", "        1; raise"),
    ],
)
def test_code_tokens_hold_everything_that_runs(before: str, after: str) -> None:
    assert before in TEXT
    assert code_tokens(TEXT.replace(before, after)) != code_tokens(TEXT)


def test_read_source_of_words_alone_has_no_content(tmp_path: Path) -> None:
    assert read_source(written(tmp_path, '"""Words."""\n# more\n')).content == ""


def test_read_source_finds_imports_and_file_names(tmp_path: Path) -> None:
    text = TEXT + "\nif TYPE_CHECKING:\n    import torch\nelse:\n    import numpy.random\n"
    found = read_source(written(tmp_path, text))
    assert found.imports == (
        *("numpy.random", "tutor.errors.ArtifactError", "tutor.errors.HostError"),
        *("tutor.formats.html", "tutor.prompt.shown"),
    )
    assert found.names == ("page.css",)


@pytest.mark.parametrize("text", ["def run(:\n", "x = '''\n", "\0"])
def test_read_source_of_no_python_raises_with_the_file(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ArtifactError, match=f"cannot read {path}"):
        read_source(path)


# The cache


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read; nothing is remembered by this process."""
    read: list[Path] = []
    source._source_in_state.cache_clear()
    monkeypatch.setattr(hashing, "SETTLED_NS", 0)  # the files of these tests are new
    monkeypatch.setattr(source, "read_source", lambda path: (read.append(path), read_source(path))[1])
    return read


def read_with(cache: Path, path: Path) -> str:
    source._source_in_state.cache_clear()
    reader = SourceReader(cache)
    found = reader.source(path)
    reader.remember()
    return found.content


def test_reader_reads_a_file_again_only_when_it_changed(tmp_path: Path, counted: list[Path]) -> None:
    path, cache = written(tmp_path, "A = 1\n"), tmp_path / ".hashes.json"
    cache.write_text('{"/a": {"seen": "1", "sha256": "2"}}')
    first = read_with(cache, path)
    assert read_with(cache, path) == first
    assert counted == [path]
    path.write_text("A = 22\n")
    assert read_with(cache, path) != first
    assert counted == [path, path]
    assert json.loads(cache.read_text())["/a"] == {"seen": "1", "sha256": "2"}


@pytest.mark.parametrize("content", ["", "[]", '{"sources": 1}', '{"sources": {"reader": "old", "files": {}}}'])
def test_reader_ignores_a_cache_that_it_did_not_write(tmp_path: Path, counted: list[Path], content: str) -> None:
    path, cache = written(tmp_path, "A = 1\n"), tmp_path / ".hashes.json"
    cache.write_text(content)
    for _ in range(2):
        assert read_with(cache, path) == read_source(path).content
    assert counted == [path]


def test_reader_works_where_the_cache_cannot_be_written(tmp_path: Path, counted: list[Path]) -> None:
    path = written(tmp_path, "A = 1\n")
    (tmp_path / "file").touch()
    assert read_with(tmp_path / "file" / "cache.json", path)
    assert counted == [path]


def test_reader_remembers_within_a_process(tmp_path: Path, counted: list[Path]) -> None:
    path = written(tmp_path, "A = 1\n")
    for _ in range(2):
        SourceReader().source(path)
    assert counted == [path]
    os.utime(path, ns=(1, 1))
    assert file_state(path).split("-")[1] == "1"
    SourceReader().source(path)
    assert counted == [path, path]
