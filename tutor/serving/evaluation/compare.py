"""Evaluate any model on the held-out prompts, and compare two models prompt by prompt.

In: names of models (models.py) or folders with answers, a recipe whose data stage has run. Out: `eval-<label>/` in the
build folder for each model, with an answers.json like that of the evaluate stage for this one model; a model runs
again only when what its answers depend on has changed. The changes between two models, as stages/evaluate/rates.py
computes them.
"""

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tutor.artifacts import provenance
from tutor.artifacts.disk import write_json
from tutor.artifacts.layout import OLLAMA, STAGE_FOLDERS, BuildFolder
from tutor.artifacts.manifest import find_damage, find_manifest, is_made, require_stage
from tutor.artifacts.stage_folder import checkpoint_folder, log_folder, writing
from tutor.engines.answer_limit import with_answer_limit
from tutor.errors import ArtifactError, RecipeError
from tutor.formats.rows.split_files import PROMPTS, TRAIN, read_split
from tutor.pipeline.recipe_folder import held
from tutor.pipeline.runner import announced
from tutor.prompt.messages import row_messages
from tutor.recipe.settings import Recipe
from tutor.serving.builds import served_name
from tutor.serving.model_names import ModelChoice, parse_model
from tutor.serving.models import answer_dependencies, gpu_notice, open_engine
from tutor.stages.evaluate import generalization, rates, stage
from tutor.stages.evaluate.answers import Task, answer_prompts
from tutor.stages.evaluate.asking import asking

log = logging.getLogger(__name__)

LEFT_OUT = (*provenance.LEFT_OUT, "pipeline", "serving/builds.py")
"""Modules that no answer depends on, beside those of every key: the order of the stages, and names on a server."""


@dataclass(frozen=True)
class ModelAnswers:
    """Answers of one model: the prompts, its graded answers, and the results of the manifest."""

    label: str
    prompts: list[dict[str, Any]]
    records: list[dict[str, Any]]
    results: dict[str, Any]
    ran: bool  # whether the model ran now

    @property
    def asked(self) -> str:
        """How the model was asked, in words; "" where that is not recorded."""
        models = self.results.get("models", {})
        found = models.get(self.label) or models.get("tutor") or {}
        return str(found.get("asked", ""))


def evaluate_published(
    recipe: Recipe, build: Path, *, host: str | None = None, adapter: bool = False, parallel: int = 1
) -> dict[str, Any]:
    """Evaluate the published model; return its rates, and how many answers equal those of llama-server.

    That number is None before the evaluate stage has run. Raises ArtifactError without the data stage, ServiceError
    when the model is missing or the server dies.
    """
    choice = ModelChoice(served_name(recipe, adapter=adapter), None, "ollama", host)
    found = published_answers(recipe, build, choice, parallel)
    theirs = BuildFolder(build, recipe.name).stage("evaluate") / stage.ANSWERS
    agreement = _agreement(theirs, found.records)
    rated = found.results["models"][OLLAMA]
    results = {**found.results, "models": {choice.model: rated}, "all": rated["all"]}
    return {"ran": found.ran, **results, "agreement_with_llama_server": agreement}


def published_answers(recipe: Recipe, build: Path, choice: ModelChoice, parallel: int = 1) -> ModelAnswers:
    """Return the answers of a published model, by its name or one of its tags, stored in `eval-ollama/`."""
    return _answers(recipe, build, choice, OLLAMA, parallel)


def evaluate_models(
    recipe: Recipe, build: Path, choices: Sequence[ModelChoice], *, parallel: int = 1
) -> dict[str, Any]:
    """Evaluate several models; return the rates of each, and the differences of the others from the first.

    Raises ArtifactError naming the missing stage, ServiceError when a server cannot be kept alive.
    """
    if len({choice.label for choice in choices}) < len(choices):
        raise RecipeError("a model is named twice", "name each once")
    answered = [_answers(recipe, build, choice, choice.label, parallel) for choice in choices]
    records = {each.label: each.records for each in answered}
    result = {
        "ran": any(each.ran for each in answered),
        "models": {each.label: each.results["models"][each.label] for each in answered},
        "copied": {each.label: each.results["copied"][each.label] for each in answered},
        "language": recipe.data.language,
        "differences": stage.changes_from_first(answered[0].prompts, records, recipe.seed),
    }
    return {**result, "findings": generalization.findings(result)}


