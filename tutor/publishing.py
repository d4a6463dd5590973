"""What the commands around Ollama do with a recipe's build folder: publish its model, merged or as base and adapter.

In: a recipe and its stages' folders, checked to belong together. Out: models on an Ollama server, `published.json`
beside the Modelfile, `lora/` where an adapter is published.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutor import artifacts
from tutor.engines import ollama
from tutor.engines.llamacpp_build import build_key
from tutor.errors import ArtifactError
from tutor.pipeline import BY_NAME, PACKAGE, announced
from tutor.recipe import Recipe
from tutor.served import served_quantization
from tutor.stages import publish as stage
from tutor.template import GO_TEMPLATE, STOPS, shown

log = logging.getLogger(__name__)

PUBLISHED = "published.json"
LORA = "lora"
PARSER = "passthrough"
LORA_CODE = (
    "publishing.py",
    "engines/lora_gguf.py",
    "engines/llamacpp_process.py",
    "stages/modelfile.py",
    "served.py",
    "template.py",
)


def served_name(recipe: Recipe, *, adapter: bool = False) -> str:
    """What the recipe's model is called in Ollama, without a tag; base and adapter are a model of their own."""
    return f"{recipe.ollama.model}-lora" if adapter else recipe.ollama.model


def publish(
    recipe: Recipe, build: Path, *, host: str | None = None, adapter: bool = False, wait: float = 5.0
) -> dict[str, Any]:
    """Publish what the stages made, to a server that may need `wait` seconds to start; what was done.

    Raises ArtifactError when the folders are missing, damaged or of other settings, ServiceError for the server's
    faults, GateError when it would serve something else than was trained.
    """
    folder = build / recipe.name
    with artifacts.locked(folder), announced("publish", "put the model onto Ollama and prove it"):
        made = _model_folder(recipe, folder)
        with ollama.connect(host) as server:
            server.wait_ready(wait)  # before gigabytes are hashed for no one
            made = _lora_folder(recipe, folder) if adapter else made
            model = stage.read_model(made, _served(recipe, folder))
            result = stage.publish(model, _hashes(model, folder), server)
        if result["published"] or not (made / PUBLISHED).exists():
            artifacts.write_json(made / PUBLISHED, result)
    return result


def _served(recipe: Recipe, folder: Path) -> str:
    return served_quantization(recipe.ollama.quantization, folder / BY_NAME["ladder"].folder)


def _model_folder(recipe: Recipe, folder: Path) -> Path:
    """The modelfile stage's folder. Raises ArtifactError when it says something else than the recipe or gguf/."""
    model = folder / BY_NAME["modelfile"].folder
    manifest = artifacts.require(model, "modelfile")
    gguf = artifacts.require(folder / BY_NAME["convert"].folder, "convert")
    wanted = {f"recipe.{name}": value for name, value in BY_NAME["modelfile"].settings(recipe).items()}
    wanted["input.convert"] = gguf.fingerprint
    if changed := [name for name, value in wanted.items() if manifest.fields.get(name) != value]:
        raise ArtifactError(f"{model} was rendered from another {changed[0]}", "run: tutor run --until modelfile")
    return model


def _hashes(model: stage.Model, folder: Path) -> dict[Path, str]:
    """Every file's sha256. Raises ArtifactError for a file that is not as its stage made it."""
    hashes = {}
    for path in model.paths:
        manifest = artifacts.read_manifest(path.parent)
        made = manifest.outputs.get(path.name, {}).get("sha256") if manifest else None
        hashes[path] = artifacts.cached_sha256(path, folder / artifacts.HASHES)
        if made != hashes[path]:
            raise ArtifactError(f"{path} has another content than when it was made", "run: tutor convert")
    return hashes


