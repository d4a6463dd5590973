"""Where a base comes from: the kinds of `base.source`, the files that each names, the hub's cache.

In: a recipe. Out: paths. Fetches nothing, and imports no package that carries a model.
"""

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tutor.errors import ArtifactError, HostError, RecipeError
from tutor.formats.models.safetensors import WEIGHTS

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

HUB = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")
PACKAGE = re.compile(r"package:(?P<module>\w+)/(?P<file>[\w.-]+\.gguf)")
KNOWN = "known: hub:OWNER/NAME@40-HEX-REVISION, path:FOLDER, package:MODULE/FILE.gguf, tiny"


def input_files(recipe: "Recipe") -> dict[str, Path]:
    """The files outside `build/` whose content decides what this stage makes."""
    source = recipe.base.source
    if source == "tiny":
        return {"text": recipe.resolve(recipe.data.train)}
    if found := PACKAGE.fullmatch(source):
        return {"gguf": package_file(found["module"], found["file"])}
    if source.startswith("path:"):
        folder = local_folder(recipe, source)
        return {path.name: path for pattern in (WEIGHTS, "*.json", "*.jinja") for path in sorted(folder.glob(pattern))}
    return {}


def local_folder(recipe: "Recipe", source: str) -> Path:
    """The folder of a `path:` source. Raises RecipeError for a source of no known kind, or where it is no folder."""
    kind, _, rest = source.partition(":")
    if kind != "path" or not rest:
        raise RecipeError(f"{recipe.path}: base.source is {source!r}", KNOWN)
    folder = recipe.resolve(rest)
    if not folder.is_dir():
        raise RecipeError(f"{recipe.path}: base.source names {folder}, which is not a folder")
    return folder


def package_file(module: str, name: str) -> Path:
    """A file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise HostError(f"the package {module} is not installed", "make install (requirements/demo.txt brings it)")
    path = Path(spec.origin).parent / name
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", f"install {module} again")
    return path


def hub_snapshot(source: str) -> Path | None:
    """Where the hub's cache keeps this revision, there or not; None for another source."""
    found = HUB.fullmatch(source)
    return (
        hub_cache() / f"models--{found['repo'].replace('/', '--')}" / "snapshots" / found["revision"] if found else None
    )


def hub_cache() -> Path:
    """The hub's cache, by the variables that huggingface_hub reads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
