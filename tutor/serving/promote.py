"""Promote a build to `latest`, when parity passes and its answers are not significantly worse than those of latest.

In: the build folder of a recipe, builds on an Ollama server. Out: `latest` on the server; in `served/<build>/` of the
build folder, for every compared build, its answers, the comparison, and record.json: where and when it was promoted,
which build it replaced, and which refusals `--force` overrode. `tutor clean` keeps this folder: the next build is
compared with it.
"""

import datetime
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import write_json
from tutor.artifacts.layout import OLLAMA, BuildFolder
from tutor.artifacts.manifest import read_manifest, require_stage
from tutor.engines.ollama.client import Ollama, connect
from tutor.errors import GateError, TutorError
from tutor.pipeline.recipe_folder import refuse_folder
from tutor.pipeline.registry import BY_NAME
from tutor.pipeline.runner import require_gate_passed
from tutor.prompt.format import PromptFormat
from tutor.recipe.settings import Recipe
from tutor.serving import builds, ollama_parity, publish
from tutor.serving.build_records import (
    keep_answers,
    kept_answers,
    last_proof,
    read_record,
    record_proof,
    unproven,
    update_record,
)
from tutor.serving.evaluation import compare
from tutor.serving.model_names import ModelChoice
from tutor.serving.models import prompt_of
from tutor.stages.evaluate.references import reference_findings
from tutor.stages.parity.gate import HandOff, refusal

log = logging.getLogger(__name__)

COMPARISON = "compared.json"
"""File of the comparison of a build with the one that was `latest`."""
MIN_PROMPTS = 5
"""Minimum number of prompts of which the comparison can show a loss: with four, even four losses can be chance."""
MAX_QUESTIONS_NAMED = 3
"""Maximum number of worse questions in an error message; compared.json lists all of them."""


def publish_and_promote(  # noqa: PLR0913 - the options of the command
    recipe: Recipe,
    build: Path,
    *,
    host: str | None = None,
    adapter: bool = False,
    wait: float = 5.0,
    force: bool = False,
    unchecked: bool = False,
) -> dict[str, Any]:
    """Publish the model of a build folder, compare it with `latest`, and serve it; return what was done.

    Raises as publish.publish, and GateError when it is worse: the build then stays on the server without `latest`.
    """
    result = publish.publish(recipe, build, host=host, adapter=adapter, wait=wait, force=force, unchecked=unchecked)
    folder = BuildFolder(build, recipe.name)
    record = folder.published(adapter=adapter)
    if not result["published"]:
        if not record.exists():
            write_json(record, {**result, "digest": read_record(folder, result["build"]).get("digest")})
        return result
    # The evaluate stage runs the merged model: the answers of an adapter are found by its digest.
    evaluated = {} if adapter else _evaluation(recipe, folder)
    update_record(
        folder, result["build"], digest=result["digest"], parity=result["parity"]["state"], evaluate=evaluated
    )
    promotion = _promote(recipe, build, result["tag"], host=host, force=force, unchecked=unchecked)
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
    promotion = _promote(recipe, build, f"{name}:{found}", host=host, force=force, unchecked=False)
    return {"model": name, "build": found, "host": at, "promotion": promotion}


def _promote(
    recipe: Recipe, build: Path, tag: str, *, host: str | None, force: bool, unchecked: bool
) -> dict[str, Any]:
    """Compare a tag with `latest`, make it `latest` and record that. Raises GateError when refused and not forced.

    `unchecked`: a hand-off that was not compared is no reason to refuse.
    """
    refuse_folder(recipe, build)
    folder = BuildFolder(build, recipe.name)
    name, _, new = tag.rpartition(":")
    with connect(host) as server:
        old, at = _served_build(server, name), server.host
        problem = _parity_problem(folder, server, tag, prompt_of(recipe, folder))
        if problem is None and not unchecked and (left_out := unproven(folder, new)):
            problem = f"{tag} is not proven: {left_out}"
        overrode = [problem] if problem else []
        try:
            comparison, worse = _compare_with_latest(recipe, build, tag, old, host)
        except TutorError as error:
            if not force:
                raise
            comparison = worse = f"not compared: {error.message}"
        overrode += [worse] if worse else []
        if overrode and not force:
            raise GateError(overrode[0], f"to serve it all the same: tutor promote {new} --force")
        for problem in overrode:
            log.warning("forced: %s", problem)
        log.info("%s", comparison)
        builds.serve_as_latest(server, name, tag)
    promotion = {"host": at, "instead_of": old, "comparison": comparison, "forced": force, "overrode": overrode}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    before = read_record(folder, new).get("promotions", [])
    update_record(folder, new, promotions=[*before, {"at": now, **promotion}])
    return promotion


def _served_build(server: Ollama, name: str) -> str | None:
    """Return the build that is `latest`; "" for a model that tutor did not publish, None without a latest."""
    return next((row["build"] for row in builds.list_builds(server, name) if row[builds.LATEST]), None)


def _parity_problem(folder: BuildFolder, server: Ollama, tag: str, prompt: PromptFormat) -> str | None:
    """Return why parity failed for a published tag, or is not shown; None when it passed."""
    build = tag.rpartition(":")[2]
    record = read_record(folder, build)
    if not record.get("digest"):
        return f"{tag} was not published from {folder.path}: nothing shows its parity"
    parity, gguf = (read_manifest(folder.stage(name)) for name in ("parity", "convert"))
    is_here = bool(parity and gguf and gguf.fingerprint == parity.fields.get("input.convert") == _gguf_of(record))
    if is_here:
        try:
            require_gate_passed(folder.stage("parity"))
        except GateError as error:
            return str(error.message)
    digest = builds.model_digest(server, tag)
    if digest != record.get("digest"):
        return _refusal(ollama_parity.compare_digest(tag, digest or "", str(record.get("digest"))))
    compared = read_manifest(folder.ollama_parity)
    if compared and compared.fields.get("digest") == digest and "refused" in compared.results:
        return str(compared.results["refused"]["message"])
    return _version_problem(folder, server, tag, prompt if is_here else None)


def _version_problem(folder: BuildFolder, server: Ollama, tag: str, prompt: PromptFormat | None) -> str | None:
    """Return why a tag is not shown on this version of the server; None when it was checked there.

    A build whose GGUF and record of parity are still in the folder is compared again on another version; `prompt` is
    then the format of its prompts, else None.
    """
    version, build = server.version(), tag.rpartition(":")[2]
    checked_on = last_proof(folder, build, server.host).get("version")
    if checked_on == version:
        return None
    if prompt is None:
        return f"{tag} was checked on version {checked_on or '(unknown)'} of {server.host}, which is now {version}"
    log.info("comparing %s again: it was checked on version %s of the server", tag, checked_on or "(unknown)")
    reference = ollama_parity.read_reference(folder.stage("parity"), prompt)
    if problem := _refusal(ollama_parity.compare_model(reference, server, tag)):
        return problem
    record_proof(folder, build, server.host, {"version": version, "digest": builds.model_digest(server, tag)})
    return None


def _refusal(item: HandOff) -> str | None:
    refused = refusal([item])
    return refused["message"] if refused else None


def _compare_with_latest(
    recipe: Recipe, build: Path, tag: str, old: str | None, host: str | None
) -> tuple[str, str | None]:
    """Return the comparison of a tag with `latest` in one line, and the reason why it must not be served, or None.

    Answers that are not kept, or damaged, are asked again. Raises TutorError when that fails, or the build in service
    has answered no prompt.
    """
    folder = BuildFolder(build, recipe.name)
    name, _, new = tag.rpartition(":")
    if old is None:
        kept_answers(folder, new)
        return "no build was in service before: not compared", None
    if old == new:
        return f"{tag} is in service already", None
    if not old:
        kept_answers(folder, new)
        return f"{name}:{builds.LATEST}, which is in service, was not published by tutor: not compared", None
    before = f"{name}:{old}"
    late = kept_answers(folder, new) or _ask(recipe, build, tag, host)
    early = kept_answers(folder, old)
    if early is None or _are_disjoint(early, late):
        early = _ask(recipe, build, before, host)
    if _are_disjoint(early, late):  # the kept answers are to older prompts
        late = _ask(recipe, build, tag, host)
    answered, errors = _without_errors(early)
    if not answered.prompts:
        raise GateError(
            f"{before}, in service, has answered none of {errors} prompts: {tag} cannot be compared with it"
        )
    result = compare.compare_answers(answered, late, recipe.seed)
    write_json(folder.served(new) / COMPARISON, {**result, "before": old, "after": new, "not_answered": errors})
    line = _comparison_line(before, tag, result)
    line += f"; {errors} prompts that {before} did not answer were not compared" if errors else ""
    return line, (line if _is_worse(result) else None)


