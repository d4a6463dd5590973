"""Ask any models the prompts, judge, and compare two of them prompt by prompt.

In: names of models (models.py) or folders with answers, a recipe whose data stage has run. Out: for each model that
was asked `eval-<label>/answers.json` in the build folder, as the evaluate stage writes it but with this one model in
`answers`; it is asked again only when something changed that its answers depend on. What changed between two models
as rates.changes returns them.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import write_json
from tutor.artifacts.layout import OLLAMA, STAGE_FOLDERS, BuildFolder
from tutor.artifacts.lock import locked
from tutor.artifacts.manifest import is_made, require_stage
from tutor.artifacts.provenance import provenance
from tutor.artifacts.stage_folder import checkpoint_folder, log_folder, writing
from tutor.engines.protocol import greedy
from tutor.errors import ArtifactError, RecipeError
from tutor.formats.rows.split_files import read_rows
from tutor.pipeline.registry import BY_NAME
from tutor.pipeline.runner import announced
from tutor.recipe.settings import Recipe
from tutor.serving import publish as publishing
from tutor.serving.models import Who, identity, named, opened
from tutor.stages.evaluate import generalization, rates, stage
from tutor.stages.evaluate.answers import Task, answer_prompts

CODE = (
    "serving/compare.py",
    "serving/models.py",
    "engines/hf/engine.py",
    "engines/hf/loading.py",
    "engines/ollama/engine.py",
    *BY_NAME["evaluate"].sources,
)


@dataclass(frozen=True)
class Asked:
    """A model's answers: prompts with this model's records, and the manifest's results."""

    label: str
    prompts: list[dict[str, Any]]
    records: list[dict[str, Any]]
    results: dict[str, Any]
    ran: bool  # whether it was asked now


def published(
    recipe: Recipe, build: Path, *, host: str | None = None, adapter: bool = False, parallel: int = 1
) -> dict[str, Any]:
    """Ask the published model; the rates, and in how many answers llama-server says the same (None: not asked).

    Raises ArtifactError without the data stage, ServiceError when the model is not there or the server dies.
    """
    who = Who(publishing.served_name(recipe, adapter=adapter), None, "ollama", host)
    found = ask_published(recipe, build, who, parallel)
    theirs = BuildFolder(build, recipe.name).stage("evaluate") / stage.ANSWERS
    agreement = _agreement(theirs, found.records)
    rated = found.results["models"][OLLAMA]
    shown = {**found.results, "models": {who.model: rated}, "all": rated["all"]}
    return {"ran": found.ran, **shown, "as_llama_server": agreement}


def ask_published(recipe: Recipe, build: Path, who: Who, parallel: int = 1) -> Asked:
    """The answers of a published model, by its name or one of its tags, kept as `eval-ollama/`."""
    return _ask(recipe, build, who, OLLAMA, parallel)


def evaluate(recipe: Recipe, build: Path, whom: Sequence[Who], *, parallel: int = 1) -> dict[str, Any]:
    """Ask several models; rates of each, and what changed from the first to each of the others.

    Raises ArtifactError naming the stage that is missing, ServiceError when a server cannot be kept alive.
    """
    if len({who.label for who in whom}) < len(whom):
        raise RecipeError("a model is named twice", "name each once")
    asked = [_ask(recipe, build, who, who.label, parallel) for who in whom]
    records = {each.label: each.records for each in asked}
    result = {
        "ran": any(each.ran for each in asked),
        "models": {each.label: each.results["models"][each.label] for each in asked},
        "copied": {each.label: each.results["copied"][each.label] for each in asked},
        "differences": stage.changes_from_first(asked[0].prompts, records, recipe.seed),
    }
    return {**result, "findings": generalization.findings(result)}


def compare(recipe: Recipe, build: Path, before: str, after: str, **asking: Any) -> dict[str, Any]:
    """What changed from one model to another over the prompts that both were asked.

    Each is a folder with answers (a build, or an evaluation in it), an answers.json, or a model's name as
    answering.named takes it (`engine`, `host`), which is asked (`parallel` at a time). Raises ArtifactError where a
    file is no such file, or no prompt is common to both; for models as `evaluate`.
    """
    early, late = (_found(recipe, build, source, **asking) for source in (before, after))
    places = {prompt["instruction"]: place for place, prompt in enumerate(late.prompts)}
    common = [place for place, prompt in enumerate(early.prompts) if prompt["instruction"] in places]
    if not common:
        raise ArtifactError(
            f"{before} and {after} were asked no prompt in common", "evaluate both on the same data.eval"
        )
    prompts = [early.prompts[place] for place in common]
    theirs = [late.records[places[prompt["instruction"]]] for prompt in prompts]
    changes = rates.changes(prompts, [early.records[place] for place in common], theirs, recipe.seed)
    return {
        "before": early.label,
        "after": late.label,
        "n": len(common),
        "left_out": {"before": len(early.prompts) - len(common), "after": len(late.prompts) - len(common)},
        **changes,
    }