def compare_models(recipe: Recipe, build: Path, before: str, after: str, **engine_settings: Any) -> dict[str, Any]:
    """Compare two models over the prompts that both have answered.

    Each is a folder with answers (a build, or an evaluation in it), an answers.json, or the name of a model for
    `parse_model` with `engine` and `host`; that model then runs, `parallel` prompts at a time. Raises
    ArtifactError for a file of another form, or when no prompt is common to both; for models as `evaluate_models`.
    """
    early, late = (_answers_of(recipe, build, source, **engine_settings) for source in (before, after))
    return compare_answers(early, late, recipe.seed)


def compare_answers(early: ModelAnswers, late: ModelAnswers, seed: int) -> dict[str, Any]:
    """Compare the answers of two models to their common prompts. Raises ArtifactError when they have none."""
    places = {_conversation(prompt): place for place, prompt in enumerate(late.prompts)}
    common = [place for place, prompt in enumerate(early.prompts) if _conversation(prompt) in places]
    if not common:
        raise ArtifactError(
            f"{early.label} and {late.label} have no prompt in common", "evaluate both on the same prompts"
        )
    prompts = [early.prompts[place] for place in common]
    theirs = [late.records[places[_conversation(prompt)]] for prompt in prompts]
    changes = rates.changes(prompts, [early.records[place] for place in common], theirs, seed)
    return {
        "before": early.label,
        "after": late.label,
        "asked": {"before": early.asked, "after": late.asked},
        "n": len(common),
        "language": _common_language(early, late),
        "left_out": {"before": len(early.prompts) - len(common), "after": len(late.prompts) - len(common)},
        **changes,
    }


def _conversation(prompt: Mapping[str, Any]) -> str:
    """All that a prompt asks, as one text."""
    return json.dumps(row_messages(prompt, ""), ensure_ascii=False)


def _common_language(early: ModelAnswers, late: ModelAnswers) -> str:
    """Return the language in which both were graded; "" where it differs or was not recorded."""
    languages = {each.results.get("language", "") for each in (early, late)}
    return languages.pop() if len(languages) == 1 else ""


def _answers_of(
    recipe: Recipe, build: Path, source: str, *, engine: str = "llamacpp", host: str | None = None, parallel: int = 1
) -> ModelAnswers:
    """Return the answers in a folder or a file, or those of the model with this name."""
    path = Path(source)
    for answers in (path / STAGE_FOLDERS["evaluate"] / stage.ANSWERS, path / stage.ANSWERS, path):
        if answers.name.endswith(".json") and answers.is_file():
            return read_answers(answers, source)
    if "/" in source and engine != "ollama" and not source.startswith("ollama:"):
        raise ArtifactError(f"{source} has no answers", "name a build folder in which tutor eval has run")
    choice = parse_model(source, engine, host)
    return _answers(recipe, build, choice, choice.label, parallel)


