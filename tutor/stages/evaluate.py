"""The evaluate stage: every prompt to the base and to the tutor, greedily, and verdicts on the answers.

In: data/ (prompts.jsonl), convert/ (the GGUF files), ladder/ (which of them is served).
Out: answers.json (all answers side by side). Does not decide whether that is good enough.
"""

import logging
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts import write_json
from tutor.engines.answer import Answer, Engine, Generation, greedy
from tutor.engines.llamacpp import serve
from tutor.errors import ArtifactError, ServiceError
from tutor.judges.code import judge_answers, wants_code
from tutor.judges.format import judge_format
from tutor.judges.language import is_spanish
from tutor.judges.typescript_install import find_compiler
from tutor.served import served_quantization
from tutor.stages.splits import read_rows
from tutor.template import conversation

if TYPE_CHECKING:
    from tutor.recipe import Recipe

log = logging.getLogger(__name__)

ANSWERS = "answers.json"
RATES = ("stopped", "answered", "fences_closed", "code_block", "no_loop", "no_leak", "spanish")
"""The verdicts that are yes or no, as they are counted; yes is good."""
CODE_RATES = ("compiles", "expected")
"""The same, where prompts say what they expect."""
STARTS = 2
"""How often a model's server is started: one that died is given one more chance, at the prompt it died on."""

Record = dict[str, Any]
"""An answer with its verdicts, or `error`: why there is none."""


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Ask and judge into `out`; the summary: rates by model and category, tokens/s.

    Raises ArtifactError when a file is missing, ServiceError when a model's server cannot be kept alive, HostError
    when prompts expect code and the compiler that judges it is not installed.
    """
    prompts = read_rows(inputs["data"] / "prompts.jsonl")
    if any(map(wants_code, prompts)):
        find_compiler()  # before the answers, which take long, not after them
    served = served_quantization(recipe.ollama.quantization, inputs["ladder"])
    files = served_files(inputs["convert"], served, base=recipe.convert.base)
    generation = greedy(recipe.generate, recipe.seed)
    threads = len(os.sched_getaffinity(0))
    records = {}
    for name, gguf in files.items():
        # Beside `out`: what a server said must outlive a run that fails, whose folder is taken away.
        said = out.parent / f"evaluate-{name}.log"
        start = partial(serve, gguf, context=recipe.generate.context, threads=threads, log=said)
        records[name] = with_code(prompts, ask_all(start, prompts, generation, recipe.system, name))
    write_json(out / ANSWERS, side_by_side(prompts, records))
    return {
        "generation": asdict(generation),
        "models": {name: {"file": files[name].stem, **summarise(prompts, records[name])} for name in files},
    }


def served_files(convert: Path, quantization: str, *, base: bool) -> dict[str, Path]:
    """Whose answers are compared: the tutor as it is served and, where converted, the base at the same quantization."""
    files = {name: convert / f"{name}-{quantization}.gguf" for name in (("base",) if base else ()) + ("tutor",)}
    for path in files.values():
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", "run: tutor convert")
    return files


def ask_all(
    start: Callable[[], AbstractContextManager[Engine]],
    prompts: Sequence[Mapping[str, Any]],
    generation: Generation,
    system: str,
    name: str,
) -> list[Record]:
    """A record a prompt, from an engine that is started again once when it dies. Raises ServiceError when it dies on.

    `name` is the model's, for the progress lines.
    """
    records: list[Record] = []
    for _ in range(STARTS):
        with start() as engine:
            records += ask(engine, prompts[len(records) :], generation, system, name)
        if len(records) == len(prompts):
            return records
        log.warning("%s: the server died at prompt %d of %d", name, len(records) + 1, len(prompts))
    raise ServiceError(
        f"{name}: the server died {STARTS} times, the last time at prompt {len(records) + 1} of {len(prompts)}",
        "memory may be short: try a smaller ollama.quantization or generate.context",
    )


def ask(
    engine: Engine, prompts: Sequence[Mapping[str, Any]], generation: Generation, system: str, name: str
) -> list[Record]:
    """A record a prompt; fewer when the engine is dead, that is fails on a prompt and then on a warm-up request too."""
    warm_up = partial(engine.answer, conversation("Hola"), replace(generation, max_new_tokens=1))
    warm_up()
    records: list[Record] = []
    for number, prompt in enumerate(prompts, 1):
        try:
            answer = engine.answer(conversation(prompt["instruction"], system), generation)
        except ServiceError as error:
            if _fails(warm_up):
                break
            records.append({"error": error.message})
            log.warning("%s: no answer to %r: %s", name, prompt["instruction"][:60], error)
            continue
        records.append(judged(answer))
        log.info("%s %d/%d: %d tokens, %s", name, number, len(prompts), answer.tokens, answer.finish)
    return records


def _fails(request: Callable[[], object]) -> bool:
    try:
        request()
    except ServiceError:
        return True
    return False


def judged(answer: Answer) -> Record:
    """An answer with its verdicts."""
    spanish, confidence = is_spanish(answer.text)
    verdicts = {**judge_format(answer.text, answer.finish), "spanish": spanish, "spanish_confidence": confidence}
    return {**asdict(answer), "verdicts": verdicts}


def expects_something(prompts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any prompt says what a right answer has, or what the code in its question does."""
    return any(prompt.get("expect") or prompt.get("code") for prompt in prompts)


