"""The repository's own references: every Markdown file that a tracked file names, and every numbered fact, exists."""

import re
import subprocess
from pathlib import Path, PurePosixPath

import pytest
from support.processes.command import ROOT

MARKDOWN = re.compile(r"(?<![\w/.*{}<>-])((?:[\w.-]+/)*[\w-]+\.md)\b")
PATH = re.compile(r"(?<![\w/.<>*-])((?:tutor|tests|scripts|docs|data|docker|requirements)/[\w./-]*\w)(?![\w<*/])")
FACT = re.compile(r"docs/facts\.md, (\d+(?:(?:, | and )\d+)*)")
MADE = {"report/README.md"}
"""Markdown files that commands make in a build folder."""


def tracked() -> list[Path]:
    """Return the text files that git tracks; skips where this is no checkout."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def named(pattern: re.Pattern[str]) -> dict[str, set[str]]:
    """Return what the pattern finds in the tracked files, with the files that contain it."""
    found: dict[str, set[str]] = {}
    for path in tracked():
        for text in pattern.findall(path.read_text("utf-8", "replace")):
            found.setdefault(text, set()).add(str(path.relative_to(ROOT)))
    return found


def test_markdown_files_named_in_tracked_files_exist() -> None:
    files = {str(path.relative_to(ROOT)) for path in tracked()}
    names = {PurePosixPath(path).name for path in files}
    missing = {
        name: where
        for name, where in named(MARKDOWN).items()
        if name not in files | MADE and not ("/" not in name and name in names)
    }
    assert missing == {}


def test_paths_named_in_markdown_files_exist() -> None:
    files = {path.relative_to(ROOT) for path in tracked()}
    known = {str(path) for path in files} | {str(parent) for path in files for parent in path.parents}
    cited = {name: where for name, files in named(PATH).items() if (where := {f for f in files if f.endswith(".md")})}
    assert "data/demo.toml" in cited
    assert {name: where for name, where in cited.items() if name not in known} == {}


def test_facts_named_in_tracked_files_exist() -> None:
    headings = set(re.findall(r"^## (\d+)\. ", (ROOT / "docs" / "facts.md").read_text("utf-8"), re.MULTILINE))
    cited = named(FACT)
    assert cited
    missing = {text: where for text, where in cited.items() if not set(re.findall(r"\d+", text)) <= headings}
    assert missing == {}
