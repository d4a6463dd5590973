"""Publish the model of a build folder to Ollama, merged or as base and adapter, and compare what Ollama serves.

In: a recipe and the folders of its stages, checked to belong together. Out: a build on an Ollama server,
`published.json` beside the Modelfile, `parity-ollama/` after a later comparison. Does not decide which build is served
(promote.py).
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json_object
from tutor.artifacts.hashing import cached_sha256
from tutor.artifacts.layout import OLLAMA_PARITY, BuildFolder
from tutor.artifacts.manifest import read_manifest, require_stage
from tutor.artifacts.stage_folder import writing
from tutor.engines.ollama.client import Ollama, connect
from tutor.errors import ArtifactError, GateError
from tutor.formats.architectures import architecture_of_gguf
from tutor.formats.models.gguf import read_fields
from tutor.pipeline.recipe_folder import held
from tutor.pipeline.registry import BY_NAME
from tutor.pipeline.runner import announced, require_gate_passed
from tutor.pipeline.staleness import edited_inputs
from tutor.prompt.format import PromptFormat
from tutor.prompt.messages import display_text
from tutor.recipe.settings import Recipe
from tutor.serving import builds, ollama_parity
from tutor.serving.adapter import lora_folder, refuse_variant
from tutor.serving.build_records import last_proof, record_hand_offs, record_proof
from tutor.serving.models import prompt_of, quantization_of
from tutor.stages.parity.gate import parity_table, refusal

log = logging.getLogger(__name__)


def publish(  # noqa: PLR0913 - the options of the command
    recipe: Recipe,
    build: Path,
    *,
    host: str | None = None,
    adapter: bool = False,
    wait: float = 5.0,
    force: bool = False,
    unchecked: bool = False,
) -> dict[str, Any]:
    """Publish the model of a build folder and check it; return what was done. The server has `wait` seconds to start.

    Records where the build was checked; on another version of the server it is checked again. Neither tags the build
    `latest` nor records it as served: promote.py does both.
    Raises ArtifactError when the folders are missing, damaged or of other settings, or (unless `force`) when an input
    was edited since; ServiceError for faults of the server, GateError when it would serve another model, or (unless
    `unchecked`) when engines on the way to it were not compared.
    """
    folder = BuildFolder(build, recipe.name)
    if adapter:
        refuse_variant(recipe)
    with held(recipe, build), announced("publish", "publish the model to Ollama and check it"):
        made, reference = _folder_of("modelfile", recipe, folder), _reference(recipe, folder)
        edited = _edited_inputs(recipe, folder, force=force)
        left_out = _not_compared(folder, unchecked=unchecked)
        with connect(host) as server:
            server.wait_ready(wait)  # before gigabytes are hashed in vain
            made = lora_folder(recipe, folder) if adapter else made
            model = builds.read_model(made, quantization_of(recipe, folder))
            hashes = _hashes(model, folder)
            model = _with_facts(model, reference.prompt)
            check = partial(_check_parity, reference, same_file=not adapter)
            proof = partial(last_proof, folder)
            result = builds.publish_build(model, hashes, server, check=check, last_proof=proof)
            if result["published"]:
                before = proof(result["build"], server.host).get("version")
                result |= {"checked_before_on": before} if before not in (None, result["version"]) else {}
                checked = {name: result[name] for name in ("version", "digest")}
                record_proof(folder, result["build"], server.host, checked)
                record_hand_offs(folder, result["build"], server.host, not_compared=left_out)
            image = os.environ.get("TUTOR_OLLAMA_IMAGE")  # set by the stack
            more = {"image": image, "edited": edited, "not_checked": left_out}
            return {**result, **{name: value for name, value in more.items() if value}}


def _with_facts(model: builds.Model, prompt: PromptFormat) -> builds.Model:
    """Return a model with the facts of its GGUF. Raises ArtifactError for a family that tutor does not tune."""
    (gguf,) = model.files.values()
    fields = read_fields(gguf)
    family = architecture_of_gguf(fields.get("general.architecture"), str(gguf)).gguf
    own_template = "" if prompt.go_template else str(fields.get("tokenizer.chat_template", ""))
    return replace(model, prompt=prompt, family=family, own_template=own_template)


def _edited_inputs(recipe: Recipe, folder: BuildFolder, *, force: bool) -> list[str]:
    """Return what was edited since the model was made. Raises ArtifactError for the first one unless `force`."""
    edited = edited_inputs(recipe, folder.build, ("modelfile", "parity"))
    for line in edited:
        log.warning("the model is of an older state: %s", line)
    if edited and not force:
        raise ArtifactError(
            f"{folder.path} holds a model of an older state: {edited[0]}; nothing was published",
            "run: tutor run; to publish the older model all the same: tutor publish --force",
        )
    return edited


def _not_compared(folder: BuildFolder, *, unchecked: bool) -> list[str]:
    """Return the hand-offs that the parity stage left out, with the reason of each.

    Raises GateError for the first one unless `unchecked`: what was not compared is not proven.
    """
    manifest = read_manifest(folder.stage("parity"))
    hand_offs = manifest.results.get("hand_offs", []) if manifest else []
    left_out = [f"{item['ours']} -> {item['theirs']}: {item['missing']}" for item in hand_offs if item["missing"]]
    if left_out and not unchecked:
        raise GateError(
            f"not compared, so not proven: {left_out[0]}; nothing was published",
            "on a machine with more memory: tutor clean parity, and tutor run; to publish it unproven, which its "
            "record then says: tutor publish --unchecked",
        )
    for line in left_out:
        log.warning("published although it was not compared: %s", line)
    return left_out


def _folder_of(name: str, recipe: Recipe, folder: BuildFolder) -> Path:
    """Return the folder of a stage after convert. Raises ArtifactError when made of another recipe or gguf/."""
    made = folder.stage(name)
    manifest = require_stage(made, name)
    gguf = require_stage(folder.stage("convert"), "convert")
    wanted = {**BY_NAME[name].recipe_fields(recipe), "input.convert": gguf.fingerprint}
    if changed := manifest.other_fields(wanted):
        raise ArtifactError(f"{made} was made of another {changed[0]}", "run: tutor run --until modelfile")
    return made


def _reference(recipe: Recipe, folder: BuildFolder) -> ollama_parity.Reference:
    """Return the record of the parity stage. Raises GateError when that gate refused."""
    made = _folder_of("parity", recipe, folder)
    require_gate_passed(made)
    return ollama_parity.read_reference(made, prompt_of(recipe, folder))


def _check_parity(
    reference: ollama_parity.Reference, server: Ollama, tag: str, *, same_file: bool
) -> dict[str, dict[str, Any]]:
    """Return the hand-off to Ollama as a record. Raises GateError when the answers diverge."""
    log.info("comparing %s with %s in llama.cpp", tag, reference.engine)
    item = ollama_parity.compare_model(reference, server, tag, same_file=same_file)
    if refused := refusal([item]):
        raise GateError(refused["message"], refused["hint"])
    return {"parity": item.record()}


def compare_published(recipe: Recipe, build: Path, *, host: str | None = None) -> dict[str, Any]:
    """Compare the model that a server has as `latest` with the record of the parity stage.

    The result has `refused` when the two diverge, and is stored in `parity-ollama/`. Raises ArtifactError without that
    stage, ServiceError when the model is missing.
    """
    folder, name = BuildFolder(build, recipe.name), builds.served_name(recipe)
    with held(recipe, build), connect(host) as server:
        reference = _reference(recipe, folder)
        version, found = server.version(), builds.model_digest(server, name)
        served = {"model": name, "host": server.host, "version": version, "digest": found or ""}
        with (
            announced("parity", f"compare {name} at {server.host} with {reference.engine} in llama.cpp"),
            writing(folder.ollama_parity, OLLAMA_PARITY, served) as (_, results),
        ):
            wanted = _published_digest(folder)
            item = ollama_parity.compare_digest(reference.engine, found, wanted) if found and wanted else None
            if item is None or item.state == "same":
                item = ollama_parity.compare_model(reference, server, name)
            refused = refusal([item])
            results.update(served, hand_offs=[item.record()], **({"refused": refused} if refused else {}))
    return {**results}


def _published_digest(folder: BuildFolder) -> str | None:
    """Return the digest of the model published from this folder; None without a record of it."""
    digest = (read_json_object(folder.published()) or {}).get("digest")
    return digest if isinstance(digest, str) else None


def _hashes(model: builds.Model, folder: BuildFolder) -> dict[Path, str]:
    """Return the sha256 of every file. Raises ArtifactError for a file that changed after its stage."""
    hashes = {}
    for path in model.paths:
        manifest = read_manifest(path.parent)
        made = manifest.outputs.get(path.name, {}).get("sha256") if manifest else None
        hashes[path] = cached_sha256(path, folder.hashes)
        if made != hashes[path]:
            raise ArtifactError(f"{path} has changed since it was made", "run: tutor convert")
    return hashes


def rollback(recipe: Recipe, *, host: str | None = None, adapter: bool = False) -> dict[str, Any]:
    """Serve the build that was `latest` before."""
    with connect(host) as server:
        return builds.rollback(server, builds.served_name(recipe, adapter=adapter))


def published_builds(recipe: Recipe, *, host: str | None = None) -> list[dict[str, Any]]:
    """List the published builds of the recipe's model, merged ones and then adapters, the newest first of each."""
    names = [builds.served_name(recipe, adapter=adapter) for adapter in (False, True)]
    with connect(host) as server:
        return [{"model": name, **row} for name in names for row in builds.list_builds(server, name)]