def with_code(prompts: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> list[Record]:
    """The records with the verdicts on their code, all in one run of the compiler; as they are where none is expected.

    `compiles` and `expected` join the verdicts; why stands in `code`.
    """
    if not expects_something(prompts):
        return list(records)
    answered = [place for place, record in enumerate(records) if "verdicts" in record]
    found = judge_answers([prompts[place] for place in answered], [records[place]["text"] for place in answered])
    judged = list(records)
    for place, code in zip(answered, found, strict=True):
        counted = {name: code.pop(name) for name in CODE_RATES}
        judged[place] = {**records[place], "verdicts": {**records[place]["verdicts"], **counted}, "code": code}
    return judged


def side_by_side(prompts: Sequence[Mapping[str, Any]], records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """One entry a prompt: the prompt's own keys, and `answers` by model."""
    return [
        {**prompt, "answers": {name: answers[index] for name, answers in records.items()}}
        for index, prompt in enumerate(prompts)
    ]


def summarise(prompts: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> dict[str, Any]:
    """Verdict rates over all prompts and by category, and the median speed in tokens/s (None without an answer)."""
    categories: dict[str, list[Record]] = {}
    for prompt, record in zip(prompts, records, strict=True):
        categories.setdefault(prompt["category"], []).append(record)
    speeds = [record["tokens_per_second"] for record in records if record.get("tokens", 0) > 1]
    return {
        "all": rates(records),
        "categories": {name: rates(members) for name, members in sorted(categories.items())},
        "tokens_per_second": round(statistics.median(speeds), 2) if speeds else None,
    }


def rates(records: Sequence[Record]) -> dict[str, Any]:
    """How many prompts, errors and, for each verdict, passes with their share; no answer passes nothing."""
    verdicts = [record["verdicts"] for record in records if "verdicts" in record]
    counted = [name for name in (*RATES, *CODE_RATES) if all(name in verdict for verdict in verdicts)]
    passes = {name: sum(verdict[name] for verdict in verdicts) for name in counted}
    return {
        "n": len(records),
        "errors": len(records) - len(verdicts),
        **{name: {"n": n, "share": round(n / len(records), 4) if records else 0.0} for name, n in passes.items()},
    }


def compare_table(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The summary's few numbers for a terminal: a header with the models' names, then a row a property."""
    models = summary["models"]
    lines: Iterable[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
        ("in Spanish", lambda model: _share(model, "spanish")),
        ("ended by itself", lambda model: _share(model, "stopped")),
        ("with a code block", lambda model: _share(model, "code_block")),
        ("without a loop", lambda model: _share(model, "no_loop")),
        ("code compiles", lambda model: _share(model, "compiles")),
        ("as expected", lambda model: _share(model, "expected")),
        ("tokens/s", lambda model: "-" if model["tokens_per_second"] is None else f"{model['tokens_per_second']:.1f}"),
    )
    return [("", *models), *((label, *(shown(model) for model in models.values())) for label, shown in lines)]


def _share(model: Mapping[str, Any], verdict: str) -> str:
    rate = model["all"].get(verdict)
    if rate is None:
        return "-"
    return f"{100 * rate['share']:.0f} % ({rate['n']}/{model['all']['n']})"
