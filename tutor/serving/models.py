"""Who answers: a model's name to an engine, and what its answers depend on.

In: a recipe, its build folder, a name. Out: an engine that is stopped when done. Asks nothing and makes nothing.
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
from tutor.artifacts.provenance import provenance
from tutor.errors import ArtifactError, RecipeError
from tutor.formats.models.served_quantization import served_quantization

if TYPE_CHECKING:
    from tutor.engines.protocol import Engine
    from tutor.recipe.settings import Recipe

MODELS = ("tutor", "base", "adapter")
ENGINES = ("llamacpp", "ollama", "hf")
KNOWN = "tutor, base, adapter, a quantization as Q8_0 or base-Q8_0, hf:tutor, hf:base, ollama:NAME"

_FILE = re.compile(r"(?:(tutor|base)-)?([A-Z][A-Z0-9_]*)")


@dataclass(frozen=True)
class Who:
    """Which model, through which engine. `model` is one of MODELS; with Ollama, the name that it has there."""

    model: str
    quantization: str | None = None  # None: the recipe's ollama.quantization
    engine: str = "llamacpp"
    host: str | None = None  # Ollama's

    @property
    def label(self) -> str:
        """What the model is called beside others."""
        name = f"{self.model}-{self.quantization}" if self.quantization else self.model
        return name if self.engine == "llamacpp" else f"{self.engine}:{name}"


def named(text: str, engine: str = "llamacpp", host: str | None = None) -> Who:
    """`[ENGINE:]NAME`, as a person names a model; without ENGINE it is the one given. Raises RecipeError."""
    before, _, name = text.partition(":")
    engine, name = (before, name) if before in ENGINES and name else (engine, text)
    if not name:
        raise RecipeError("a model without a name", f"known: {KNOWN}")
    if engine == "ollama" or name in MODELS:
        return Who(name, None, engine, host)
    match = _FILE.fullmatch(name)
    if match is None or engine == "hf":
        raise RecipeError(f"no model {name!r}", f"known: {KNOWN}")
    return Who(match[1] or "tutor", match[2], engine, host)


@contextlib.contextmanager
def opened(recipe: "Recipe", build: Path, who: Who, *, share: int = 1, log: Path | None = None) -> "Iterator[Engine]":
    """The engine that answers, stopped when done; `share`: of so many at a time, each with its part of the cores.

    `log` takes what a llama-server says (None: server.log in the build folder).
    Raises ArtifactError naming the stage that is missing, ServiceError for a server's faults.
    """
    folder = BuildFolder(build, recipe.name)
    if who.engine == "ollama":
        from tutor.engines.ollama.engine import serve as serve_published

        with serve_published(who.model, who.host) as engine:
            yield engine
    elif who.engine == "hf" or who.model == "adapter":
        from tutor.engines.hf.loading import load
        from tutor.machine import device

        model, adapter = _folders(folder, who.model)
        quantization = _quantization(folder, who.model)
        precision = device.choose_precision(recipe.train.precision)
        yield load(model, adapter, quantization=quantization, precision=precision)
    else:
        from tutor.engines.llamacpp.server import serve as serve_gguf

        gguf = gguf_of(recipe, build, who)
        threads = max(1, len(os.sched_getaffinity(0)) // share)
        log = log or folder.server_log
        with serve_gguf(gguf, context=recipe.generate.context, threads=threads, log=log) as server:
            yield server


def gguf_of(recipe: "Recipe", build: Path, who: Who) -> Path:
    """The GGUF that answers. Raises ArtifactError without the convert stage, RecipeError for a file it did not make."""
    folder = BuildFolder(build, recipe.name)
    made = folder.stage("convert")
    require_stage(made, "convert")
    kind = who.quantization or served_quantization(recipe.ollama.quantization, folder.stage("ladder"))
    gguf = folder.gguf(who.model, kind)
    if not gguf.is_file():
        found = ", ".join(sorted(path.stem.partition("-")[2] for path in made.glob(gguf_name(who.model, "*"))))
        raise RecipeError(f"{gguf} is not there", f"made for {who.model}: {found}")
    return gguf


def identity(recipe: "Recipe", build: Path, who: Who) -> dict[str, Any]:
    """What this model's answers depend on, beside prompts and sampling; equal values, equal answers.

    Raises as `opened`; of Ollama it asks the server.
    """
    folder = BuildFolder(build, recipe.name)
    if who.engine == "ollama":
        from tutor.engines.ollama.client import connect
        from tutor.serving.builds import digest_of

        with connect(who.host) as server:
            digest = digest_of(server, who.model) or ""
            # Its digest says which build it is: asked by its tag before it is served, it need not be asked again.
            name = who.model.partition(":")[0]
            return {"model": name, "host": server.host, "version": server.version(), "digest": digest}
    if who.engine == "hf" or who.model == "adapter":
        _folders(folder, who.model)
        stages = {"base": ("base",), "tutor": ("merge",), "adapter": ("base", "train")}[who.model]
        made = {name: require_stage(folder.stage(name), name).fingerprint for name in stages}
        settings = {"quantization": _quantization(folder, who.model), "precision": recipe.train.precision}
        return {**made, **settings, **provenance((), ("transformers", "torch", "peft"))}
    from tutor.engines.llamacpp.build import build_key

    gguf = gguf_of(recipe, build, who)
    outputs = require_stage(gguf.parent, "convert").outputs
    if gguf.name not in outputs:
        raise ArtifactError(f"{gguf} is not one that the convert stage made", "run: tutor convert")
    return {
        "file": gguf.stem,
        "sha256": outputs[gguf.name]["sha256"],
        "context": recipe.generate.context,
        "engine": build_key(),
    }


def _folders(folder: BuildFolder, model: str) -> tuple[Path, Path | None]:
    """What transformers loads: a 16-bit model folder, and an adapter over it or None. Raises ArtifactError."""
    from tutor.formats.models.model_folder import read_facts

    merged, adapter, base = (folder.stage(name) for name in ("merge", "train", "base"))
    if model == "tutor":
        require_stage(merged, "merge")
        return merged, None
    if model == "adapter":
        require_stage(adapter, "train")
    return read_facts(base)[1], adapter if model == "adapter" else None


def _quantization(folder: BuildFolder, model: str) -> Literal["nf4", "int8", "none"]:
    """In what transformers loads a model: the base as it was trained on, the merged one in 16 bits."""
    trained = read_manifest(folder.stage("train"))
    if model == "tutor" or trained is None:
        return "none"
    return trained.results["quantization"]  # type: ignore[no-any-return] # the recipe may leave it open
