"""What a GGUF says of where it comes from: hashes of data, recipe, base, adapter and merged weights, and the tools.

In: the stages' folders and the recipe. Out: key-values `tutor.*` for the converter, the same from two identical runs:
no times, no names, no paths but what base.source says. tutor/serving/verify.py computes them again.
"""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from tutor.artifacts.hashing import file_sha256, json_sha256
from tutor.artifacts.manifest import read_manifest
from tutor.engines.llamacpp.build import VERSION, build_key
from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import WEIGHTS, read_facts

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

PREFIX = "tutor."
TOOLS = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "gguf")
"""The packages whose versions a file names: those that had a hand in its numbers."""
TELLING = {"logging_steps", "save_steps", "save_minutes"}
"""Settings of training that leave the weights as they are."""
SOFTWARE = ("version", "tools", "llama.cpp")
"""The keys that say what it was made with, where another machine may well have something else."""


def recipe_hash(recipe: "Recipe") -> str:
    """sha256 over the settings that decide the weights: the split, the base, training, seed and system text.

    Not over paths, nor what only tells or serves.
    """
    data = recipe.data.model_dump(exclude={"train", "eval", "prompts"})
    train = recipe.train.model_dump(exclude=TELLING)
    parts = {"data": data, "base": recipe.base.model_dump(), "train": train}
    return json_sha256({**parts, "seed": recipe.seed, "system": recipe.system})


def weights_hash(model: Path) -> str:
    """sha256 over the names and contents of a folder's weight files. Raises ArtifactError where there are none."""
    files = sorted(model.glob(WEIGHTS))
    if not files:
        raise ArtifactError(f"{model} holds no {WEIGHTS}")
    return json_sha256({path.name: file_sha256(path) for path in files})


def _noted_hash(folder: Path) -> str:
    """The same of a stage's folder, from its manifest where it has one: 16 GB were hashed when they were written."""
    manifest = read_manifest(folder)
    if manifest is None:
        return weights_hash(folder)
    outputs = manifest.outputs.items()
    return json_sha256(
        {name: entry["sha256"] for name, entry in outputs if PurePath(name).match(WEIGHTS) and "/" not in name}
    )


def base_lineage(base: Path) -> dict[str, str]:
    """What the untuned base's GGUF says."""
    facts, _ = read_facts(base)
    return {"base": facts.source, "base.sha256": facts.weights, **software()}


def adapter_lineage(recipe: "Recipe", inputs: Mapping[str, Path]) -> dict[str, str]:
    """What the adapter's GGUF says; `inputs` are the folders of data, base and train."""
    return {
        "data.sha256": file_sha256(inputs["data"] / "train.jsonl"),
        "recipe.sha256": recipe_hash(recipe),
        "adapter.sha256": _noted_hash(inputs["train"]),
        **base_lineage(inputs["base"]),
    }


def tutor_lineage(recipe: "Recipe", inputs: Mapping[str, Path]) -> dict[str, str]:
    """What the tutor's GGUF says: what the adapter's does, and the merged weights; `inputs` has merge besides."""
    return {**adapter_lineage(recipe, inputs), "merged.sha256": _noted_hash(inputs["merge"])}


def software() -> dict[str, str]:
    """This program, the packages in TOOLS and llama.cpp, with their versions."""
    tools = ", ".join(f"{name} {_version(name)}" for name in TOOLS)
    llamacpp = f"of llama_cpp_python {VERSION}, build {build_key()}"
    return {"version": _version("tutor"), "tools": tools, "llama.cpp": llamacpp}


def keyed(lineage: Mapping[str, str]) -> dict[str, str]:
    """The key-values as the file has them."""
    return {PREFIX + name: value for name, value in lineage.items()}


def lineage_of(fields: Mapping[str, object]) -> dict[str, str]:
    """A file's (or a server's) key-values that are ours, without the prefix."""
    return {name.removeprefix(PREFIX): str(value) for name, value in fields.items() if name.startswith(PREFIX)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
