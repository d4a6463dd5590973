"""Models that answer: start the engine of a model, list what its answers depend on.

In: a recipe, its build folder, a ModelChoice. Out: an engine, stopped at the end of its context. Generates nothing and
makes no file.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tutor.artifacts.hashing import cached_sha256
from tutor.artifacts.layout import BuildFolder, gguf_name
from tutor.artifacts.manifest import read_manifest, require_stage
from tutor.artifacts.provenance import SourceTree
from tutor.errors import ArtifactError, RecipeError
from tutor.formats.models.own_prompt import read_own_prompt
from tutor.formats.models.prompt_format import read_format
from tutor.formats.models.served_quantization import served_quantization
from tutor.machine.host import usable_cores
from tutor.pipeline.recipe_folder import refuse_folder
from tutor.recipe.ollama_names import split_tag
from tutor.serving.model_names import ModelChoice

if TYPE_CHECKING:
    from tutor.engines.protocol import Engine
    from tutor.prompt.format import PromptFormat
    from tutor.recipe.settings import Recipe
    from tutor.stages.evaluate.asking import Asking


@contextlib.contextmanager
def open_engine(
    recipe: "Recipe", build: Path, choice: ModelChoice, *, share: int = 1, log: Path | None = None
) -> "Iterator[Engine]":
    """Start the engine that answers, and stop it at the end of the context.

    `share` is the number of engines that run at a time; each gets its part of the cores. `log` is the file for the
    output of llama-server (None: server.log in the build folder).
    Raises RecipeError for the folder of another recipe, ArtifactError naming the missing stage, ServiceError for
    faults of a server.
    """
    refuse_folder(recipe, build)
    folder = BuildFolder(build, recipe.name)
    prompt = prompt_of(recipe, folder, choice.asked)
    if choice.engine == "ollama":
        from tutor.engines.ollama.engine import serve as serve_published

        with serve_published(choice.model, choice.host, prompt) as engine:
            yield engine
    elif choice.engine == "hf" or choice.model == "adapter":
        from tutor.engines.hf.loading import load

        model, adapter = _folders(folder, choice.weights)
        quantization = _quantization(folder, choice.model)
        precision = _precision(recipe, folder, model)
        yield load(model, adapter, quantization=quantization, precision=precision, prompt=prompt)
    else:
        from tutor.engines.llamacpp.server import serve as serve_gguf

        gguf = gguf_of(recipe, build, choice)
        threads = max(1, usable_cores() // share)
        log = log or folder.server_log
        with serve_gguf(gguf, context=recipe.generate.context, threads=threads, log=log, prompt=prompt) as server:
            yield server


def gpu_notice(choice: ModelChoice) -> str | None:
    """Return one line when a model in Ollama is not, or not all, on this machine's GPU; None otherwise. Loads it."""
    if choice.engine != "ollama":
        return None
    from tutor.engines.ollama import health
    from tutor.engines.ollama.client import connect
    from tutor.machine import host

    with connect(choice.host) as server:
        return health.gpu_notice(server, host_has_gpu=bool(host.gpus()), model=choice.model)


def prompt_of(recipe: "Recipe", folder: BuildFolder, model: str = "tutor") -> "PromptFormat":
    """Return the format of a model's prompts: the base has its own, every other name that of the recipe.

    Raises ArtifactError where the base's template is not known yet.
    """
    return read_own_prompt(folder.stage("base")) if model == "base" else read_format(recipe, folder.stage("base"))


def chat_asking(recipe: "Recipe", folder: BuildFolder, choice: ModelChoice) -> "Asking":
    """Return how a person's own questions are put: with the sampling of the served model, the base with its own."""
    from tutor.engines.answer_limit import with_answer_limit
    from tutor.engines.protocol import sampling
    from tutor.stages.evaluate.asking import BASE, asking

    recipe = with_answer_limit(recipe, folder.stage("train"))
    way = asking(recipe, folder.stage("base"), choice.asked)
    generation = sampling(recipe.generate, recipe.seed, way.prompt.stops)
    if choice.asked == BASE:
        generation = replace(way.generation, repeatable=False)
    return replace(way, generation=generation, line="")


def quantization_of(recipe: "Recipe", folder: BuildFolder) -> str:
    """Return the quantization that is served from a build folder. Raises ArtifactError before the ladder stage."""
    return served_quantization(recipe.ollama.quantization, folder.stage("ladder"))


