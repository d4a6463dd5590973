"""Run the stages; where one cannot read its inputs, make the damaged ones again and go on.

In: a recipe and a build folder. Out: as runner.run_all. A folder is taken for whole by the size of its files: their
content is compared only here, after a stage has failed. Runs no stage itself.
"""

import logging
from pathlib import Path

from tutor.artifacts.disk import remove
from tutor.artifacts.manifest import inspect_folder
from tutor.errors import ArtifactError
from tutor.pipeline import runner
from tutor.pipeline.recipe_folder import held
from tutor.pipeline.registry import BY_NAME
from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)


def run_all(recipe: Recipe, build: Path, *, until: str | None = None) -> list[str]:
    """Run the stages that are not up to date; return their names. Raises as runner.run_all."""
    try:
        return runner.run_all(recipe, build, until=until)
    except ArtifactError:
        if not _remove_damaged(recipe, build):
            raise
    return runner.run_all(recipe, build, until=until)


def _remove_damaged(recipe: Recipe, build: Path) -> bool:
    """Remove the stage folders with other content than their manifests; return whether there was any."""
    damaged = False
    with held(recipe, build) as made:
        for folder in map(made.stage, BY_NAME):
            manifest, problems = inspect_folder(folder, content=True)
            if manifest and problems:
                log.warning("%s: making %s again", problems[0], folder)
                remove(folder)
                damaged = True
    return damaged