def _found(
    recipe: Recipe, build: Path, source: str, *, engine: str = "llamacpp", host: str | None = None, parallel: int = 1
) -> Asked:
    """The answers that a person means by a folder, a file or a name."""
    path = Path(source)
    for answers in (path / STAGE_FOLDERS["evaluate"] / stage.ANSWERS, path / stage.ANSWERS, path):
        if answers.name.endswith(".json") and answers.is_file():
            return _from_file(answers, source)
    if "/" in source and engine != "ollama" and not source.startswith("ollama:"):
        raise ArtifactError(f"{source} has no answers", "name a build folder in which tutor eval has run")
    who = named(source, engine, host)
    return _ask(recipe, build, who, who.label, parallel)


def _from_file(path: Path, label: str) -> Asked:
    """The tutor's records in an answers.json, or the only model's that it has."""
    try:
        rows = json.loads(path.read_text("utf-8"))
        names = list(rows[0]["answers"])
        name = "tutor" if "tutor" in names else names[0]
        records = [row["answers"][name] for row in rows]
        good = all(isinstance(record["passed"], bool) for record in records)
        prompts = [{"instruction": row["instruction"], "category": row["category"]} for row in rows]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise ArtifactError(
            f"{path} has no verdicts ({type(error).__name__}: {error})", "evaluate again: tutor eval"
        ) from None
    if not good:
        raise ArtifactError(f"{path} has no verdicts", "evaluate again: tutor eval")
    return Asked(label, prompts, records, {}, ran=False)


def _ask(recipe: Recipe, build: Path, who: Who, label: str, parallel: int) -> Asked:
    """Ask one model the recipe's prompts, or find what it said."""
    folder = BuildFolder(build, recipe.name)
    data = folder.stage("data")
    generation = greedy(recipe.generate, recipe.seed)
    target = folder.evaluation(label)
    with locked(folder.path):
        asked = {"input.data": require_stage(data, "data").fingerprint, "system": recipe.system}
        served = identity(recipe, build, who)
        if who.engine == "ollama" and parallel > 1:
            served["parallel"] = parallel  # a server with more than one slot batches them (stages/evaluate/answers.py)
        fields = {**asked, **asdict(generation), **served, **provenance(CODE, ())}
        ran = not is_made(target, fields)
        if ran:
            prompts = read_rows(data / "prompts.jsonl")
            training = read_rows(data / "train.jsonl")
            at_once = 1 if who.engine == "hf" or who.model == "adapter" else parallel
            number = itertools.count(1)  # of the servers that are started, each with its log
            asking = announced("evaluate", f"ask {label} the prompts and judge")
            with asking, writing(target, target.name, fields) as (out, results):
                logs = log_folder(out)
                logs.mkdir(exist_ok=True)
                task = Task(label, generation, recipe.system, checkpoint_folder(out) / "answers.jsonl", served)
                answers = answer_prompts(
                    lambda: opened(recipe, build, who, share=at_once, log=logs / f"{next(number)}.log"),
                    prompts,
                    task,
                    parallel=at_once,
                )
                records = stage.graded(prompts, answers, training)
                write_json(out / stage.ANSWERS, stage.side_by_side(prompts, {label: records}))
                results.update(served, generation=asdict(generation), models={label: rates.summarise(prompts, records)})
                results["copied"] = {label: generalization.copied_summary([record.get("copied") for record in records])}
        results = require_stage(target, target.name).results
        rows = json.loads((target / stage.ANSWERS).read_text("utf-8"))
    prompts = [{name: value for name, value in row.items() if name != "answers"} for row in rows]
    return Asked(label, prompts, [row["answers"][label] for row in rows], results, ran)


def _agreement(path: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """In how many answers Ollama and llama-server, asked by the evaluate stage, agree to the letter; None without."""
    try:
        rows = json.loads(path.read_text("utf-8"))
        theirs = [row["answers"]["tutor"].get("text") for row in rows]
    except (OSError, ValueError, KeyError):
        return None
    same = sum(text is not None and text == record.get("text") for text, record in zip(theirs, records, strict=False))
    return {"same": same, "of": len(theirs)}
