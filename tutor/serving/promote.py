"""Which build is served: a new one takes its place only when parity is green and its answers are not shown to be worse.

In: a recipe's build folder, builds on an Ollama server. Out: `latest` on the server; in `served/<build>/` of the build
folder, for every build that was weighed, its answers, how it compared, and record.json: where and when it was
promoted, instead of what, and what `--force` overrode. Kept by `tutor clean`: the next build is weighed against it.
"""

import datetime
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import write_json
from tutor.artifacts.layout import OLLAMA, BuildFolder
from tutor.artifacts.manifest import read_manifest, require_stage
from tutor.engines.ollama.client import Ollama, connect
from tutor.errors import ArtifactError, GateError
from tutor.formats.models.model_folder import read_json
from tutor.pipeline.registry import BY_NAME
from tutor.pipeline.runner import pass_gate
from tutor.recipe.settings import Recipe
from tutor.serving import builds as stage
from tutor.serving import compare as evaluating
from tutor.serving import ollama_parity as parity_ollama
from tutor.serving import publish as publishing
from tutor.serving.models import Who
from tutor.stages.evaluate import stage as evaluate
from tutor.stages.parity.gate import refusal

log = logging.getLogger(__name__)

RECORD, COMPARED = "record.json", "compared.json"
NAMED = 3
"""How many questions that got worse an error names; compared.json has them all."""


def publish(
    recipe: Recipe,
    build: Path,
    *,
    host: str | None = None,
    adapter: bool = False,
    wait: float = 5.0,
    force: bool = False,
) -> dict[str, Any]:
    """Publish what the stages made, weigh it against what is in service, and serve it; what was done.

    Raises as publishing.publish, and GateError where it is worse: it stays on the server under its build alone.
    """
    result = publishing.publish(recipe, build, host=host, adapter=adapter, wait=wait, serve=False)
    folder = BuildFolder(build, recipe.name)
    record = folder.published(adapter=adapter)
    if not result["published"]:
        if not record.exists():
            write_json(record, {**result, "digest": _record(folder, result["build"]).get("digest")})
        return result
    # What the stages asked is the merged model: an adapter's answers are known by its digest alone.
    evaluated = {} if adapter else _evaluation(recipe, folder)
    _note(folder, result["build"], digest=result["digest"], parity=result["parity"]["state"], evaluate=evaluated)
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
    """Serve a published build, by the beginning of its hash, or (None) the newest one; what it was weighed against.

    Raises RecipeError for no such build, GateError where parity is red or it is worse than what is in service.
    """
    name = publishing.served_name(recipe, adapter=adapter)
    with connect(host) as server:
        found = stage.find(server, name, published)
        at = server.host
    promotion = _promote(recipe, build, f"{name}:{found}", host=host, force=force)
    return {"model": name, "build": found, "host": at, "promotion": promotion}


def _promote(recipe: Recipe, build: Path, tag: str, *, host: str | None, force: bool) -> dict[str, Any]:
    """Weigh a tag, make it `latest` and record that. Raises GateError where a gate says no and nothing forces it."""
    folder = BuildFolder(build, recipe.name)
    name, _, new = tag.partition(":")
    with connect(host) as server:
        old, at = _in_service(server, name), server.host
        overrode = [problem] if (problem := _parity_problem(folder, server, tag)) else []
        said, worse = _weigh(recipe, build, tag, old, host)
        overrode += [worse] if worse else []
        if overrode and not force:
            raise GateError(overrode[0], f"to serve it all the same: tutor promote {new} --force")
        for problem in overrode:
            log.warning("forced: %s", problem)
        log.info("%s", said)
        stage.switch(server, name, tag)
    promotion = {"host": at, "instead_of": old, "said": said, "forced": force, "overrode": overrode}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    before = _record(folder, new).get("promotions", [])
    _note(folder, new, promotions=[*before, {"at": now, **promotion}])
    return promotion


def _in_service(server: Ollama, name: str) -> str | None:
    """The build that is `latest` now; an empty text for a model that tutor did not publish, None for none."""
    return next((row["build"] for row in stage.models(server, name) if row[stage.LATEST]), None)


