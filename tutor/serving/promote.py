"""Promote a build to `latest`, when parity passes and its answers are not significantly worse than those of latest.

In: the build folder of a recipe, builds on an Ollama server. Out: `latest` on the server; in `served/<build>/` of the
build folder, for every compared build, its answers, the comparison, and record.json: where and when it was promoted,
which build it replaced, and which refusals `--force` overrode. `tutor clean` keeps this folder: the next build is
compared with it.
"""

import datetime
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json, write_json
from tutor.artifacts.layout import OLLAMA, BuildFolder
from tutor.artifacts.manifest import read_manifest, require_stage
from tutor.engines.ollama.client import Ollama, connect
from tutor.errors import ArtifactError, GateError
from tutor.pipeline.recipe_folder import refuse_folder
from tutor.pipeline.registry import BY_NAME
from tutor.pipeline.runner import require_gate_passed
from tutor.recipe.settings import Recipe
from tutor.serving import builds, compare, ollama_parity, publish
from tutor.serving.model_names import ModelChoice
from tutor.stages.evaluate import stage as evaluate
from tutor.stages.parity.gate import refusal

log = logging.getLogger(__name__)

RECORD, COMPARISON = "record.json", "compared.json"
MAX_QUESTIONS_NAMED = 3
"""Maximum number of worse questions in an error message; compared.json lists all of them."""


def publish_and_promote(
    recipe: Recipe,
    build: Path,
    *,
    host: str | None = None,
    adapter: bool = False,
    wait: float = 5.0,
    force: bool = False,
) -> dict[str, Any]:
    """Publish the model of a build folder, compare it with `latest`, and serve it; return what was done.

    Raises as publish.publish, and GateError when it is worse: the build then stays on the server without `latest`.
    """
    result = publish.publish(recipe, build, host=host, adapter=adapter, wait=wait)
    folder = BuildFolder(build, recipe.name)
    record = folder.published(adapter=adapter)
    if not result["published"]:
        if not record.exists():
            write_json(record, {**result, "digest": _read_record(folder, result["build"]).get("digest")})
        return result
    # The evaluate stage runs the merged model: the answers of an adapter are found by its digest.
    evaluated = {} if adapter else _evaluation(recipe, folder)
    _update_record(
        folder, result["build"], digest=result["digest"], parity=result["parity"]["state"], evaluate=evaluated
    )
    promotion = _promote(recipe, build, result["tag"], host=host, force=force)
    result = {**result, "promotion": promotion}
    write_json(record, result)
    return result


