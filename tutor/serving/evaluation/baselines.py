"""Should the model be fine-tuned? The held-out prompts, asked in several ways without training, and to the tutor.

In: the build folder of a recipe whose tutor and base are converted. Out, in `eval-baselines/`: answers.json (an entry a
prompt, with `answers` by way), a journal a way, and as the manifest's results:

    ways         by way: rates.py's summary, mean `prompt_tokens`, `tokens` and `seconds` of an answer, its `score`
    differences  from each way without training to the tutor, as the evaluate stage has them
    decision     the measure, the best and the cheapest way, whether fine-tuning pays, in one sentence (decision.py)
    left_out     by way: why it was not asked
    files        by model: the sha256 of its GGUF
    system, line, generation, language

Base and tutor have the same quantization and the same engine, llama-server, and their answers the same graders. A way
is asked again only where its prompts, its model or the code that generates have changed; grading runs again with every
change of the rest.
"""

import logging
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tutor.artifacts import provenance
from tutor.artifacts.disk import write_json
from tutor.artifacts.layout import BASELINES, BuildFolder
from tutor.artifacts.manifest import find_damage, is_made, require_stage
from tutor.artifacts.stage_folder import checkpoint_folder, log_folder, writing
from tutor.engines.answer_limit import with_answer_limit
from tutor.engines.llamacpp.server import serve
from tutor.errors import RecipeError
from tutor.formats.models.model_folder import read_facts
from tutor.formats.rows.split_files import PROMPTS, TRAIN, read_split
from tutor.graders.verdict import Record
from tutor.machine.host import usable_cores
from tutor.machine.memory.shapes import read_shape
from tutor.pipeline.recipe_folder import held
from tutor.pipeline.runner import announced
from tutor.prompt.format import asked_messages
from tutor.prompt.messages import with_line
from tutor.recipe.settings import Recipe
from tutor.serving.evaluation.compare import LEFT_OUT
from tutor.serving.evaluation.decision import Scored, choose_measure, decide, scores
from tutor.serving.evaluation.ways import Room, Row, Way, base_ways, fit, system_text
from tutor.serving.model_names import ModelChoice
from tutor.serving.models import answer_dependencies, gguf_of
from tutor.stages.evaluate import rates, stage
from tutor.stages.evaluate.asking import BASE, TUTOR_MODEL, Asking, asking

log = logging.getLogger(__name__)

JOURNALS = "journals"
"""Folder of the journals, one file a way."""
GENERATING = ("stages/evaluate/answers.py", "stages/evaluate/asking.py", "engines/llamacpp/server.py")
"""Modules whose code an answer depends on."""
COSTS = ("prompt_tokens", "tokens", "seconds")
"""Costs of an answer; None without any answer."""


@dataclass(frozen=True)
class _Model:
    """How one of the two models is asked."""

    gguf: Path
    asking: Asking
    key: Mapping[str, Any]  # what its answers depend on


def run_baselines(recipe: Recipe, build: Path, system: str | None = None) -> dict[str, Any]:
    """Ask, grade and compare, or read what was stored; return the results and `ran`.

    `system`: the system text of one of the ways; None: that of `ways.system_text`. Raises ArtifactError naming the
    missing stage, RecipeError without a converted base, ServiceError when a server cannot be kept alive.
    """
    folder = BuildFolder(build, recipe.name)
    target = folder.path / BASELINES
    recipe = with_answer_limit(recipe, folder.stage("train"))
    with held(recipe, build):
        data = require_stage(folder.stage("data"), "data")
        require_stage(folder.stage("base"), "base")
        models = {name: _model(recipe, build, name) for name in (BASE, TUTOR_MODEL)}
        training = read_split(folder.stage("data"), TRAIN)
        system = system_text(recipe, training) if system is None else system
        code = provenance.SourceTree(folder.hashes).provenance("serving/evaluation/baselines.py", left_out=LEFT_OUT)
        asked = {
            f"{name}.{key}": value
            for name, model in models.items()
            for key, value in {**asdict(model.asking.generation), "line": model.asking.line, **model.key}.items()
        }
        settings = {"language": recipe.data.language, "seed": recipe.seed, "system": [recipe.system, system]}
        fields = {"input.data": data.fingerprint, **asked, **settings, **code.fields}
        ran = not is_made(target, fields) or find_damage(target, content=True) != []
        if ran:
            with (
                announced("evaluate", "answer the prompts in several ways without training, and grade"),
                writing(target, target.name, fields) as (out, results),
            ):
                _reuse_journals(target, out)
                results.update(_compare(recipe, build, models, system, out))
        return {**require_stage(target, target.name).results, "ran": ran}


def _model(recipe: Recipe, build: Path, name: str) -> _Model:
    folder, choice = BuildFolder(build, recipe.name), ModelChoice(name)
    if name == BASE and not recipe.convert.base:
        raise RecipeError(
            f"{recipe.path} has convert.base = false: there is no base to compare with in the same quantization",
            "set convert.base = true, then: tutor convert",
        )
    way = asking(recipe, folder.stage("base"), name)
    tree = provenance.SourceTree(folder.hashes)
    code = [tree.provenance(module).code for module in GENERATING]
    served = answer_dependencies(recipe, build, choice)
    return _Model(gguf_of(recipe, build, choice), way, {**served, "template": _template(way), "code": code})


def _template(way: Asking) -> str:
    """What a prompt looks like, as one text: prompts are rendered here, by a template and its special tokens."""
    return way.prompt.render([{"role": "user", "content": "¿?"}])


def _reuse_journals(target: Path, out: Path) -> None:
    """Copy the journals of a finished run to where this one resumes: answers with an equal key are not asked again."""
    journals = checkpoint_folder(out)
    journals.mkdir(parents=True, exist_ok=True)
    for path in sorted((target / JOURNALS).glob("*.jsonl")):
        if not (journals / path.name).exists():
            shutil.copyfile(path, journals / path.name)


def _compare(recipe: Recipe, build: Path, models: Mapping[str, _Model], system: str, out: Path) -> dict[str, Any]:
    """Ask all ways, write their answers into `out`, and return the results."""
    data = BuildFolder(build, recipe.name).stage("data")
    prompts, training = read_split(data, PROMPTS), read_split(data, TRAIN)
    logs = log_folder(out)
    logs.mkdir(exist_ok=True)
    ways = base_ways(recipe, prompts, training, system)
    ways, left_out = _fitting(recipe, build, ways, models[BASE], logs)
    for name, reason in left_out.items():
        log.warning("%s is left out: %s", name, reason)
    ways.append(Way("tutor", TUTOR_MODEL, prompts, recipe.system, recipe.generate.context))
    records: dict[str, list[Record]] = {}
    for way in ways:
        model = models[way.model]
        answers = _answers(way, model, out)
        how = {"language": recipe.data.language, "kind": model.asking.prompt.kind}
        records[way.name] = stage.graded(prompts, answers, training, **how)
    write_json(out / stage.ANSWERS, stage.side_by_side(prompts, records))
    shutil.copytree(checkpoint_folder(out), out / JOURNALS)
    found = _results(prompts, ways, records, recipe.seed)
    for way in ways:
        found["ways"][way.name]["asked"] = replace(models[way.model].asking, system=way.system).text
    return {
        **found,
        "language": recipe.data.language,
        "left_out": left_out,
        "system": system,
        "line": models[BASE].asking.line,
        "generation": {name: asdict(model.asking.generation) for name, model in models.items()},
        "files": {name: model.key["sha256"] for name, model in models.items()},
    }


def _fitting(
    recipe: Recipe, build: Path, ways: Sequence[Way], base: _Model, logs: Path
) -> tuple[list[Way], dict[str, str]]:
    """The ways that fit into the context that the base was trained for, counted with its own tokenizer."""
    model = read_facts(BuildFolder(build, recipe.name).stage("base"))[1]
    context = recipe.generate.context
    room = Room(base.asking.generation.max_new_tokens, context, read_shape(model).positions or context)
    prompt = base.asking.prompt
    threads, log_file = usable_cores(), logs / "tokens.log"
    with serve(base.gguf, context=context, threads=threads, log=log_file, prompt=prompt) as server:

        def count(way: Way, row: Row) -> int:
            messages = with_line(asked_messages(prompt, row, way.system), base.asking.line)
            return len(server.tokenize(prompt.render(messages)))

        return fit(ways, room, count)


def _answers(way: Way, model: _Model, out: Path) -> list[Record]:
    """The answers of a way, from several llama-servers with the model's file."""
    file = way.name.replace(" ", "-").replace("-+-", "-")
    questions = stage.FileQuestions(way.name, file, way.prompts, way.context)
    return stage.answers_of_file(model.gguf, replace(model.asking, system=way.system), questions, model.key, out)


def _results(
    prompts: Sequence[Row], ways: Sequence[Way], records: Mapping[str, Sequence[Record]], seed: int
) -> dict[str, Any]:
    """The rates and costs of each way, the changes to the tutor, the decision."""
    measure = choose_measure(prompts)
    scored = []
    summaries = {}
    for way in ways:
        answers = [record for record in records[way.name] if "error" not in record]
        cost = {name: _mean([answer[name] for answer in answers]) for name in COSTS}
        seconds = math.inf if cost["seconds"] is None else cost["seconds"]
        scored.append(Scored(way.name, scores(prompts, records[way.name], measure), seconds, way.tuned))
        summaries[way.name] = {
            **rates.summarise(prompts, records[way.name], seed),
            **cost,
            "context": way.context,
            "score": round(scored[-1].mean, 4),
        }
    return {
        "ways": summaries,
        "differences": stage.changes_to_last(prompts, records, seed),
        "decision": decide(scored, measure, seed),
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(statistics.fmean(values), 2) if values else None