def _parity_problem(folder: BuildFolder, server: Ollama, tag: str) -> str | None:
    """Why parity is red for a published tag, as far as this build folder knows it."""
    record = _record(folder, tag.partition(":")[2])
    if not record:
        log.warning("%s was not published from %s: whether its parity is green is not known", tag, folder.path)
        return None
    parity, gguf = (read_manifest(folder.stage(name)) for name in ("parity", "convert"))
    if parity and gguf and gguf.fingerprint == parity.fields.get("input.convert") == _made_of(record):
        try:
            pass_gate(folder.stage("parity"))
        except GateError as error:
            return str(error.message)
    digest = stage.digest_of(server, tag)
    if digest != record.get("digest"):
        refused = refusal([parity_ollama.identity(tag, digest or "", str(record.get("digest")))])
        return refused["message"] if refused else None
    compared = read_manifest(folder.ollama_parity)
    if compared and compared.fields.get("digest") == digest and "refused" in compared.results:
        return str(compared.results["refused"]["message"])
    return None


def _weigh(recipe: Recipe, build: Path, tag: str, old: str | None, host: str | None) -> tuple[str, str | None]:
    """What is said of a tag beside what is in service, and (None: nothing) why it must not take its place."""
    folder = BuildFolder(build, recipe.name)
    name, _, new = tag.partition(":")
    if old is None:
        _keep_answers(folder, new)
        return "nothing was in service", None
    if old == new:
        return f"{tag} is in service already", None
    known = _keep_answers(folder, old) if old else None
    if known is None:
        _keep_answers(folder, new)
        return f"no answers of {name}:{old or stage.LATEST}, which is in service, are kept: not compared", None
    if _keep_answers(folder, new) is None:
        log.info("asking %s, which was not evaluated: %s is, and is in service", tag, old)
        evaluating.ask_published(recipe, build, Who(tag, None, "ollama", host))
        _keep_answers(folder, new)
    try:
        result = evaluating.compare(recipe, build, str(known), str(folder.served(new)))
    except ArtifactError as error:
        return f"not compared: {error.message}", None
    write_json(folder.served(new) / COMPARED, {**result, "before": old, "after": new})
    said = _said(f"{name}:{old}", tag, result)
    return said, (said if result["all"]["passed"]["conclusion"] == "worse" else None)


def _said(old: str, new: str, result: Mapping[str, Any]) -> str:
    """A comparison in a line: shares, interval, verdict, and which questions got worse."""
    change = result["all"]["passed"]
    shares = " and ".join(f"{100 * change[side]['share']:.0f} %" for side in ("before", "after"))
    interval = f"{100 * change['difference']:+.0f} points [{100 * change['low']:+.0f}, {100 * change['high']:+.0f}]"
    text = f"{old}, in service, and {new} answer {shares} of {result['n']} prompts well, {interval}"
    text += f": {change['conclusion']}"
    if not (questions := result["worse"]):
        return text
    named = ", ".join(f"«{question}»" for question in questions[:NAMED])
    more = f" and {len(questions) - NAMED} more ({COMPARED})" if len(questions) > NAMED else ""
    return f"{text}; {len(questions)} got worse: {named}{more}"


def _keep_answers(folder: BuildFolder, build: str) -> Path | None:
    """`served/<build>/` with its answers, found where a stage or a command left them; None where they are not known."""
    kept = folder.served(build) / evaluate.ANSWERS
    if kept.is_file():
        return kept.parent
    record = _record(folder, build)
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
    """Those fields of the evaluate stage's manifest that say whose answers they are."""
    gguf = require_stage(folder.stage("convert"), "convert")
    return {**BY_NAME["evaluate"].recipe_fields(recipe), "input.convert": gguf.fingerprint}


def _made_of(record: Mapping[str, Any]) -> str | None:
    """The fingerprint of the GGUFs that a build is one of."""
    found: str | None = record.get("evaluate", {}).get("input.convert")
    return found


def _record(folder: BuildFolder, build: str) -> dict[str, Any]:
    """What is noted of a build; nothing, where it was published from elsewhere. Raises ArtifactError when damaged."""
    path = folder.served(build) / RECORD
    return read_json(path) if path.exists() else {}


def _note(folder: BuildFolder, build: str, **more: Any) -> None:
    path = folder.served(build) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**_record(folder, build), "build": build, **more})
