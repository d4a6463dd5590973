"""What the commands around Ollama do with a recipe's build folder: publish its model, merged or as base and adapter.

In: a recipe and its stages' folders, checked to belong together. Out: models on an Ollama server, `published.json`
beside the Modelfile, `lora/` where an adapter is published, `parity-ollama/` where the published model was compared
again.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import write_json
from tutor.artifacts.hashing import cached_sha256, file_sha256
from tutor.artifacts.layout import LORA, OLLAMA_PARITY, BuildFolder, gguf_name
from tutor.artifacts.lock import locked
from tutor.artifacts.manifest import is_made, read_manifest, require_stage
from tutor.artifacts.stage_folder import writing
from tutor.engines.llamacpp.build import build_key
from tutor.engines.ollama.client import Ollama, connect
from tutor.errors import ArtifactError, GateError
from tutor.formats.models.served_quantization import served_quantization
from tutor.pipeline.registry import BY_NAME
from tutor.pipeline.runner import PACKAGE, announced, pass_gate
from tutor.prompt import GO_TEMPLATE, STOPS, shown
from tutor.recipe.settings import Recipe
from tutor.serving import builds as stage
from tutor.serving import ollama_parity as parity_ollama
from tutor.stages.parity.gate import lines, refusal

log = logging.getLogger(__name__)

PARSER = "passthrough"
LORA_CODE = (
    "serving/publish.py",
    "engines/llamacpp/adapter.py",
    "formats/models/gguf_weights.py",
    "engines/llamacpp/src/convert.py",
    "engines/llamacpp/src/convert_lora.py",
    "engines/llamacpp/process.py",
    "stages/convert/lineage.py",
    "stages/modelfile/parse.py",
    "stages/modelfile/render.py",
    "stages/modelfile/spec.py",
    "stages/modelfile/stage.py",
    "formats/models/served_quantization.py",
    "prompt.py",
)


def served_name(recipe: Recipe, *, adapter: bool = False) -> str:
    """What the recipe's model is called in Ollama, without a tag; base and adapter are a model of their own."""
    return f"{recipe.ollama.model}-lora" if adapter else recipe.ollama.model


def publish(
    recipe: Recipe,
    build: Path,
    *,
    host: str | None = None,
    adapter: bool = False,
    wait: float = 5.0,
    serve: bool = True,
) -> dict[str, Any]:
    """Publish what the stages made, to a server that may need `wait` seconds to start; what was done.

    Without `serve` it is proven and not yet `latest`, nor recorded as what is served (serving/promote.py).

    Raises ArtifactError when the folders are missing, damaged or of other settings, ServiceError for the server's
    faults, GateError when it would serve something else than was trained.
    """
    folder = BuildFolder(build, recipe.name)
    with locked(folder.path), announced("publish", "put the model onto Ollama and prove it"):
        made, reference = _folder_of("modelfile", recipe, folder), _reference(recipe, folder)
        with connect(host) as server:
            server.wait_ready(wait)  # before gigabytes are hashed for no one
            made = _lora_folder(recipe, folder) if adapter else made
            model = stage.read_model(made, _served(recipe, folder))
            check = partial(_same_answers, reference, same_file=not adapter)
            result = stage.publish(model, _hashes(model, folder), server, check=check, serve=serve)
        record = folder.published(adapter=adapter)
        if serve and (result["published"] or not record.exists()):
            write_json(record, result)
    return result


def _served(recipe: Recipe, folder: BuildFolder) -> str:
    return served_quantization(recipe.ollama.quantization, folder.stage("ladder"))


def _folder_of(name: str, recipe: Recipe, folder: BuildFolder) -> Path:
    """The folder of a stage behind convert. Raises ArtifactError when it was made of another recipe or gguf/."""
    made = folder.stage(name)
    manifest = require_stage(made, name)
    gguf = require_stage(folder.stage("convert"), "convert")
    wanted = {**BY_NAME[name].recipe_fields(recipe), "input.convert": gguf.fingerprint}
    if changed := manifest.other_fields(wanted):
        raise ArtifactError(f"{made} was made of another {changed[0]}", "run: tutor run --until modelfile")
    return made


def _reference(recipe: Recipe, folder: BuildFolder) -> parity_ollama.Reference:
    """What the parity stage recorded. Raises GateError where it said no."""
    made = _folder_of("parity", recipe, folder)
    pass_gate(made)
    return parity_ollama.read_reference(made)


def _same_answers(
    reference: parity_ollama.Reference, server: Ollama, tag: str, *, same_file: bool
) -> dict[str, dict[str, Any]]:
    """The hand-over to Ollama, as a record. Raises GateError where it diverges."""
    log.info("comparing %s with %s in llama.cpp", tag, reference.engine)
    item = parity_ollama.published(reference, server, tag, same_file=same_file)
    if refused := refusal([item]):
        raise GateError(refused["message"], refused["hint"])
    return {"parity": item.record()}


def parity(recipe: Recipe, build: Path, *, host: str | None = None) -> dict[str, Any]:
    """What a server serves now as `latest` against the parity stage's record; `refused` where it diverges.

    Writes `parity-ollama/`. Raises ArtifactError without that stage, ServiceError when the model is not there.
    """
    folder, name = BuildFolder(build, recipe.name), served_name(recipe)
    with locked(folder.path), connect(host) as server:
        reference = _reference(recipe, folder)
        version, found = server.version(), stage.digest_of(server, name)
        served = {"model": name, "host": server.host, "version": version, "digest": found or ""}
        with (
            announced("parity", f"compare {name} at {server.host} with {reference.engine} in llama.cpp"),
            writing(folder.ollama_parity, OLLAMA_PARITY, served) as (_, results),
        ):
            wanted = _published_digest(folder)
            item = parity_ollama.identity(reference.engine, found, wanted) if found and wanted else None
            if item is None or item.state == "same":
                item = parity_ollama.published(reference, server, name)
            refused = refusal([item])
            results.update(served, hand_overs=[item.record()], **({"refused": refused} if refused else {}))
    return {**results}