def _ask(recipe: Recipe, build: Path, tag: str, host: str | None) -> compare.ModelAnswers:
    """Evaluate a build on the server and keep its answers."""
    log.info("evaluating %s, whose answers are not kept or cannot be compared", tag)
    found = compare.published_answers(recipe, build, ModelChoice(tag, None, "ollama", host))
    folder = BuildFolder(build, recipe.name)
    keep_answers(folder, tag.rpartition(":")[2], folder.evaluation(OLLAMA))
    return found


def _are_disjoint(early: compare.ModelAnswers, late: compare.ModelAnswers) -> bool:
    return {prompt["instruction"] for prompt in early.prompts}.isdisjoint(row["instruction"] for row in late.prompts)


def _without_errors(answers: compare.ModelAnswers) -> tuple[compare.ModelAnswers, int]:
    """Return the answers without those that ended with an error, and the number of errors.

    An error of the build in service is no failed prompt: a worse build could hide behind it.
    """
    places = [place for place, record in enumerate(answers.records) if "error" not in record]
    prompts, records = ([rows[place] for place in places] for rows in (answers.prompts, answers.records))
    return replace(answers, prompts=prompts, records=records), len(answers.records) - len(places)


def _is_worse(result: Mapping[str, Any]) -> bool:
    """Return whether a comparison shows a loss, or a loss that too few prompts can show."""
    change = result["all"]["passed"]
    is_loss = not change["difference"] >= 0
    overlap_fell = (result.get("reference") or {}).get("conclusion") == "worse"
    return bool(change["conclusion"] == "worse" or overlap_fell or (is_loss and result["n"] < MIN_PROMPTS))


def _comparison_line(old: str, new: str, result: Mapping[str, Any]) -> str:
    """Return a comparison in one line: rates, interval, conclusion, and the questions that got worse."""
    change = result["all"]["passed"]
    shares = " and ".join(f"{100 * change[side]['share']:.0f} %" for side in ("before", "after"))
    interval = f"{100 * change['difference']:+.0f} points [{100 * change['low']:+.0f}, {100 * change['high']:+.0f}]"
    text = f"{old}, in service, and {new} answer {shares} of {result['n']} prompts well, {interval}"
    text += f": {change['conclusion']}"
    ways = [way for way in result.get("asked", {}).values() if way]
    text += f"; asked in different ways: {ways[0]}, then {ways[1]}" if len(set(ways)) > 1 else ""
    text += "".join(f"; {found['text']}" for found in reference_findings(f"{old} to {new}", result))
    if result["n"] < MIN_PROMPTS:
        text += f"; {result['n']} prompts are too few to show a loss"
    if not (questions := result["worse"]):
        return text
    named = ", ".join(f"«{question}»" for question in questions[:MAX_QUESTIONS_NAMED])
    more = (
        f" and {len(questions) - MAX_QUESTIONS_NAMED} more ({COMPARISON})"
        if len(questions) > MAX_QUESTIONS_NAMED
        else ""
    )
    return f"{text}; {len(questions)} got worse: {named}{more}"


def _evaluation(recipe: Recipe, folder: BuildFolder) -> dict[str, Any]:
    """Return the fields of the evaluate stage's manifest that identify whose answers it holds."""
    gguf = require_stage(folder.stage("convert"), "convert")
    return {**BY_NAME["evaluate"].recipe_fields(recipe), "input.convert": gguf.fingerprint}


def _gguf_of(record: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the GGUF folder that a build was published from."""
    found: str | None = record.get("evaluate", {}).get("input.convert")
    return found