def published_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result of publishing as lines for a terminal."""
    where = f"{result['tag']} at {result['host']} (Ollama {result['version']})"
    older = [f"Forced although it is of an older state: {line}" for line in result.get("edited", ())]
    if not result["published"]:
        return [f"Nothing to do: {where} is already served as {result['model']}.", *older]
    thought = f"thought: {result['thought']!r:.120}; " if "thought" in result else ""
    checked = f"{result['prompts']} prompts as in training; {thought}answer: {display_text(result['answer'])!r}"
    older += [f"UNCHECKED by the parity gate, as the record says: {line}" for line in result.get("not_checked", ())]
    compared = parity_table([result["parity"]]) if "parity" in result else []
    compared += promotion_lines(result["promotion"]) if "promotion" in result else []
    done = "Published" if result["created"] or "checked_before_on" not in result else "Checked again"
    if done == "Checked again":
        compared = [f"It was last checked on version {result['checked_before_on']} of this server.", *compared]
    return [f"{done} {where}: {checked}", *older, *compared, f"Next: ollama run {result['model']}"]


def promotion_lines(promotion: Mapping[str, Any]) -> list[str]:
    """Return the comparison before a build was served, and the overridden refusals, as lines for a terminal."""
    return [promotion["comparison"], *(f"Forced despite: {problem}" for problem in promotion["overrode"])]


def build_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line a build, for a terminal."""
    if not rows:
        return ["Nothing is published: run tutor publish"]
    lines = []
    for row in rows:
        roles = " ".join(role for role in (builds.LATEST, builds.PREVIOUS) if row[role])
        tag = f"{row['model']}:{row['build'] or '(not by tutor)'}"
        lines.append(f"{tag:<28} {row['modified'][:19]} {row['size'] / 1e6:10.1f} MB  {roles}".rstrip())
    return lines
