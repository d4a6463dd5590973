"""What a build folder records of each published build: its answers, where it was checked, when it was promoted.

In: the build folder of a recipe, a build's hash. Out: `served/<build>/` in it: record.json, and answers.json, which
the next build is compared with. A damaged copy of answers is no copy. `tutor clean` keeps these folders. Calls no
server.
"""

import datetime
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json, write_json
from tutor.artifacts.hashing import file_sha256
from tutor.artifacts.layout import OLLAMA, BuildFolder
from tutor.artifacts.manifest import read_manifest
from tutor.errors import ArtifactError
from tutor.serving.evaluation.compare import ModelAnswers, read_answers
from tutor.stages.evaluate.stage import ANSWERS

log = logging.getLogger(__name__)

RECORD = "record.json"
"""File of a build's record."""


def read_record(folder: BuildFolder, build: str) -> dict[str, Any]:
    """Return the record of a build; empty for one published from elsewhere. Raises ArtifactError when damaged."""
    path = folder.served(build) / RECORD
    try:
        return read_json(path) if path.exists() else {}
    except ArtifactError as error:
        raise ArtifactError(
            error.message, f"delete it, and run: tutor publish ({build} is then checked again)"
        ) from None


def update_record(folder: BuildFolder, build: str, **more: Any) -> None:
    """Add values to the record of a build."""
    path = folder.served(build) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**read_record(folder, build), "build": build, **more})


def last_proof(folder: BuildFolder, build: str, host: str) -> dict[str, str]:
    """Return the server's version and the model's digest at the last check of a build on a host; empty without one."""
    proofs = read_record(folder, build).get("proofs")
    found = proofs.get(host) if isinstance(proofs, dict) else None
    return found if isinstance(found, dict) else {}


def record_proof(folder: BuildFolder, build: str, host: str, proof: Mapping[str, Any]) -> None:
    """Record that a build passed every check on a host."""
    proofs = read_record(folder, build).get("proofs")
    update_record(folder, build, proofs={**(proofs if isinstance(proofs, dict) else {}), host: dict(proof)})


def record_hand_offs(folder: BuildFolder, build: str, host: str, *, not_compared: Sequence[str]) -> None:
    """Record whether a published build is proven; the list of publications that were not is never shortened."""
    before = read_record(folder, build).get("unchecked", [])
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    more = [{"at": now, "host": host, "not_compared": list(not_compared)}] if not_compared else []
    unchecked = {"unchecked": [*before, *more]} if before or more else {}
    update_record(folder, build, proven=not not_compared, **unchecked)


def unproven(folder: BuildFolder, build: str) -> str | None:
    """Return which hand-off of a build was not compared when it was last published; None where all were."""
    record = read_record(folder, build)
    if record.get("proven", True):
        return None
    return f"it was published unchecked: {record['unchecked'][-1]['not_compared'][0]}"


def kept_answers(folder: BuildFolder, build: str) -> ModelAnswers | None:
    """Return the answers of a build: the copy in its folder, else those of an evaluation of it, which are then copied.

    None when there are none, or all are damaged.
    """
    path = folder.served(build) / ANSWERS
    wanted = read_record(folder, build).get("answers_sha256")
    if path.exists():
        try:
            if wanted in (None, file_sha256(path)):
                return read_answers(path, build)
            log.warning("%s has changed since it was written", path)
        except ArtifactError as error:
            log.warning("%s", error.message)
    source = _evaluation_of(folder, build)
    return keep_answers(folder, build, source) if source else None


def keep_answers(folder: BuildFolder, build: str, source: Path) -> ModelAnswers | None:
    """Copy the answers in a folder, whole or not at all, to a build's folder; None when they are damaged."""
    path, manifest = source / ANSWERS, read_manifest(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        log.warning("cannot read %s: %s", path, error.strerror)
        return None
    if manifest is None or manifest.outputs.get(ANSWERS, {}).get("sha256") != hashlib.sha256(data).hexdigest():
        log.warning("%s has changed since it was made", path)
        return None
    kept = folder.served(build) / ANSWERS
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, json.loads(data))
    update_record(folder, build, answers_sha256=file_sha256(kept))
    return read_answers(kept, build)


def _evaluation_of(folder: BuildFolder, build: str) -> Path | None:
    """Return the folder of an evaluation of a build: by Ollama, known by its digest, or by llama-server."""
    record = read_record(folder, build)
    by_llama_server, by_ollama = folder.stage("evaluate"), folder.evaluation(OLLAMA)
    one, other = read_manifest(by_llama_server), read_manifest(by_ollama)
    if other and record.get("digest") and other.fields.get("digest") == record["digest"]:
        return by_ollama
    if one and record.get("evaluate") and not one.other_fields(record["evaluate"]):
        return by_llama_server
    return None