def _lora_folder(recipe: Recipe, folder: Path) -> Path:
    """`lora/` with the adapter's GGUF and a Modelfile on the converted base, made when it is not there or outdated."""
    from tutor.engines.lora_gguf import lora_to_gguf
    from tutor.modelfolder import read_facts

    inputs = {name: folder / BY_NAME[name].folder for name in ("base", "train", "convert")}
    fields: dict[str, Any] = {f"input.{name}": artifacts.require(at, name).fingerprint for name, at in inputs.items()}
    fields |= {f"recipe.{name}": value for name, value in BY_NAME["modelfile"].settings(recipe).items()}
    fields |= {f"code.{source}": artifacts.file_sha256(PACKAGE / source)[:16] for source in LORA_CODE}
    fields["version.llama.cpp"] = build_key()
    target = folder / LORA
    if is_made(target, fields):
        return target
    base = inputs["convert"] / f"base-{_served(recipe, folder)}.gguf"
    if not base.is_file():
        raise ArtifactError(f"{base} is not there", "an adapter needs convert.base = true; then run: tutor convert")
    log.info("converting the adapter to GGUF")
    with artifacts.writing(target, LORA, fields) as (out, results):
        gguf = out / "tutor-lora.gguf"
        results["matrices"] = lora_to_gguf(inputs["train"], read_facts(inputs["base"])[1], base, gguf)
        _write_modelfile(recipe, base, gguf, out)
    return target


def _write_modelfile(recipe: Recipe, base: Path, adapter: Path, out: Path) -> None:
    """`out`/Modelfile and `out`/create.json of a base with an adapter, as the modelfile stage writes the merged one's.

    The base's GGUF has its own chat template (R1's names tools and <think>), which Ollama would prefer to TEMPLATE: a
    parser, even one that changes nothing, keeps it from choosing.
    """
    from tutor.stages import modelfile

    settings = modelfile.parameters(recipe.generate.model_dump(), recipe.seed, STOPS)
    name = served_name(recipe, adapter=True)
    spec = modelfile.ModelSpec(name, base, GO_TEMPLATE, settings, system=recipe.system, adapter=adapter)
    (out / "Modelfile").write_text(f"{modelfile.render(spec, out)}PARSER {PARSER}\n", "utf-8")
    places = {path: os.path.relpath(path, out) for path in (base, adapter)}
    body = modelfile.request(spec, places)
    del body["model"], body["stream"]
    artifacts.write_json(out / "create.json", {"name": name, **body, "parser": PARSER})


def promote(
    recipe: Recipe, *, host: str | None = None, build: str | None = None, adapter: bool = False
) -> dict[str, Any]:
    """Serve a published build, or (None) the newest one, as `latest`."""
    with ollama.connect(host) as server:
        return stage.promote(server, served_name(recipe, adapter=adapter), build)


def rollback(recipe: Recipe, *, host: str | None = None, adapter: bool = False) -> dict[str, Any]:
    """Serve again what `latest` was before."""
    with ollama.connect(host) as server:
        return stage.rollback(server, served_name(recipe, adapter=adapter))


def models(recipe: Recipe, *, host: str | None = None) -> list[dict[str, Any]]:
    """Every published build of the recipe's model, merged and as an adapter, the newest first of each."""
    names = [served_name(recipe, adapter=adapter) for adapter in (False, True)]
    with ollama.connect(host) as server:
        return [{"model": name, **row} for name in names for row in stage.models(server, name)]


def published_lines(result: Mapping[str, Any]) -> list[str]:
    """What publishing came to, for a terminal."""
    where = f"{result['tag']} at {result['host']} (Ollama {result['version']})"
    if not result["published"]:
        return [f"Nothing to do: {where} is what is served as {result['model']}."]
    checked = f"{result['prompts']} prompts as trained; it answers: {shown(result['answer'])!r}"
    return [f"Published {where}: {checked}", f"Next: ollama run {result['model']}"]


def model_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The builds, a line each, for a terminal."""
    if not rows:
        return ["Nothing is published: run tutor publish"]
    lines = []
    for row in rows:
        roles = " ".join(role for role in (stage.LATEST, stage.PREVIOUS) if row[role])
        tag = f"{row['model']}:{row['build'] or '(not by tutor)'}"
        lines.append(f"{tag:<28} {row['modified'][:19]} {row['size'] / 1e6:10.1f} MB  {roles}".rstrip())
    return lines


def is_made(folder: Path, fields: Mapping[str, Any]) -> bool:
    """Whether a folder is whole and made of exactly these fields."""
    manifest = artifacts.read_manifest(folder)
    return manifest is not None and manifest.key == artifacts.digest(dict(fields)) and not artifacts.check(folder)
