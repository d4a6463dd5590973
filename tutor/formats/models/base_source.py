"""Sources of a base model: the files that each `base.source` names, the hub's cache.

In: a recipe. Out: paths. Fetches nothing, and does not import a package that carries a model.
"""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tutor.errors import ArtifactError, HostError, RecipeError
from tutor.formats.models.safetensors import WEIGHTS, weight_files
from tutor.recipe.values import HUB, PACKAGE

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

LOCAL = "local:"
"""Beginning of the public name of a `path:` source."""


def source_files(recipe: "Recipe") -> dict[str, Path]:
    """Return the files outside `build/` whose content decides what the base stage makes."""
    source = recipe.base.source
    if source == "tiny":
        return {"text": recipe.resolve(recipe.data.train)}
    if found := PACKAGE.fullmatch(source):
        return {"gguf": package_file(found["module"], found["file"])}
    if source.startswith("path:"):
        folder = local_folder(recipe, source)
        patterns = ("*.json", "*.jinja", "tokenizer.model")
        read = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
        return {path.name: path for path in (*_weights(folder), *read)}
    return {}


def public_source(source: str, weights: str) -> str:
    """Return a source for files that are given to others: a folder of this machine by the hash of its weights."""
    return f"{LOCAL}{weights[:12]}" if source.startswith("path:") else source


def _weights(folder: Path) -> list[Path]:
    """The weight files that count; all of a folder that the base stage will refuse."""
    try:
        return weight_files(folder)
    except ArtifactError:
        return sorted(folder.glob(WEIGHTS))


def local_folder(recipe: "Recipe", source: str) -> Path:
    """Return the folder of a `path:` source. Raises RecipeError where it is none."""
    folder = recipe.resolve(source.removeprefix("path:"))
    if not folder.is_dir():
        raise RecipeError(f"{recipe.path}: base.source names {folder}, which is not a folder")
    return folder


def package_file(module: str, name: str) -> Path:
    """Return the path of a file in an installed package, found without importing the package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise HostError(f"the package {module} is not installed", "make install (requirements/demo.txt brings it)")
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", f"install {module} again")
    return path


def hub_snapshot(source: str) -> Path | None:
    """Return the folder of this revision in the hub's cache, existing or not; None for a source of another kind."""
    found = HUB.fullmatch(source)
    if found is None:
        return None
    return hub_cache() / f"models--{found['repo'].replace('/', '--')}" / "snapshots" / found["revision"]


def hub_cache() -> Path:
    """Return the hub's cache folder, by the environment variables that huggingface_hub reads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
