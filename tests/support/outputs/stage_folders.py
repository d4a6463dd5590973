"""A small stage folder: write it, read it back."""

from pathlib import Path
from typing import Any

from tutor.artifacts.manifest import find_damage
from tutor.artifacts.stage_folder import writing


def write_stage(folder: Path, text: str = "new", **fields: Any) -> None:
    """Write a stage folder with one file at its top and one below."""
    with writing(folder, "data", {"text": text, **fields}) as (out, results):
        (out / "top.txt").write_text(text)
        (out / "below").mkdir()
        (out / "below" / "file.txt").write_text(text)
        results["rows"] = 1


def read_stage(folder: Path) -> str:
    """Check that a folder of `write_stage` agrees with its manifest to the byte; return its text."""
    assert find_damage(folder, content=True) == []
    text = (folder / "top.txt").read_text()
    assert (folder / "below" / "file.txt").read_text() == text
    return text


def names_beside(folder: Path) -> list[str]:
    """Return the names of all other files and folders in the parent folder."""
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)
