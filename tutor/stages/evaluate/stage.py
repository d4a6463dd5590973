"""The evaluate stage: answers of the base and the tutor to every prompt, their verdicts, and the figures.

The base is asked twice: as a person would ask it ("base"), and as the tutor is ("base-as-tutor"; asking.py).

In: data/ (prompts, train and held-out rows), base/, gguf/ (the GGUF files), ladder/ (the served quantization), adapter/
(its longest answer), the file of the recipe's evaluate.paraphrases. Out, in eval/:

    answers.json     a list, an entry a prompt: the prompt's own keys (instruction, category, topic, code, expect, line)
                     and `answers`: by model ("base", "base-as-tutor", "tutor") a record (graders/verdict.py) with
                     `copied`
    paraphrased.json the same structure for the paraphrased prompts, each with its `original`; "tutor" only

and as the manifest's results:

    language         of the recipe: an ISO 639-1 code, or "any"
    models           by model: `file`, `asked` (how, in words), `all` and `categories` (rates.py), `characters`,
                     `tokens_per_second`
    differences      from the base to the tutor, from the base as tutor to the tutor: a list of `before`, `after` and
                     the keys of rates.changes
    paraphrases      a change (rates.py), from the prompts to their paraphrases; None without evaluate.paraphrases
    copied           by model, and for the held-out rows: the longest passages shared with a training row
    findings         the results as sentences: `conclusion` (better, worse, no difference shown) and `text`

Does not decide whether the model is good enough.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import write_json
from tutor.artifacts.hashing import file_sha256
from tutor.artifacts.layout import gguf_name
from tutor.artifacts.manifest import read_manifest
from tutor.artifacts.stage_folder import checkpoint_folder, log_folder
from tutor.engines.answer_limit import with_answer_limit
from tutor.engines.llamacpp.build import build_key
from tutor.engines.llamacpp.server import serve
from tutor.engines.protocol import Engine
from tutor.errors import ArtifactError
from tutor.formats.models.served_quantization import served_quantization
from tutor.formats.rows.split_files import HELD_OUT, PROMPTS, TRAIN, read_split
from tutor.graders.code import wants_code
from tutor.graders.typescript.install import find_compiler
from tutor.graders.verdict import Record, grade
from tutor.machine.host import usable_cores
from tutor.stages.evaluate import generalization, rates
from tutor.stages.evaluate.answers import Task, answer_prompts
from tutor.stages.evaluate.asking import BASE, BASE_AS_TUTOR, TUTOR_MODEL, Asking, asking

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

ANSWERS = "answers.json"
"""File of the answers to the prompts."""
SERVERS = 2
"""Maximum number of llama-servers that answer at a time, each with its share of the cores. The answers are equal. Two
threads of one server wait for each other at every layer: on two cores (Zen 5, the demo's Q4_K_M) one server generates
138 tokens/s, and each of two 112."""
PARAPHRASED = "paraphrased.json"
"""File of the answers to the paraphrased prompts."""


@dataclass(frozen=True)
class Evaluated:
    """The graded answers of all models to the same prompts, in the order of the columns; the tutor's are the last."""

    prompts: Sequence[Mapping[str, Any]]
    paraphrased: Sequence[Mapping[str, Any]]
    ways: Mapping[str, Asking]  # by model, as the other fields
    files: Mapping[str, str]
    records: Mapping[str, Sequence[Record]]  # the tutor's also to the paraphrased prompts, behind the others


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Answer and grade; write the answers into `out` and return the results listed above.

    Raises ArtifactError when a file is missing, ServiceError when a model's server cannot be kept alive (its answers
    so far are kept beside `out` for the next run), HostError when prompts expect code and the compiler is not
    installed, DataError for the file of paraphrases.
    """
    recipe = with_answer_limit(recipe, inputs["train"])
    prompts = read_split(inputs["data"], PROMPTS)
    if any(map(wants_code, prompts)):
        find_compiler()  # before the answers, which take long
    paraphrased = generalization.read_paraphrases(recipe, prompts)
    served = served_quantization(recipe.ollama.quantization, inputs["ladder"])
    files = served_files(inputs["convert"], served, base=recipe.convert.base)
    training = read_split(inputs["data"], TRAIN)
    records: dict[str, list[Record]] = {}
    ways = {name: asking(recipe, inputs["base"], name) for name in files}
    for name, way in ways.items():
        asked = [*prompts, *paraphrased] if name == TUTOR_MODEL else prompts
        answers = _answers(recipe, name, way, files[name], out, asked)
        how = {"language": recipe.data.language, "kind": way.prompt.kind}
        records[name] = graded(asked, answers, training, **how)
    names = {name: path.stem for name, path in files.items()}
    return write_results(recipe, inputs["data"], Evaluated(prompts, paraphrased, ways, names, records), out)


def write_results(recipe: "Recipe", data: Path, found: Evaluated, out: Path) -> dict[str, Any]:
    """Write the answers side by side into `out`; return the results listed above. `data`: folder of the data stage."""
    prompts, paraphrased, tuned = found.prompts, found.paraphrased, found.records[TUTOR_MODEL]
    plain = {name: records[: len(prompts)] for name, records in found.records.items()}
    write_json(out / ANSWERS, side_by_side(prompts, plain))
    write_json(out / PARAPHRASED, side_by_side(paraphrased, {TUTOR_MODEL: tuned[len(prompts) :]}))
    results: dict[str, Any] = {
        "generation": asdict(found.ways[TUTOR_MODEL].generation),
        "language": recipe.data.language,
        "models": {
            name: {"file": found.files[name], "asked": way.text, **rates.summarise(prompts, plain[name], recipe.seed)}
            for name, way in found.ways.items()
        },
        "differences": changes_to_last(prompts, plain, recipe.seed),
        "paraphrases": _paraphrase_change(prompts, paraphrased, tuned, recipe.seed),
        "copied": _copied(plain, read_split(data, HELD_OUT), read_split(data, TRAIN)),
    }
    return {**results, "findings": generalization.findings(results)}


def _answers(
    recipe: "Recipe", name: str, way: Asking, gguf: Path, out: Path, prompts: Sequence[Mapping[str, Any]]
) -> list[Record]:
    """The answers of one model, from llama-servers that serve its file alone."""
    manifest = read_manifest(gguf.parent)
    made = manifest.outputs.get(gguf.name, {}).get("sha256") if manifest else None
    key = {"model": made or file_sha256(gguf)}
    return answers_of_file(gguf, way, FileQuestions(name, name, prompts, recipe.generate.context), key, out)


@dataclass(frozen=True)
class FileQuestions:
    """What is asked of a GGUF file at a time."""

    name: str  # for the log
    file: str  # name of the journal and of the servers' logs
    prompts: Sequence[Mapping[str, Any]]
    context: int  # tokens of a server


def answers_of_file(gguf: Path, way: Asking, asked: FileQuestions, key: Mapping[str, Any], out: Path) -> list[Record]:
    """Return the answers of a GGUF from llama-servers that share the cores; their journal and logs are beside `out`.

    `key`: what the answers depend on besides the context, the engine, the prompts and the way they are asked.
    """
    servers, numbers = min(SERVERS, usable_cores()), itertools.count(1)
    logs = log_folder(out)
    logs.mkdir(exist_ok=True)

    def start() -> AbstractContextManager[Engine]:
        log_file = logs / f"{asked.file}-{next(numbers)}.log"
        threads = usable_cores() // servers
        return serve(gguf, context=asked.context, threads=threads, log=log_file, prompt=way.prompt)

    key = {**key, "context": asked.context, "engine": build_key()}
    journal = checkpoint_folder(out) / f"{asked.file}.jsonl"
    task = Task(asked.name, way.generation, way.system, journal, key, way.prompt, way.line)
    return answer_prompts(start, asked.prompts, task, parallel=servers)


def graded(
    prompts: Sequence[Mapping[str, Any]],
    answers: Sequence[Record],
    training: Sequence[Mapping[str, Any]],
    *,
    language: str,
    kind: str,
) -> list[Record]:
    """Return the records with their verdicts and with the passages that they copy from training rows.

    `language` of the answers and `kind` of the prompt format as verdict.grade has them.
    """
    lengths = sorted(len(row["response"].strip()) for row in training)
    bounds = (lengths[0], lengths[-1]) if lengths else None
    verdicts = grade(prompts, answers, bounds, language=language, kind=kind)
    copies = generalization.copied_passages(answers, training)
    return [generalization.with_copies(record, copied) for record, copied in zip(verdicts, copies, strict=True)]


def changes_from_first(
    prompts: Sequence[Mapping[str, Any]], records: Mapping[str, Sequence[Record]], seed: int
) -> list[dict[str, Any]]:
    """Return the changes from the first model to each of the others."""
    first, *others = records
    return [
        {"before": first, "after": name, **rates.changes(prompts, records[first], records[name], seed)}
        for name in others
    ]


def changes_to_last(
    prompts: Sequence[Mapping[str, Any]], records: Mapping[str, Sequence[Record]], seed: int
) -> list[dict[str, Any]]:
    """Return the changes from each of the other models to the last."""
    *others, last = records
    return [
        {"before": name, "after": last, **rates.changes(prompts, records[name], records[last], seed)} for name in others
    ]


def _paraphrase_change(
    prompts: Sequence[Mapping[str, Any]],
    paraphrased: Sequence[Mapping[str, Any]],
    records: Sequence[Record],
    seed: int,
) -> dict[str, Any] | None:
    """The change from the prompts that have a paraphrase to their paraphrases."""
    if not paraphrased:
        return None
    places = {prompt["instruction"].strip(): place for place, prompt in enumerate(prompts)}
    originals = [records[places[row["original"].strip()]] for row in paraphrased]
    return rates.change(originals, records[len(prompts) :], "passed", seed)


def _copied(
    records: Mapping[str, Sequence[Record]],
    held_out: Sequence[Mapping[str, Any]],
    training: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The summary of copied passages by model, and for the held-out rows, whose author also wrote the training rows."""
    found = {
        name: generalization.copied_summary([record.get("copied") for record in answers])
        for name, answers in records.items()
    }
    baseline = generalization.copied_passages([{"text": row["response"]} for row in held_out], training)
    return {**found, generalization.HELD_OUT: generalization.copied_summary(baseline)}


def served_files(convert: Path, quantization: str, *, base: bool) -> dict[str, Path]:
    """Return the file of each model: the served tutor's and, where converted, the base's in the same quantization."""
    files = {TUTOR_MODEL: convert / gguf_name("tutor", quantization)}
    if base:
        of_base = convert / gguf_name("base", quantization)
        files = {BASE: of_base, BASE_AS_TUTOR: of_base, **files}
    for path in files.values():
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", "run: tutor convert")
    return files


def side_by_side(prompts: Sequence[Mapping[str, Any]], records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Return one entry a prompt: the prompt's own keys, and `answers` by model."""
    return [
        {**prompt, "answers": {name: answers[index] for name, answers in records.items()}}
        for index, prompt in enumerate(prompts)
    ]
