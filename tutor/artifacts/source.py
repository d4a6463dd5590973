"""What a Python file imports, which file names it holds, and a hash of what it does.

In: a file. Out: a Source. Comments, docstrings, line breaks, the paths of imported modules and the Python version that
reads the file do not change the hash. Imports nothing that the file imports.
"""

import ast
import contextlib
import functools
import hashlib
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json_object, write_json
from tutor.artifacts.hashing import file_state, is_settled
from tutor.errors import ArtifactError

FILE_NAME = re.compile(r"[\w-][\w.-]*\.\w+")
CACHE_KEY = "sources"
"""Key of the cache file under which the sources are remembered."""
PACKAGE = __name__.partition(".")[0]
IGNORED = frozenset({"ENCODING", "COMMENT", "NL", "ENDMARKER"})
MARKS = {"NEWLINE": "\n", "INDENT": "\t", "DEDENT": "\b"}
"""Tokens that count by their kind: their text differs by formatting or by the Python version."""


@dataclass(frozen=True)
class Source:
    """A Python file, as far as it decides a result."""

    content: str  # 16 hex digits of sha256 over the tokens; "" for a file of comments and docstrings alone
    imports: tuple[str, ...]  # dotted names beyond the standard library; relative ones begin with dots
    names: tuple[str, ...]  # strings that can be file names


@functools.lru_cache(maxsize=1024)
def _source_in_state(path: Path, state: str) -> Source:
    """The source of a file in this state, read once a process: a run looks at the sources after every stage."""
    del state
    return read_source(path)


def read_source(path: Path) -> Source:
    """Read a file. Raises ArtifactError when this interpreter cannot parse it."""
    try:
        text = path.read_text("utf-8")
        tree = ast.parse(text)
        tokens = code_tokens(text)
    except (OSError, ValueError, SyntaxError, tokenize.TokenError) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from None
    content = hashlib.sha256("\0".join(tokens).encode("utf-8", "surrogatepass")).hexdigest()[:16] if tokens else ""
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    names = {text for text in strings if len(text) <= 80 and FILE_NAME.fullmatch(text)}
    return Source(
        content,
        tuple(sorted({name for name in imports(tree) if name.partition(".")[0] not in sys.stdlib_module_names})),
        tuple(sorted(names)),
    )


def imports(node: ast.AST) -> Iterator[str]:
    """The dotted names of all imports below a node, inside functions too; those for type checkers alone left out."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        start = "." * node.level + (f"{node.module}." if node.module else "")
        yield from (start + alias.name for alias in node.names)
    else:
        is_for_types = isinstance(node, ast.If) and _is_type_checking(node.test)
        for child in node.orelse if isinstance(node, ast.If) and is_for_types else ast.iter_child_nodes(node):
            yield from imports(child)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else test.id if isinstance(test, ast.Name) else ""
    return name == "TYPE_CHECKING"


def code_tokens(text: str) -> list[str]:
    """The tokens of a file without comments and strings that are a statement of their own.

    Of imports from this package the names alone, sorted, behind all others: from which module is a question of paths.
    """
    tokens: list[str] = []
    names: set[str] = set()
    for statement, only_strings in _statements(text):
        if statement[:1] == ["from"] and statement[1] in (PACKAGE, ".", "..", "..."):
            names |= _imported_names(statement)
        elif not only_strings:
            tokens += statement
    return [*tokens, *sorted(names)]


def _statements(text: str) -> Iterator[tuple[list[str], bool]]:
    """The tokens of each statement, and whether they are strings alone; a change of indentation is one, too."""
    statement: list[str] = []
    only_strings = True
    for kind, token in _tokens(text):
        if kind not in MARKS:
            statement.append(token)
            only_strings &= kind == "STRING"
            continue
        if statement:
            yield [*statement, MARKS["NEWLINE"]], only_strings
        if kind != "NEWLINE":
            yield [MARKS[kind]], False
        statement, only_strings = [], True


def _imported_names(statement: list[str]) -> set[str]:
    """The names that `from ... import` binds, each with its alias."""
    names = [token for token in statement[statement.index("import") + 1 : -1] if token not in ("(", ")")]
    return {f"import {name.strip()}" for name in " ".join(names).split(",") if name.strip()}


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """Kind and text of each token; an f-string is one token, as before Python 3.12."""
    lines = text.splitlines(keepends=True)
    start, depth = (0, 0), 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("FSTRING_START", "TSTRING_START"):
            start, depth = (start if depth else token.start), depth + 1
        elif kind in ("FSTRING_END", "TSTRING_END"):
            depth -= 1
            if not depth:
                yield "FSTRING", _between(lines, start, token.end)
        elif not depth and kind not in IGNORED:
            is_format = kind == "STRING" and "f" in token.string[:2].lower().partition(token.string[-1])[0]
            yield "FSTRING" if is_format else kind, token.string


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return "".join([lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]])


class SourceReader:
    """Reads each source once; one that a cache file or this process remembers, only when the file changed since."""

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache
        self._kept: dict[str, dict[str, Any]] | None = None
        self._new: dict[str, dict[str, Any]] = {}
        self._read: dict[Path, Source] = {}

    def source(self, path: Path) -> Source:
        """What a file holds. Raises ArtifactError for a file that cannot be read."""
        if path not in self._read:
            state = file_state(path)
            found = self._find(path, state)
            if found is None:
                found = _source_in_state(path, state)
                if is_settled(path):
                    self._new[str(path)] = {"seen": state, **asdict(found)}
            self._read[path] = found
        return self._read[path]

    def _find(self, path: Path, state: str) -> Source | None:
        """The source as the cache file remembers it."""
        if self._kept is None:
            self._kept = _cached(self._cache)
        entry = self._kept.get(str(path))
        with contextlib.suppress(KeyError, TypeError):  # a damaged cache
            if entry is not None and entry["seen"] == state:
                return Source(str(entry["content"]), tuple(entry["imports"]), tuple(entry["names"]))
        return None

    def remember(self) -> None:
        """Add what was read to the cache file, where it can be written: it only saves time."""
        if self._cache is None or not self._new:
            return
        with contextlib.suppress(OSError):
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            whole = read_json_object(self._cache) or {}
            files = {**_cached(self._cache), **self._new}
            write_json(self._cache, {**whole, CACHE_KEY: {"reader": file_state(Path(__file__)), "files": files}})
            self._new = {}


def _cached(cache: Path | None) -> dict[str, dict[str, Any]]:
    """The sources of a cache file, as far as this version of the reader wrote them."""
    kept = (read_json_object(cache) or {}).get(CACHE_KEY) if cache else None
    if (
        isinstance(kept, dict)
        and kept.get("reader") == file_state(Path(__file__))
        and isinstance(kept.get("files"), dict)
    ):
        return dict(kept["files"])
    return {}