def promote(
    recipe: Recipe,
    build: Path,
    published: str | None = None,
    *,
    host: str | None = None,
    adapter: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Serve the published build whose hash begins with `published` (None: the newest); return the comparison.

    Raises RecipeError without such a build, GateError when its parity failed or it is worse than `latest`.
    """
    name = builds.served_name(recipe, adapter=adapter)
    with connect(host) as server:
        found = builds.find_build(server, name, published)
        at = server.host
    promotion = _promote(recipe, build, f"{name}:{found}", host=host, force=force)
    return {"model": name, "build": found, "host": at, "promotion": promotion}


def _promote(recipe: Recipe, build: Path, tag: str, *, host: str | None, force: bool) -> dict[str, Any]:
    """Compare a tag with `latest`, make it `latest` and record that. Raises GateError when refused and not forced."""
    refuse_folder(recipe, build)
    folder = BuildFolder(build, recipe.name)
    name, _, new = tag.rpartition(":")
    with connect(host) as server:
        old, at = _served_build(server, name), server.host
        overrode = [problem] if (problem := _parity_problem(folder, server, tag)) else []
        comparison, worse = _compare_with_latest(recipe, build, tag, old, host)
        overrode += [worse] if worse else []
        if overrode and not force:
            raise GateError(overrode[0], f"to serve it all the same: tutor promote {new} --force")
        for problem in overrode:
            log.warning("forced: %s", problem)
        log.info("%s", comparison)
        builds.serve_as_latest(server, name, tag)
    promotion = {"host": at, "instead_of": old, "comparison": comparison, "forced": force, "overrode": overrode}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    before = _read_record(folder, new).get("promotions", [])
    _update_record(folder, new, promotions=[*before, {"at": now, **promotion}])
    return promotion


def _served_build(server: Ollama, name: str) -> str | None:
    """Return the build that is `latest`; "" for a model that tutor did not publish, None without a latest."""
    return next((row["build"] for row in builds.list_builds(server, name) if row[builds.LATEST]), None)


def _parity_problem(folder: BuildFolder, server: Ollama, tag: str) -> str | None:
    """Return why parity failed for a published tag; None when it passed, or is unknown in this build folder."""
    record = _read_record(folder, tag.rpartition(":")[2])
    if not record:
        log.warning("%s was not published from %s: its parity is unknown", tag, folder.path)
        return None
    parity, gguf = (read_manifest(folder.stage(name)) for name in ("parity", "convert"))
    if parity and gguf and gguf.fingerprint == parity.fields.get("input.convert") == _gguf_fingerprint(record):
        try:
            require_gate_passed(folder.stage("parity"))
        except GateError as error:
            return str(error.message)
    digest = builds.model_digest(server, tag)
    if digest != record.get("digest"):
        refused = refusal([ollama_parity.compare_digest(tag, digest or "", str(record.get("digest")))])
        return refused["message"] if refused else None
    compared = read_manifest(folder.ollama_parity)
    if compared and compared.fields.get("digest") == digest and "refused" in compared.results:
        return str(compared.results["refused"]["message"])
    return None


def _compare_with_latest(
    recipe: Recipe, build: Path, tag: str, old: str | None, host: str | None
) -> tuple[str, str | None]:
    """Return the comparison of a tag with `latest` in one line, and the reason why it must not be served, or None."""
    refuse_folder(recipe, build)
    folder = BuildFolder(build, recipe.name)
    name, _, new = tag.rpartition(":")
    if old is None:
        _keep_answers(folder, new)
        return "no build was in service before: not compared", None
    if old == new:
        return f"{tag} is in service already", None
    known = _keep_answers(folder, old) if old else None
    if known is None:
        _keep_answers(folder, new)
        return f"no answers of {name}:{old or builds.LATEST}, which is in service, are kept: not compared", None
    if _keep_answers(folder, new) is None:
        log.info("evaluating %s, to compare it with %s, which is in service", tag, old)
        compare.published_answers(recipe, build, ModelChoice(tag, None, "ollama", host))
        _keep_answers(folder, new)
    try:
        result = compare.compare_models(recipe, build, str(known), str(folder.served(new)))
    except ArtifactError as error:
        return f"not compared: {error.message}", None
    write_json(folder.served(new) / COMPARISON, {**result, "before": old, "after": new})
    line = _comparison_line(f"{name}:{old}", tag, result)
    return line, (line if result["all"]["passed"]["conclusion"] == "worse" else None)


def _comparison_line(old: str, new: str, result: Mapping[str, Any]) -> str:
    """Return a comparison in one line: rates, interval, conclusion, and the questions that got worse."""
    change = result["all"]["passed"]
    shares = " and ".join(f"{100 * change[side]['share']:.0f} %" for side in ("before", "after"))
    interval = f"{100 * change['difference']:+.0f} points [{100 * change['low']:+.0f}, {100 * change['high']:+.0f}]"
    text = f"{old}, in service, and {new} answer {shares} of {result['n']} prompts well, {interval}"
    text += f": {change['conclusion']}"
    if not (questions := result["worse"]):
        return text
    named = ", ".join(f"«{question}»" for question in questions[:MAX_QUESTIONS_NAMED])
    more = (
        f" and {len(questions) - MAX_QUESTIONS_NAMED} more ({COMPARISON})"
        if len(questions) > MAX_QUESTIONS_NAMED
        else ""
    )
    return f"{text}; {len(questions)} got worse: {named}{more}"


def _keep_answers(folder: BuildFolder, build: str) -> Path | None:
    """Return `served/<build>/` with the answers, copied from where they were stored; None when there are none."""
    kept = folder.served(build) / evaluate.ANSWERS
    if kept.is_file():
        return kept.parent
    record = _read_record(folder, build)
    by_llama_server, by_ollama = (folder.stage("evaluate"), folder.evaluation(OLLAMA))
    one, other = read_manifest(by_llama_server), read_manifest(by_ollama)
    if other and record.get("digest") and other.fields.get("digest") == record["digest"]:
        found = by_ollama
    elif one and record.get("evaluate") and not one.other_fields(record["evaluate"]):
        found = by_llama_server
    else:
        return None
    kept.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found / evaluate.ANSWERS, kept)
    return kept.parent


def _evaluation(recipe: Recipe, folder: BuildFolder) -> dict[str, Any]:
    """Return the fields of the evaluate stage's manifest that identify whose answers it holds."""
    gguf = require_stage(folder.stage("convert"), "convert")
    return {**BY_NAME["evaluate"].recipe_fields(recipe), "input.convert": gguf.fingerprint}


def _gguf_fingerprint(record: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the GGUF folder that a build was published from."""
    found: str | None = record.get("evaluate", {}).get("input.convert")
    return found


def _read_record(folder: BuildFolder, build: str) -> dict[str, Any]:
    """Return the record of a build; empty for one published from elsewhere. Raises ArtifactError when damaged."""
    path = folder.served(build) / RECORD
    return read_json(path) if path.exists() else {}


def _update_record(folder: BuildFolder, build: str, **more: Any) -> None:
    path = folder.served(build) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**_read_record(folder, build), "build": build, **more})