def read_answers(path: Path, label: str) -> ModelAnswers:
    """Return the answers of the tutor in an answers.json, or those of the first model in it.

    Raises ArtifactError for a file of another form.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))
        names = list(rows[0]["answers"])
        name = "tutor" if "tutor" in names else names[0]
        records = [row["answers"][name] for row in rows]
        good = all(isinstance(record["passed"], bool) for record in records)
        good &= all(isinstance(record.get("verdicts", {}), dict) for record in records)
        good &= all(isinstance(row["instruction"], str) for row in rows)
        prompts = [
            {
                **{name: row[name] for name in ("instruction", "category")},
                "history": list(row.get("history", ())),
                "reference": str(row.get("reference", "")),
            }
            for row in rows
        ]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ArtifactError(
            f"{path} has no verdicts ({type(error).__name__}: {error})", "evaluate again: tutor eval"
        ) from None
    if not good:
        raise ArtifactError(f"{path} has no verdicts", "evaluate again: tutor eval")
    manifest = find_manifest(path.parent)
    return ModelAnswers(label, prompts, records, dict(manifest.results) if manifest else {}, ran=False)


def _answers(recipe: Recipe, build: Path, choice: ModelChoice, label: str, parallel: int) -> ModelAnswers:
    """Return the stored answers of a model to the prompts of the recipe, or run the model."""
    folder = BuildFolder(build, recipe.name)
    recipe = with_answer_limit(recipe, folder.stage("train"))
    way = asking(recipe, folder.stage("base"), choice.asked)
    target = folder.evaluation(label)
    with held(recipe, build):
        data = require_stage(folder.stage("data"), "data").fingerprint
        served = answer_dependencies(recipe, build, choice)
        if choice.engine == "ollama" and parallel > 1:
            served["parallel"] = parallel  # a server with several slots batches prompts (stages/evaluate/answers.py)
        how = {"system": way.system, "line": way.line, "asked": way.text, **asdict(way.generation)}
        tree = provenance.SourceTree(folder.hashes)
        code = tree.provenance("serving/evaluation/compare.py", left_out=LEFT_OUT).code
        fields = {"input.data": data, "language": recipe.data.language, **how, **served, "code": code}
        ran = not is_made(target, fields) or find_damage(target, content=True) != []
        if ran:
            if notice := gpu_notice(choice):
                log.warning("%s", notice)
            announcement = announced("evaluate", f"answer the prompts with {label} and grade")
            with announcement, writing(target, target.name, fields) as (out, results):
                journal = checkpoint_folder(out) / "answers.jsonl"
                task = Task(label, way.generation, way.system, journal, served, way.prompt, way.line)
                found = _answer_and_grade(recipe, build, choice, task, out, parallel)
                found["models"][label]["asked"] = way.text
                results.update(found)
        results = require_stage(target, target.name).results
        return replace(read_answers(target / stage.ANSWERS, label), results=results, ran=ran)


def _answer_and_grade(
    recipe: Recipe, build: Path, choice: ModelChoice, task: Task, out: Path, parallel: int
) -> dict[str, Any]:
    """Run a model on the prompts of the recipe and write its graded answers to `out`; return the results."""
    data = BuildFolder(build, recipe.name).stage("data")
    prompts, training = read_split(data, PROMPTS), read_split(data, TRAIN)
    at_once = 1 if choice.engine == "hf" or choice.model == "adapter" else parallel
    number = itertools.count(1)  # numbers the log files: one for each started server
    logs = log_folder(out)
    logs.mkdir(exist_ok=True)
    answers = answer_prompts(
        lambda: open_engine(recipe, build, choice, share=at_once, log=logs / f"{next(number)}.log"),
        prompts,
        task,
        parallel=at_once,
    )
    language = recipe.data.language
    records = stage.graded(prompts, answers, training, language=language, kind=task.prompt.kind)
    write_json(out / stage.ANSWERS, stage.side_by_side(prompts, {task.name: records}))
    return {
        **task.key,
        "generation": asdict(task.generation),
        "language": language,
        "models": {task.name: rates.summarise(prompts, records, recipe.seed)},
        "copied": {task.name: generalization.copied_summary([record.get("copied") for record in records])},
    }


def _agreement(path: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """Return how many answers equal those of llama-server in the evaluate stage; None before that stage."""
    try:
        rows = json.loads(path.read_text("utf-8"))
        theirs = [row["answers"]["tutor"].get("text") for row in rows]
    except (OSError, ValueError, KeyError):
        return None
    same = sum(text is not None and text == record.get("text") for text, record in zip(theirs, records, strict=False))
    return {"same": same, "of": len(theirs)}
