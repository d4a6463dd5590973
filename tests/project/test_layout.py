"""The limits of CONTRIBUTING.md: size of folders, modules and functions; names, docstrings and the place of tests."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from support.processes.command import ROOT

FOLDER_NAMES = 12
"""Maximum number of files and folders in a folder of tutor/, without `__init__.py`."""
MODULE_LINES = 300
FUNCTION_LINES = 60
TEST_FILE_LINES = 500
TEST_NAME = 60
"""Maximum number of characters in a test's name."""
PACKAGE_DOCSTRING = 24
"""Maximum number of lines of a package's docstring: one screen."""
TUTOR, TESTS, SCRIPTS = ROOT / "tutor", ROOT / "tests", ROOT / "scripts"
CODE = [path for folder in (TUTOR, SCRIPTS) for path in sorted(folder.rglob("*.py"))]
MODULES = [path for path in sorted(TUTOR.rglob("*.py")) if path.name != "__init__.py"]
TEST_FILES = sorted(TESTS.rglob("test_*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[Function]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, Function):
            yield node


def test_folders_hold_at_most_twelve_names():
    """Counts what holds a file: an update leaves folders behind that hold only Python's cache."""
    files = [path for path in TUTOR.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    names = {path for file in files for path in (file, *file.parents) if TUTOR in path.parents}
    counts = Counter(relative(path.parent) for path in names if path.name != "__init__.py")
    assert {name: count for name, count in counts.items() if count > FOLDER_NAMES} == {}


def test_modules_and_test_files_are_short():
    limits = {**dict.fromkeys(CODE, MODULE_LINES), **dict.fromkeys(TESTS.rglob("*.py"), TEST_FILE_LINES)}
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in limits}
    assert {relative(path): lines[path] for path, limit in limits.items() if lines[path] > limit} == {}


def test_functions_are_short():
    lengths = {
        f"{relative(path)}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in CODE
        for node in functions(path)
    }
    assert {name: length for name, length in lengths.items() if length > FUNCTION_LINES} == {}


def test_packages_have_a_docstring_and_no_code():
    wrong = []
    for path in TUTOR.rglob("__init__.py"):
        tree = ast.parse(path.read_text("utf-8"))
        text = ast.get_docstring(tree) or ""
        if (
            len(text) < 80
            or len(text.splitlines()) > PACKAGE_DOCSTRING
            or (len(tree.body) > 1 and path.parent != TUTOR)
        ):
            wrong.append(relative(path))
    assert wrong == []


def test_docstrings_avoid_back_references_and_fragments():
    """A docstring that begins with "Of ..." or "The same ..." cannot be understood where it stands."""
    begins = re.compile(r"(Of|The same)\b")
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if begins.match(node.value.value.lstrip())
    ]
    assert found == []


def test_a_docstring_describes_one_constant():
    found = []
    for path in CODE:
        body = ast.parse(path.read_text("utf-8")).body
        for node, after in pairwise(body):
            text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if text and isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                found.append(f"{relative(path)}:{node.lineno}")
    assert found == []


def test_test_names_are_short_and_unique_in_their_file():
    names = {path: [node.name for node in functions(path) if node.name.startswith("test_")] for path in TEST_FILES}
    assert [name for found in names.values() for name in found if len(name) > TEST_NAME] == []
    doubled = {relative(path): name for path, found in names.items() for name, n in Counter(found).items() if n > 1}
    assert doubled == {}


def test_no_test_file_imports_another():
    pattern = re.compile(r"^\s*(from|import) (test_|tests\b|conftest)", re.MULTILINE)
    assert [relative(path) for path in TESTS.rglob("*.py") if pattern.search(path.read_text("utf-8"))] == []


def named_modules(test: Path) -> set[Path]:
    """Return the modules that a test file's docstring names, by a path below tutor/ or below its own folder there."""
    text = ast.get_docstring(ast.parse(test.read_text("utf-8"))) or ""
    names = [name.removeprefix("tutor/") for name in re.findall(r"[\w/]+\.py", text)]
    return {folder / name for name in names for folder in (TUTOR, TUTOR / test.parent.relative_to(TESTS))}


def test_every_module_has_a_test_file_or_is_named_in_one():
    """The test of tutor/a/b.py is tests/a/test_b.py, or the test file whose docstring names it."""
    named = {module for test in TEST_FILES for module in named_modules(test)}
    own = {TESTS / path.relative_to(TUTOR).parent / f"test_{path.name}": path for path in MODULES}
    assert [relative(path) for test, path in own.items() if not test.is_file() and path not in named] == []


def test_classes_have_one_name_each():
    names = Counter(
        node.name
        for path in MODULES
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []
