"""The build folder of a recipe: whose it is, that no input lies in it, and that one process writes it.

In: a recipe and the build folder. Out: the folder, locked, with the name of its recipe file in `.recipe.json`; a
RecipeError before anything is written where another recipe owns it or where a stage could delete an input. Makes no
stage's folder.
"""

import contextlib
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from tutor.artifacts.disk import read_json_object, write_json
from tutor.artifacts.layout import BuildFolder
from tutor.artifacts.lock import locked
from tutor.errors import HostError, RecipeError
from tutor.recipe.settings import Recipe

IN_STACK = "TUTOR_IN_STACK"
"""Environment variable of the services: there a recipe has another path, and `tutor stack` has compared it before."""


@contextlib.contextmanager
def held(recipe: Recipe, build: Path) -> Iterator[BuildFolder]:
    """Lock the folder of a recipe and record that it belongs to this recipe file.

    Raises LockError while another process holds it, and as `refuse_folder`.
    """
    refuse_folder(recipe, build)
    made = BuildFolder(build, recipe.name)
    with locked(made.path):
        _record_owner(recipe, made)
        _keep_private(recipe, made.path)
        yield made


def refuse_folder(recipe: Recipe, build: Path) -> None:
    """Raise RecipeError for a folder of another recipe, and for an input of this one that lies in the folder."""
    made = BuildFolder(build, recipe.name)
    owner = _owner(made)
    if owner is not None and recipe.path.is_file() and not owner.samefile(recipe.path):
        raise RecipeError(
            f"{made.path} belongs to {owner}, and {recipe.path} has its name",
            f"rename one, or delete its outputs: tutor clean --recipe {shlex.quote(str(owner))}",
        )
    folder = made.path.resolve()
    for what, path in _inputs(recipe):
        # A folder of inputs must not hold the outputs either: they would become inputs.
        if path.is_relative_to(folder) or (path.is_dir() and folder.is_relative_to(path)):
            inside = f"is in the build folder {folder}" if path.is_relative_to(folder) else f"holds {folder}"
            raise RecipeError(
                f"{what} of {recipe.path} {inside}: {path}", "move it, or give another --build: outputs are replaced"
            )


def refuse_unreadable(recipe: Recipe, uid: int) -> None:
    """Raise HostError for an input file that another user, whom services run as, cannot read."""
    for _, path in _inputs(recipe):
        with contextlib.suppress(OSError):
            found = path.stat()
            needed = stat.S_IRUSR if found.st_uid == uid else stat.S_IROTH
            if stat.S_ISREG(found.st_mode) and not found.st_mode & needed:
                raise HostError(
                    f"{path} cannot be read by uid {uid}, whom the services of root run as",
                    f"chmod o+r {shlex.quote(str(path))}, or run as a user who is not root",
                )


def _owner(made: BuildFolder) -> Path | None:
    """The recipe file that a folder belongs to; None where it is gone (moved, or renamed) or was never recorded.

    It is recorded relative to the folder, so that a project can be moved or copied as a whole.
    """
    recorded = (read_json_object(made.owner) or {}).get("recipe")
    if not isinstance(recorded, str) or "\0" in recorded or os.environ.get(IN_STACK):
        return None
    try:
        folder = made.path.resolve()
        if Path(recorded).parts.count("..") >= len(folder.parts):  # of a deeper folder that was moved here
            return None
        owner = (folder / recorded).resolve()
        return owner if owner.is_file() else None
    except (OSError, RuntimeError):  # no path, or a loop of links
        return None


def _record_owner(recipe: Recipe, made: BuildFolder) -> None:
    """Write which recipe file owns a folder, unless the file names it already."""
    if os.environ.get(IN_STACK) or not recipe.path.is_file() or _owner(made) is not None:
        return
    # Only the refusal needs this file: `tutor clean` must work on a full disk.
    with contextlib.suppress(OSError):
        write_json(made.owner, {"recipe": os.path.relpath(recipe.path, made.path.resolve())})


def _inputs(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """The files and folders that a recipe names, where links lead, and the setting of each."""
    yield "the file", recipe.path
    named = {
        "data.train": recipe.data.train,
        "data.eval": recipe.data.eval,
        "evaluate.paraphrases": recipe.evaluate.paraphrases,
        "evaluate.general": recipe.evaluate.general,
        "base.source": recipe.base.source.removeprefix("path:") if recipe.base.source.startswith("path:") else "",
    }
    for what, name in named.items():
        if not name:
            continue
        path = recipe.resolve(name)
        yield what, path
        if what == "base.source" and path.is_dir():
            yield from ((what, file.resolve()) for file in path.iterdir() if file.is_symlink())


def _keep_private(recipe: Recipe, folder: Path) -> None:
    """Close a folder to the users who cannot read the recipe's rows: stages copy them."""
    closed = 0
    for name in filter(None, (recipe.data.train, recipe.data.eval)):
        with contextlib.suppress(OSError):
            mode = recipe.resolve(name).stat().st_mode
            closed |= (0 if mode & stat.S_IRGRP else 0o070) | (0 if mode & stat.S_IROTH else 0o007)
    with contextlib.suppress(OSError):  # another user's folder, or a file system without permissions
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode & closed:
            folder.chmod(mode & ~closed)
