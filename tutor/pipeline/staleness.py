"""Find inputs of finished stages that were edited since: the recipe, the user's files, the stages before.

In: a recipe, its build folder, names of stages. Out: one line an edited input. Code and versions of packages are left
out: they differ between the containers of one stack. `tutor status` (runner.py) counts them too. Runs no stage.
"""

import json
import logging
from collections.abc import Collection
from pathlib import Path

from tutor.artifacts.hashing import cached_sha256
from tutor.artifacts.layout import BuildFolder
from tutor.artifacts.manifest import read_manifest
from tutor.errors import TutorError
from tutor.pipeline.registry import BY_NAME, Stage
from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)


def edited_inputs(recipe: Recipe, build: Path, names: Collection[str]) -> list[str]:
    """Return a line for each input of the named stages, and of those that they need, that was edited since.

    A stage whose folder was removed has no line, and an input that cannot be read here a message in the log.
    """
    made = BuildFolder(build, recipe.name)
    wanted = set().union(*map(with_needs, names))
    manifests = {name: read_manifest(made.stage(name)) for name in wanted}
    lines = []
    for name in (name for name in BY_NAME if name in wanted):
        if (manifest := manifests[name]) is None:
            continue
        stage = BY_NAME[name]
        # As JSON, which the manifest is: it has no tuples.
        fields = json.loads(json.dumps(stage.recipe_fields(recipe))) | _readable_files(stage, recipe, made)
        # A stage that reads more than it did when its folder was made has other code.
        known = {need: manifests[need] for need in stage.needs if f"input.{need}" in manifest.fields}
        fields |= {f"input.{need}": found.fingerprint for need, found in known.items() if found}
        lines += [f"{name} was made of another {field}" for field in manifest.other_fields(fields)]
    return lines


def with_needs(name: str) -> set[str]:
    """Return a stage and the stages that it depends on; the fault of any other must not stop it."""
    return {name}.union(*map(with_needs, BY_NAME[name].needs))


def file_fields(stage: Stage, recipe: Recipe, made: BuildFolder) -> dict[str, str]:
    """Return the hashes of the user's files that a stage reads, as key fields. Raises ArtifactError."""
    return {f"file.{name}": cached_sha256(path, made.hashes) for name, path in stage.files(recipe).items()}


def _readable_files(stage: Stage, recipe: Recipe, made: BuildFolder) -> dict[str, str]:
    try:
        return file_fields(stage, recipe, made)
    except TutorError as error:
        log.info("the inputs of %s cannot be compared with those that it was made of: %s", stage.name, error.message)
        return {}
