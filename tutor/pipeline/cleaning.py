"""Remove what the stages of a recipe made, and nothing else.

In: a recipe, its build folder, names of stages. Out: the removed paths, and the paths that look like outputs and are
not recognised as tutor's, which stay. A folder is recognised by its manifest, a log folder by its files' names. Follows
no link.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tutor.artifacts.disk import remove
from tutor.artifacts.layout import BuildFolder
from tutor.artifacts.manifest import MANIFEST, is_ours
from tutor.artifacts.stage_folder import CHECKPOINTS, LOG, OLD, PARTIAL, is_log
from tutor.errors import RecipeError
from tutor.pipeline.recipe_folder import held
from tutor.pipeline.registry import BY_NAME
from tutor.recipe.settings import Recipe

SCRATCH = (PARTIAL, OLD, CHECKPOINTS)
"""Suffixes of folders that a killed run leaves; no other program uses them on these names."""


@dataclass(frozen=True)
class Cleaned:
    """What `tutor clean` did."""

    removed: list[Path]
    left: dict[Path, str]  # path -> why it was not removed


def clean(recipe: Recipe, build: Path, names: tuple[str, ...]) -> Cleaned:
    """Remove the folders of the named stages, or of all stages. Raises RecipeError for an unknown stage."""
    if unknown := [name for name in names if name not in BY_NAME]:
        raise RecipeError(f"no stage {unknown[0]!r}; known: {', '.join(BY_NAME)}")
    cleaned = Cleaned([], {})
    with held(recipe, build) as made:
        for name in names or BY_NAME:
            for path in _outputs(made, name):
                if why := _not_ours(path):
                    cleaned.left[path] = why
                else:
                    remove(path)
                    cleaned.removed.append(path)
        if not any(made.stage(name).exists() for name in BY_NAME):
            made.owner.unlink(missing_ok=True)  # another recipe of this name may use the folder
    return cleaned


def _outputs(made: BuildFolder, stage: str) -> Iterator[Path]:
    """The existing paths that bear the name of a stage's output, or of what a command derived from it."""
    folder, derived = made.stage(stage), BY_NAME[stage].derived
    found = [folder, *(sorted(made.path.glob(derived)) if derived else ())]
    found += [folder.with_name(folder.name + end) for end in (*SCRATCH, LOG)]
    yield from (path for path in dict.fromkeys(found) if path.exists() or path.is_symlink())


def _not_ours(path: Path) -> str:
    """Why a path is not recognised as tutor's; empty for one that is."""
    if path.name.endswith(LOG):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if not file.is_dir()]
        other = [file.name for file in files if not is_log(file.name)]
        return f"tutor writes no {other[0]}" if other else ""
    if not path.is_dir():
        return "it is a file" if path.exists() else "it is a link to nothing"
    if path.name.endswith(SCRATCH) or not any(path.iterdir()) or is_ours(path):
        return ""
    return f"its {MANIFEST} is not tutor's" if (path / MANIFEST).exists() else f"it has no {MANIFEST}"
