"""A small stage folder: write it, read it back."""

from pathlib import Path
from typing import Any

from tutor.artifacts.manifest import find_damage
from tutor.artifacts.stage_folder import writing


def make(folder: Path, text: str = "new", **fields: Any) -> None:
    """Write a stage folder with one file at its top and one below."""
    with writing(folder, "data", {"text": text, **fields}) as (out, results):
        (out / "top.txt").write_text(text)
        (out / "below").mkdir()
        (out / "below" / "file.txt").write_text(text)
        results["rows"] = 1


def content(folder: Path) -> str:
    """What `make` wrote, after a check that folder and manifest agree to the byte."""
    assert find_damage(folder, content=True) == []
    text = (folder / "top.txt").read_text()
    assert (folder / "below" / "file.txt").read_text() == text
    return text


def beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)
