"""Check and write a file that the user names, never over a file that the command reads or over one of another kind.

In: the name, the command's input files, a text. Out: the file, whole or unchanged. Does not choose names.
"""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from tutor.artifacts.disk import write_whole
from tutor.errors import RecipeError

DOCTYPE = b"<!doctype html>"
"""Beginning of every page that tutor writes."""


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Raise RecipeError where the path, by any name or link, is an input or another file than a page.

    Call it before the work.
    """
    _refuse_input(path, inputs)
    with contextlib.suppress(OSError):  # there is none yet, or it cannot be read: write_output says so
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                begins = file.read(len(DOCTYPE))
            if begins.lower() != DOCTYPE:
                raise RecipeError(f"{path} is no HTML page: it would be lost", "name another file to write")


def check_rows_output(path: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Raise RecipeError where rows cannot be written to the path: it is an input, or without `force` not empty.

    Call it before the work.
    """
    _refuse_input(path, inputs)
    if not path.parent.is_dir():
        raise RecipeError(f"{path.parent} is no folder", "make it, or name a file in another one")
    if not os.access(path.parent, os.W_OK):
        raise RecipeError(f"{path.parent} cannot be written", "name a file in a folder that can be written")
    if path.exists() and not path.is_file():
        raise RecipeError(f"{path} is no file", "name a file to write")
    if path.is_file() and path.stat().st_size and not force:
        raise RecipeError(f"{path} exists: it would be lost", "name another file, or add --force")


def _refuse_input(path: Path, inputs: Iterable[Path]) -> None:
    for each in inputs:
        with contextlib.suppress(OSError, ValueError):  # one of them does not exist
            if path.samefile(each):
                raise RecipeError(f"{path} is {each}, an input: it would be lost", "name another file to write")


def write_output(path: Path, text: str) -> None:
    """Write the text, or leave what is there. Raises RecipeError where it cannot be written."""
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            target.write_text(text, "utf-8")  # a pipe or a device
            return
        write_whole(target, text.encode())
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, in Python 3.12 and older
        reason = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(
            f"{path} cannot be written: {reason}", "name a file in a folder that can be written"
        ) from None
