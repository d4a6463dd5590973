"""Models by name: parse a name, start the engine that answers, list what its answers depend on.

In: a recipe, its build folder, a name. Out: an engine, stopped at the end of its context. Generates nothing and makes
no file.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tutor.artifacts.layout import BuildFolder, gguf_name
from tutor.artifacts.manifest import read_manifest, require_stage
from tutor.artifacts.provenance import SourceTree
from tutor.errors import ArtifactError, RecipeError
from tutor.formats.models.served_quantization import served_quantization

if TYPE_CHECKING:
    from tutor.engines.protocol import Engine
    from tutor.recipe.settings import Recipe

MODELS = ("tutor", "base", "adapter")
ENGINES = ("llamacpp", "ollama", "hf")
KNOWN_NAMES = "tutor, base, adapter, a quantization as Q8_0 or base-Q8_0, hf:tutor, hf:base, ollama:NAME"

_GGUF_NAME = re.compile(r"(?:(tutor|base)-)?([A-Z][A-Z0-9_]*)")


@dataclass(frozen=True)
class ModelChoice:
    """A model and the engine that runs it. `model` is one of MODELS, or with Ollama the name of a model there."""

    model: str
    quantization: str | None = None  # None: the recipe's ollama.quantization
    engine: str = "llamacpp"
    host: str | None = None  # of the Ollama server

    @property
    def label(self) -> str:
        """Name of the model in tables and folder names."""
        name = f"{self.model}-{self.quantization}" if self.quantization else self.model
        return name if self.engine == "llamacpp" else f"{self.engine}:{name}"


def parse_model(text: str, engine: str = "llamacpp", host: str | None = None) -> ModelChoice:
    """Parse `[ENGINE:]NAME`; `engine` is the default engine. Raises RecipeError for an unknown name."""
    before, _, name = text.partition(":")
    engine, name = (before, name) if before in ENGINES and name else (engine, text)
    if not name:
        raise RecipeError("a model without a name", f"known: {KNOWN_NAMES}")
    if engine == "ollama" or name in MODELS:
        return ModelChoice(name, None, engine, host)
    match = _GGUF_NAME.fullmatch(name)
    if match is None or engine == "hf":
        raise RecipeError(f"no model {name!r}", f"known: {KNOWN_NAMES}")
    return ModelChoice(match[1] or "tutor", match[2], engine, host)


@contextlib.contextmanager
def open_engine(
    recipe: "Recipe", build: Path, choice: ModelChoice, *, share: int = 1, log: Path | None = None
) -> "Iterator[Engine]":
    """Start the engine that answers, and stop it at the end of the context.

    `share` is the number of engines that run at a time; each gets its part of the cores. `log` is the file for the
    output of llama-server (None: server.log in the build folder).
    Raises ArtifactError naming the missing stage, ServiceError for faults of a server.
    """
    folder = BuildFolder(build, recipe.name)
    if choice.engine == "ollama":
        from tutor.engines.ollama.engine import serve as serve_published

        with serve_published(choice.model, choice.host) as engine:
            yield engine
    elif choice.engine == "hf" or choice.model == "adapter":
        from tutor.engines.hf.loading import load
        from tutor.machine import device

        model, adapter = _folders(folder, choice.model)
        quantization = _quantization(folder, choice.model)
        precision = device.choose_precision(recipe.train.precision)
        yield load(model, adapter, quantization=quantization, precision=precision)
    else:
        from tutor.engines.llamacpp.server import serve as serve_gguf

        gguf = gguf_of(recipe, build, choice)
        threads = max(1, len(os.sched_getaffinity(0)) // share)
        log = log or folder.server_log
        with serve_gguf(gguf, context=recipe.generate.context, threads=threads, log=log) as server:
            yield server


def quantization_of(recipe: "Recipe", folder: BuildFolder) -> str:
    """Return the quantization that is served from a build folder. Raises ArtifactError before the ladder stage."""
    return served_quantization(recipe.ollama.quantization, folder.stage("ladder"))


def gguf_of(recipe: "Recipe", build: Path, choice: ModelChoice) -> Path:
    """Return the GGUF of a model. Raises ArtifactError without the convert stage, RecipeError for a missing file."""
    folder = BuildFolder(build, recipe.name)
    made = folder.stage("convert")
    require_stage(made, "convert")
    kind = choice.quantization or quantization_of(recipe, folder)
    gguf = folder.gguf(choice.model, kind)
    if not gguf.is_file():
        found = ", ".join(sorted(path.stem.partition("-")[2] for path in made.glob(gguf_name(choice.model, "*"))))
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
            name = choice.model.partition(":")[0]
            return {"model": name, "host": server.host, "version": server.version(), "digest": digest}
    if choice.engine == "hf" or choice.model == "adapter":
        _folders(folder, choice.model)
        stages = {"base": ("base",), "tutor": ("merge",), "adapter": ("base", "train")}[choice.model]
        made = {name: require_stage(folder.stage(name), name).fingerprint for name in stages}
        settings = {"quantization": _quantization(folder, choice.model), "precision": recipe.train.precision}
        return {**made, **settings, **SourceTree(folder.hashes).provenance("engines/hf/loading.py").versions}
    from tutor.engines.llamacpp.build import build_key

    gguf = gguf_of(recipe, build, choice)
    outputs = require_stage(gguf.parent, "convert").outputs
    if gguf.name not in outputs:
        raise ArtifactError(f"{gguf} was not made by the convert stage", "run: tutor convert")
    return {
        "file": gguf.stem,
        "sha256": outputs[gguf.name]["sha256"],
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
