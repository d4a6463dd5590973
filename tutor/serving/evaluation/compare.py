"""Evaluate any model on the held-out prompts, and compare two models prompt by prompt.

In: names of models (models.py) or folders with answers, a recipe whose data stage has run. Out: `eval-<label>/` in the
build folder for each model, with an answers.json like that of the evaluate stage for this one model; a model runs
again only when what its answers depend on has changed. The changes between two models, as stages/evaluate/rates.py
computes them.
"""

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tutor.artifacts import provenance
from tutor.artifacts.disk import write_json
from tutor.artifacts.hashing import json_sha256
from tutor.artifacts.layout import OLLAMA, STAGE_FOLDERS, BuildFolder
from tutor.artifacts.manifest import find_damage, find_manifest, is_made, require_stage
from tutor.artifacts.stage_folder import checkpoint_folder, log_folder, writing
from tutor.engines.answer_limit import with_answer_limit
from tutor.engines.protocol import Engine
from tutor.errors import ArtifactError, RecipeError
from tutor.formats.rows.split_files import PROMPTS, TRAIN, read_split
from tutor.pipeline.recipe_folder import held
from tutor.pipeline.runner import announced
from tutor.prompt.messages import row_messages
from tutor.recipe.settings import Recipe
from tutor.serving.model_names import ModelChoice, parse_model
from tutor.serving.models import answer_dependencies, gpu_notice, open_engine
from tutor.stages.evaluate import generalization, rates, stage
from tutor.stages.evaluate.answers import Task, answer_prompts
from tutor.stages.evaluate.asking import Asking, asking

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


@dataclass(frozen=True)
class AskedModel:
    """A model to ask: how, by which engine, and what its answers depend on."""

    label: str  # of its answers' folder
    way: Asking
    served: Mapping[str, Any]  # what the answers depend on, besides prompts and sampling: JSON values
    start: Callable[[Path], AbstractContextManager[Engine]]  # an engine with this log file
    parallel: int = 1  # number of engines that run at a time
    prompts: Sequence[Mapping[str, Any]] | None = None  # None: those of the recipe
    notice: Callable[[], str | None] = lambda: None  # a warning before the first question


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
    return stored_answers(recipe, build, asked_model(recipe, build, choice, label, parallel))


def asked_model(
    recipe: Recipe,
    build: Path,
    choice: ModelChoice,
    label: str,
    parallel: int,
    prompts: Sequence[Mapping[str, Any]] | None = None,
) -> AskedModel:
    """Return how the model of a name is asked, and what its answers depend on. `prompts`: None for the recipe's."""
    folder = BuildFolder(build, recipe.name)
    require_stage(folder.stage("data"), "data")  # the first of the stages that it needs
    recipe = with_answer_limit(recipe, folder.stage("train"))
    served = answer_dependencies(recipe, build, choice)
    if choice.engine == "ollama" and parallel > 1:
        served["parallel"] = parallel  # a server with several slots batches prompts (stages/evaluate/answers.py)
    at_once = 1 if choice.engine == "hf" or choice.model == "adapter" else parallel
    return AskedModel(
        label,
        asking(recipe, folder.stage("base"), choice.asked),
        served,
        lambda log_file: open_engine(recipe, build, choice, share=at_once, log=log_file),
        parallel=at_once,
        prompts=prompts,
        notice=lambda: gpu_notice(choice),
    )


def stored_answers(recipe: Recipe, build: Path, asked: AskedModel) -> ModelAnswers:
    """Return the answers of a model that are stored in `eval-<label>/`, or ask the model.

    Raises ArtifactError without the data stage, ServiceError when a server cannot be kept alive.
    """
    target = BuildFolder(build, recipe.name).evaluation(asked.label)
    with held(recipe, build):
        fields = _fields(recipe, build, asked)
        ran = not _is_whole(target, fields)
        if ran:
            if notice := asked.notice():
                log.warning("%s", notice)
            announcement = announced("evaluate", f"answer the prompts with {asked.label} and grade")
            with announcement, writing(target, target.name, fields) as (out, results):
                results.update(_answer_and_grade(recipe, build, asked, out))
        results = require_stage(target, target.name).results
        return replace(read_answers(target / stage.ANSWERS, asked.label), results=results, ran=ran)


def are_stored(recipe: Recipe, build: Path, asked: AskedModel) -> bool:
    """Whether the answers of a model are stored, so that it need not be asked."""
    target = BuildFolder(build, recipe.name).evaluation(asked.label)
    return _is_whole(target, _fields(recipe, build, asked))


def _is_whole(target: Path, fields: Mapping[str, Any]) -> bool:
    return is_made(target, fields) and find_damage(target, content=True) == []


def _fields(recipe: Recipe, build: Path, asked: AskedModel) -> dict[str, Any]:
    """All that the graded answers depend on."""
    folder, way = BuildFolder(build, recipe.name), asked.way
    data = require_stage(folder.stage("data"), "data").fingerprint
    how = {"system": way.system, "line": way.line, "asked": way.text, **asdict(way.generation)}
    given = {} if asked.prompts is None else {"prompts": json_sha256(list(asked.prompts))}
    tree = provenance.SourceTree(folder.hashes)
    code = tree.provenance("serving/evaluation/compare.py", left_out=LEFT_OUT).code
    return {"input.data": data, "language": recipe.data.language, **how, **given, **asked.served, "code": code}


def _answer_and_grade(recipe: Recipe, build: Path, asked: AskedModel, out: Path) -> dict[str, Any]:
    """Ask a model and write its graded answers to `out`; return the results."""
    data, way = BuildFolder(build, recipe.name).stage("data"), asked.way
    prompts = read_split(data, PROMPTS) if asked.prompts is None else list(asked.prompts)
    number = itertools.count(1)  # numbers the log files: one for each started server
    logs = log_folder(out)
    logs.mkdir(exist_ok=True)
    journal = checkpoint_folder(out) / "answers.jsonl"
    task = Task(asked.label, way.generation, way.system, journal, asked.served, way.prompt, way.line)
    answers = answer_prompts(lambda: asked.start(logs / f"{next(number)}.log"), prompts, task, parallel=asked.parallel)
    language = recipe.data.language
    records = stage.graded(prompts, answers, read_split(data, TRAIN), language=language, kind=way.prompt.kind)
    write_json(out / stage.ANSWERS, stage.side_by_side(prompts, {task.name: records}))
    return {
        **asked.served,
        "generation": asdict(way.generation),
        "language": language,
        "models": {task.name: {"asked": way.text, **rates.summarise(prompts, records, recipe.seed)}},
        "copied": {task.name: generalization.copied_summary([record.get("copied") for record in records])},
    }