def gguf_of(recipe: "Recipe", build: Path, choice: ModelChoice) -> Path:
    """Return the GGUF of a model. Raises ArtifactError without the convert stage, RecipeError for a missing file."""
    folder = BuildFolder(build, recipe.name)
    made = folder.stage("convert")
    require_stage(made, "convert")
    kind = choice.quantization or quantization_of(recipe, folder)
    gguf = folder.gguf(choice.weights, kind)
    if not gguf.is_file():
        found = ", ".join(sorted(path.stem.partition("-")[2] for path in made.glob(gguf_name(choice.weights, "*"))))
        raise RecipeError(f"{gguf} is not there", f"made for {choice.model}: {found}")
    return gguf


def answer_dependencies(recipe: "Recipe", build: Path, choice: ModelChoice) -> dict[str, Any]:
    """Return what the answers of a model depend on, besides prompts and sampling: equal values, equal answers.

    For a model in Ollama the server returns the digest. Raises as `open_engine`.
    """
    folder = BuildFolder(build, recipe.name)
    if choice.engine == "ollama":
        from tutor.engines.ollama.client import connect
        from tutor.serving.builds import model_digest

        with connect(choice.host) as server:
            digest = model_digest(server, choice.model) or ""
            # The digest identifies the build: answers given under its tag are valid under its name, too.
            name = split_tag(choice.model)[0]
            return {"model": name, "host": server.host, "version": server.version(), "digest": digest}
    if choice.engine == "hf" or choice.model == "adapter":
        _folders(folder, choice.weights)
        stages = {"base": ("base",), "tutor": ("merge",), "adapter": ("base", "train")}[choice.weights]
        made = {name: require_stage(folder.stage(name), name).fingerprint for name in stages}
        settings = {
            "quantization": _quantization(folder, choice.model),
            "precision": _trained_precision(recipe, folder),
        }
        return {**made, **settings, **SourceTree(folder.hashes).provenance("engines/hf/loading.py").versions}
    from tutor.engines.llamacpp.build import build_key

    gguf = gguf_of(recipe, build, choice)
    outputs = require_stage(gguf.parent, "convert").outputs
    if gguf.name not in outputs:
        raise ArtifactError(f"{gguf} was not made by the convert stage", "run: tutor convert")
    sha256 = cached_sha256(gguf, folder.hashes)
    if sha256 != outputs[gguf.name]["sha256"]:
        raise ArtifactError(f"{gguf} has changed since it was made", "run: tutor convert")
    return {
        "file": gguf.stem,
        "sha256": sha256,
        "context": recipe.generate.context,
        "engine": build_key(),
    }


def _folders(folder: BuildFolder, model: str) -> tuple[Path, Path | None]:
    """Return what transformers loads: a 16-bit model folder, and an adapter or None. Raises ArtifactError."""
    from tutor.formats.models.model_folder import read_facts

    merged, adapter, base = (folder.stage(name) for name in ("merge", "train", "base"))
    if model == "tutor":
        require_stage(merged, "merge")
        return merged, None
    if model == "adapter":
        require_stage(adapter, "train")
    return read_facts(base)[1], adapter if model == "adapter" else None


def _quantization(folder: BuildFolder, model: str) -> Literal["nf4", "int8", "none"]:
    """Return the quantization in which transformers loads a model: the base as in training, the merged one in none."""
    trained = read_manifest(folder.stage("train"))
    if model == "tutor" or trained is None:
        return "none"
    return trained.results["quantization"]  # type: ignore[no-any-return] # the recipe can leave it to the stage


def _precision(recipe: "Recipe", folder: BuildFolder, model: Path) -> str:
    """Return the precision in which transformers computes: of a GPU by its capability, else as in training."""
    import torch

    from tutor.machine import device
    from tutor.machine.memory.shapes import read_shape

    trained = _trained_precision(recipe, folder)
    setting = recipe.train.precision if torch.cuda.is_available() else trained
    return device.choose_precision(setting, read_shape(model)).precision


def _trained_precision(recipe: "Recipe", folder: BuildFolder) -> str:
    """Return train.precision, or for auto what a training on a CPU has chosen, so that nothing is measured again."""
    from tutor.machine.device import recorded_precision

    trained = read_manifest(folder.stage("train"))
    chosen = recorded_precision(trained.results) if trained else None
    return chosen if chosen and recipe.train.precision == "auto" else recipe.train.precision
