"""The published tutor and its untuned base, both asked by an Ollama server: what the evaluate stage does in llama.cpp.

In: a recipe whose model is published, the base's GGUF in the served quantization (convert.base). Out: the answers of
each in `eval-ollama*/`, asked again only when what they depend on has changed, and `eval-published/` with the files
and results of the evaluate stage. The base is on the server only while it is asked. Publishes nothing.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tutor.artifacts.hashing import cached_sha256
from tutor.artifacts.layout import OLLAMA, PUBLISHED_EVALUATION, BuildFolder
from tutor.artifacts.manifest import is_made, require_stage
from tutor.artifacts.provenance import SourceTree
from tutor.artifacts.stage_folder import writing
from tutor.engines.answer_limit import with_answer_limit
from tutor.engines.ollama.client import connect
from tutor.engines.ollama.engine import serve
from tutor.errors import ArtifactError
from tutor.formats.rows.split_files import PROMPTS, read_split
from tutor.pipeline.recipe_folder import held
from tutor.recipe.settings import Recipe
from tutor.serving.builds import served_name
from tutor.serving.evaluation.compare import (
    LEFT_OUT,
    AskedModel,
    ModelAnswers,
    are_stored,
    asked_model,
    published_answers,
    stored_answers,
)
from tutor.serving.evaluation.temporary_model import temporary_model, temporary_name
from tutor.serving.model_names import ModelChoice
from tutor.serving.models import quantization_of
from tutor.stages.evaluate import stage
from tutor.stages.evaluate.asking import BASE, BASE_AS_TUTOR, TUTOR_MODEL, asking
from tutor.stages.evaluate.generalization import read_paraphrases

log = logging.getLogger(__name__)

REPHRASED = f"{OLLAMA}-paraphrased"
"""Label of the tutor's answers to paraphrased prompts."""


def evaluate_published(
    recipe: Recipe, build: Path, *, host: str | None = None, adapter: bool = False, parallel: int = 1
) -> dict[str, Any]:
    """Evaluate the published model beside its base; return the results of the evaluate stage.

    Besides: `all` are the tutor's rates; `agreement_with_llama_server` counts the tutor's answers that equal those of
    the evaluate stage, None before that stage. Raises ArtifactError without the data stage, ServiceError when the model
    is missing or the server dies.
    """
    choice = ModelChoice(served_name(recipe, adapter=adapter), None, OLLAMA, host)
    folder = BuildFolder(build, recipe.name)
    prompts = read_split(folder.stage("data"), PROMPTS)
    paraphrased = read_paraphrases(recipe, prompts)
    tuned = published_answers(recipe, build, choice, parallel)
    parts = {OLLAMA: tuned}
    if paraphrased:
        asked = asked_model(recipe, build, choice, REPHRASED, parallel, paraphrased)
        parts[REPHRASED] = stored_answers(recipe, build, asked)
    parts |= _base_answers(recipe, build, choice, parallel)
    results = _written(recipe, build, prompts, paraphrased, parts)
    theirs = folder.stage("evaluate") / stage.ANSWERS
    return {
        "ran": any(part.ran for part in parts.values()),
        **results,
        "all": results["models"][TUTOR_MODEL]["all"],
        "agreement_with_llama_server": _agreement(theirs, tuned.records),
    }


def _base_answers(recipe: Recipe, build: Path, choice: ModelChoice, parallel: int) -> dict[str, ModelAnswers]:
    """The answers of the base in both ways, by label; none without a converted base, which the log says."""
    folder = BuildFolder(build, recipe.name)
    gguf = folder.gguf("base", quantization_of(recipe, folder))
    if not gguf.is_file():
        log.warning("the untuned base is left out: no %s; set convert.base = true, then: tutor convert", gguf.name)
        return {}
    sha256 = cached_sha256(gguf, folder.hashes)
    if sha256 != require_stage(gguf.parent, "convert").outputs[gguf.name]["sha256"]:
        raise ArtifactError(f"{gguf} has changed since it was made", "run: tutor convert")
    limited = with_answer_limit(recipe, folder.stage("train"))
    with connect(choice.host) as server, ExitStack() as stack:
        served = {"file": gguf.stem, "sha256": sha256, "context": recipe.generate.context}
        served |= {"host": server.host, "version": server.version(), **({"parallel": parallel} if parallel > 1 else {})}
        name = temporary_name(choice.model)

        def model(label: str) -> AskedModel:
            way = asking(limited, folder.stage("base"), label)
            return AskedModel(
                f"{OLLAMA}-{label}",
                way,
                served,
                lambda _: serve(name, choice.host, way.prompt, raw=True),
                parallel=parallel,
            )

        models = [model(label) for label in (BASE, BASE_AS_TUTOR)]
        if not all(are_stored(recipe, build, each) for each in models):
            stack.enter_context(temporary_model(server, choice.model, gguf, sha256, recipe.generate.context))
        return {each.label: stored_answers(recipe, build, each) for each in models}


def _written(
    recipe: Recipe,
    build: Path,
    prompts: Sequence[Mapping[str, Any]],
    paraphrased: Sequence[Mapping[str, Any]],
    parts: Mapping[str, ModelAnswers],
) -> dict[str, Any]:
    """Write all answers side by side, unless that was done; return the results."""
    folder = BuildFolder(build, recipe.name)
    target, limited = folder.path / PUBLISHED_EVALUATION, with_answer_limit(recipe, folder.stage("train"))
    records = {name: parts[f"{OLLAMA}-{name}"].records for name in (BASE, BASE_AS_TUTOR) if f"{OLLAMA}-{name}" in parts}
    files = {name: str(parts[f"{OLLAMA}-{name}"].results["file"]) for name in records}
    tuned = parts[OLLAMA]
    records[TUTOR_MODEL] = [*tuned.records, *(parts[REPHRASED].records if paraphrased else ())]
    files[TUTOR_MODEL] = str(tuned.results["model"])
    with held(recipe, build):
        made = {f"input.{name}": require_stage(folder.evaluation(name), f"eval-{name}").fingerprint for name in parts}
        code = SourceTree(folder.hashes).provenance("serving/evaluation/published.py", left_out=LEFT_OUT).code
        fields = {**made, "seed": recipe.seed, "code": code}
        if not is_made(target, fields):
            with writing(target, target.name, fields) as (out, results):
                ways = {name: asking(limited, folder.stage("base"), name) for name in records}
                found = stage.Evaluated(prompts, paraphrased, ways, files, records)
                served = {name: tuned.results[name] for name in ("host", "version", "digest")}
                results.update(served, **stage.write_results(recipe, folder.stage("data"), found, out))
        return dict(require_stage(target, target.name).results)


def _agreement(path: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """Return how many answers equal those of llama-server in the evaluate stage; None before that stage."""
    try:
        rows = json.loads(path.read_text("utf-8"))
        theirs = [row["answers"]["tutor"].get("text") for row in rows]
    except (OSError, ValueError, KeyError):
        return None
    same = sum(text is not None and text == record.get("text") for text, record in zip(theirs, records, strict=False))
    return {"same": same, "of": len(theirs)}