def _published_digest(folder: BuildFolder) -> str | None:
    """The digest of what was published from this folder; None where nothing was, or it does not say."""
    try:
        digest = json.loads(folder.published().read_text("utf-8")).get("digest")
    except (OSError, ValueError, AttributeError):
        return None
    return digest if isinstance(digest, str) else None


def _hashes(model: stage.Model, folder: BuildFolder) -> dict[Path, str]:
    """Every file's sha256. Raises ArtifactError for a file that is not as its stage made it."""
    hashes = {}
    for path in model.paths:
        manifest = read_manifest(path.parent)
        made = manifest.outputs.get(path.name, {}).get("sha256") if manifest else None
        hashes[path] = cached_sha256(path, folder.hashes)
        if made != hashes[path]:
            raise ArtifactError(f"{path} has another content than when it was made", "run: tutor convert")
    return hashes


def _lora_folder(recipe: Recipe, folder: BuildFolder) -> Path:
    """`lora/` with the adapter's GGUF and a Modelfile on the converted base, made when it is not there or outdated."""
    from tutor.engines.llamacpp.adapter import lora_to_gguf
    from tutor.formats.models.model_folder import read_facts
    from tutor.stages.convert.lineage import adapter_lineage, keyed, recipe_hash

    inputs = {name: folder.stage(name) for name in ("data", "base", "train", "convert")}
    fields: dict[str, Any] = {f"input.{name}": require_stage(at, name).fingerprint for name, at in inputs.items()}
    fields |= BY_NAME["modelfile"].recipe_fields(recipe)
    fields |= {f"code.{source}": file_sha256(PACKAGE / source)[:16] for source in LORA_CODE}
    fields |= {"version.llama.cpp": build_key(), "recipe.lineage": recipe_hash(recipe)}
    target = folder.lora
    if is_made(target, fields):
        return target
    base = folder.gguf("base", _served(recipe, folder))
    if not base.is_file():
        raise ArtifactError(f"{base} is not there", "an adapter needs convert.base = true; then run: tutor convert")
    merged = read_manifest(folder.stage("merge"))
    if merged and merged.results.get("base") == "nf4":
        log.warning(
            "merged/ stands on the base as 4-bit training saw it, the adapter on its 16 bits: their answers differ"
        )
    log.info("converting the adapter to GGUF")
    with writing(target, LORA, fields) as (out, results):
        gguf = out / gguf_name("tutor", LORA)
        says = keyed(adapter_lineage(recipe, inputs))
        results["matrices"] = lora_to_gguf(inputs["train"], read_facts(inputs["base"])[1], base, gguf, says)
        _write_modelfile(recipe, base, gguf, out)
    return target


def _write_modelfile(recipe: Recipe, base: Path, adapter: Path, out: Path) -> None:
    """`out`/Modelfile and `out`/create.json of a base with an adapter, as the modelfile stage writes the merged one's.

    The base's GGUF has its own chat template (R1's names tools and <think>), which Ollama would prefer to TEMPLATE: a
    parser, even one that changes nothing, keeps it from choosing.
    """
    from tutor.stages.modelfile.render import render
    from tutor.stages.modelfile.spec import ModelSpec
    from tutor.stages.modelfile.stage import create_body, ollama_parameters

    parameters = ollama_parameters(recipe.generate.model_dump(), recipe.seed, STOPS)
    name = served_name(recipe, adapter=True)
    spec = ModelSpec(name, base, GO_TEMPLATE, parameters, system=recipe.system, adapter=adapter)
    (out / "Modelfile").write_text(f"{render(spec, out)}PARSER {PARSER}\n", "utf-8")
    places = {path: os.path.relpath(path, out) for path in (base, adapter)}
    write_json(out / "create.json", {"name": name, **create_body(spec, places), "parser": PARSER})


def rollback(recipe: Recipe, *, host: str | None = None, adapter: bool = False) -> dict[str, Any]:
    """Serve again what `latest` was before."""
    with connect(host) as server:
        return stage.rollback(server, served_name(recipe, adapter=adapter))


def models(recipe: Recipe, *, host: str | None = None) -> list[dict[str, Any]]:
    """Every published build of the recipe's model, merged and as an adapter, the newest first of each."""
    names = [served_name(recipe, adapter=adapter) for adapter in (False, True)]
    with connect(host) as server:
        return [{"model": name, **row} for name in names for row in stage.models(server, name)]


def published_lines(result: Mapping[str, Any]) -> list[str]:
    """What publishing came to, for a terminal."""
    where = f"{result['tag']} at {result['host']} (Ollama {result['version']})"
    if not result["published"]:
        return [f"Nothing to do: {where} is what is served as {result['model']}."]
    checked = f"{result['prompts']} prompts as trained; it answers: {shown(result['answer'])!r}"
    compared = lines([result["parity"]]) if "parity" in result else []
    compared += promotion_lines(result["promotion"]) if "promotion" in result else []
    return [f"Published {where}: {checked}", *compared, f"Next: ollama run {result['model']}"]


def promotion_lines(promotion: Mapping[str, Any]) -> list[str]:
    """What a build was weighed against before it was served, and what was overridden, for a terminal."""
    return [promotion["said"], *(f"Forced, although: {problem}" for problem in promotion["overrode"])]


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
