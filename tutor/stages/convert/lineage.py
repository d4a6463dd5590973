"""The origin of a GGUF file: hashes of data, recipe, base, adapter and merged weights, and versions of the software.

In: the stages' folders and the recipe. Out: key-values `tutor.*` for the converter. Two identical runs give equal
values: no times, no names, no paths. tutor/serving/verify.py computes them again.
"""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from tutor.artifacts.hashing import file_sha256, json_sha256
from tutor.artifacts.manifest import read_manifest
from tutor.artifacts.provenance import version_text
from tutor.engines.llamacpp.build import VERSION, build_key
from tutor.formats.models.base_source import public_source
from tutor.formats.models.model_folder import read_facts
from tutor.formats.models.safetensors import WEIGHTS, weight_files
from tutor.formats.rows.split_files import TRAIN

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

PREFIX = "tutor."
"""Prefix of the keys in a GGUF file."""
TOOLS = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "gguf")
"""Packages that took part in the computation of the weights; their versions are in the file."""
NEUTRAL_SETTINGS = {"logging_steps", "report_to", "save_steps", "save_minutes"}
"""Settings of [train] that do not change the weights."""
SOFTWARE_KEYS = ("version", "tools", "llama.cpp")
"""Keys of the software versions, which may differ on another machine."""


def recipe_hash(recipe: "Recipe") -> str:
    """Return the sha256 of the settings that the weights depend on: split, base, training, seed, system text.

    Paths and settings of logging, conversion and serving are left out.
    """
    data = recipe.data.model_dump(exclude={"train", "eval", "prompts"})
    train = recipe.train.model_dump(exclude=NEUTRAL_SETTINGS)
    parts = {"data": data, "base": recipe.base.model_dump(), "train": train}
    return json_sha256({**parts, "seed": recipe.seed, "system": recipe.system})


def weights_hash(model: Path) -> str:
    """Return the sha256 of the names and contents of the weight files of a model folder, or of an adapter's folder.

    Raises ArtifactError without any.
    """
    adapter = model / "adapter_model.safetensors"
    files = [adapter] if adapter.is_file() else weight_files(model)
    return json_sha256({path.name: file_sha256(path) for path in files})


def _recorded_weights_hash(folder: Path) -> str:
    """`weights_hash` of a stage's folder, from its manifest where there is one: 16 GB are not hashed a second time."""
    manifest = read_manifest(folder)
    if manifest is None:
        return weights_hash(folder)
    outputs = manifest.outputs.items()
    return json_sha256(
        {name: entry["sha256"] for name, entry in outputs if PurePath(name).match(WEIGHTS) and "/" not in name}
    )


def base_lineage(base: Path) -> dict[str, str]:
    """Return the lineage of the untuned base's GGUF."""
    facts, _ = read_facts(base)
    return {"base": public_source(facts.source, facts.weights), "base.sha256": facts.weights, **software()}


def adapter_lineage(recipe: "Recipe", inputs: Mapping[str, Path]) -> dict[str, str]:
    """Return the lineage of the adapter's GGUF; `inputs`: the folders of data, base and train."""
    return {
        "data.sha256": file_sha256(inputs["data"] / TRAIN),
        "recipe.sha256": recipe_hash(recipe),
        "adapter.sha256": _recorded_weights_hash(inputs["train"]),
        **base_lineage(inputs["base"]),
    }


def tutor_lineage(recipe: "Recipe", inputs: Mapping[str, Path]) -> dict[str, str]:
    """Return the lineage of the tutor's GGUF: the adapter's and the merged weights; `inputs` also has merge."""
    return {**adapter_lineage(recipe, inputs), "merged.sha256": _recorded_weights_hash(inputs["merge"])}


def software() -> dict[str, str]:
    """Return the versions of tutor, of the packages in TOOLS and of llama.cpp."""
    tools = ", ".join(f"{name} {version_text(name)}" for name in TOOLS)
    llamacpp = f"of llama_cpp_python {VERSION}, build {build_key()}"
    return {"version": version_text("tutor"), "tools": tools, "llama.cpp": llamacpp}


def to_fields(lineage: Mapping[str, str]) -> dict[str, str]:
    """Return a lineage as key-values of a GGUF file."""
    return {PREFIX + name: value for name, value in lineage.items()}


def from_fields(fields: Mapping[str, object]) -> dict[str, str]:
    """Return the lineage in the key-values of a file or of a server's answer, without the prefix."""
    return {name.removeprefix(PREFIX): str(value) for name, value in fields.items() if name.startswith(PREFIX)}
