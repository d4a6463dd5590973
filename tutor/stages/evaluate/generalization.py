"""Figures about generalization: copied training text, answers to paraphrased prompts, drift on general texts.

In: the evaluate stage's records, the training rows, and the two small files that a recipe may name:
`evaluate.paraphrases` (paraphrases of data.eval's prompts) and `evaluate.general` (texts about other subjects). Out:
figures as JSON values, and findings as sentences. Runs no model.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.errors import DataError
from tutor.formats.rows.json_values import RowError
from tutor.formats.rows.jsonl import read_values
from tutor.formats.rows.recipe_files import EVALUATION_LIMITS, evaluation_files
from tutor.formats.rows.rows import PromptRow, parse_row
from tutor.graders.copied_text import longest_copies
from tutor.graders.intervals import NO_DIFFERENCE, conclude, paired_values
from tutor.graders.labels import verdict_labels
from tutor.stages.evaluate.references import control_findings, reference_findings

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

PARAPHRASE_KEYS = ("original", "instruction")
"""Required keys of a row of `evaluate.paraphrases`; every value is a text."""
GENERAL_KEYS = ("text", "language")
"""Required keys of a row of `evaluate.general`; every value is a text."""
KIND = "kind"
"""Optional key of a row of `evaluate.general`, a text: prose, a poem, code, ..."""
HELD_OUT = "held-out rows"
"""Key of the held-out rows among the models in `copied`: the baseline, because the author of the rows repeats text."""

HALF = 0.5
"""Minimum share of an answer in one training row that counts as copied."""


def check_files(recipe: "Recipe") -> None:
    """Raise RecipeError or DataError, with file and line, for a file of [evaluate] that the stage cannot use."""
    for name, path in evaluation_files(recipe).items():
        read_texts(path, PARAPHRASE_KEYS if name == "paraphrases" else GENERAL_KEYS)


def read_texts(path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
    """Read a small JSONL file whose rows have exactly these keys, each with a text. Raises DataError.

    A row of GENERAL_KEYS may also have KIND.
    """
    optional = {KIND} if keys == GENERAL_KEYS else set()
    rows, problems = [], []
    for line, value in read_values(path, EVALUATION_LIMITS, Counter()):
        if isinstance(value, RowError):
            problems.append(f"{path}:{line}: {value}")
        elif not isinstance(value, dict) or set(value) - optional != set(keys):
            problems.append(f"{path}:{line}: is not an object with only {' and '.join(keys)}")
        elif fault := _fault(value):
            problems.append(f"{path}:{line}: {fault}")
        else:
            rows.append(value)
    if problems:
        shown = tuple(problems[: EVALUATION_LIMITS.max_problems])
        raise DataError(f"{path}: {len(problems)} rows are not usable", "correct these lines", shown)
    return rows


def _fault(row: Mapping[str, Any]) -> str:
    """The first fault of a row's texts; "" where there is none."""
    for key, value in row.items():
        if not isinstance(value, str) or not value.strip():
            return f"{key} is no text"
    if len(row.get("text", "two words").split()) < 2:
        return "text is a single word: nothing to predict from"
    try:
        parse_row({"instruction": row.get("instruction", "-")}, PromptRow, Counter(), strict=True)
    except RowError as error:
        return str(error)
    return ""


def paraphrased_prompts(
    rows: Sequence[Mapping[str, str]], prompts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the paraphrases of these prompts, each with its `original` and all other keys of the original prompt."""
    known = {prompt["instruction"].strip(): prompt for prompt in prompts}
    return [
        {**known[row["original"].strip()], "instruction": row["instruction"].strip(), "original": row["original"]}
        for row in rows
        if row["original"].strip() in known
    ]


def copied_passages(
    answers: Sequence[Mapping[str, Any]], training: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any] | None]:
    """Return the longest passage that each answer shares with a training row; None for a missing answer.

    `run`: its words and punctuation marks; `share`: its part of the answer; `line`: the training row's line; `text`.
    """
    places = [place for place, answer in enumerate(answers) if "text" in answer]
    copies = longest_copies([answers[place]["text"] for place in places], [row["response"] for row in training])
    found: list[dict[str, Any] | None] = [None] * len(answers)
    for place, copy in zip(places, copies, strict=True):
        line = None if copy.line is None else training[copy.line].get("line")
        found[place] = {"run": copy.run, "share": round(copy.share, 4), "line": line, "text": copy.text}
    return found


def with_copies(record: Mapping[str, Any], copied: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a graded record with the longest passage that its answer copies, and the verdict on it."""
    if copied is None:
        return {**record}
    verdicts = {**record["verdicts"], "own_words": copied["share"] < HALF}
    return {**record, "verdicts": verdicts, "copied": copied}


def copied_summary(copies: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Summarise the copied passages of many answers.

    `n`: answers; `median` and `longest`: words and punctuation marks; `half_copied`: answers of which half or more is
    copied.
    """
    runs = [copy for copy in copies if copy is not None]
    return {
        "n": len(runs),
        "median": round(statistics.median(copy["run"] for copy in runs), 1) if runs else None,
        "longest": max((copy["run"] for copy in runs), default=None),
        "half_copied": sum(copy["share"] >= HALF for copy in runs),
    }


def drift(losses: Mapping[str, Sequence[float]], texts: Sequence[Mapping[str, str]], seed: int) -> dict[str, Any]:
    """Return how well the `base` and the `tutor` predict general texts, over all, by language and by kind.

    `losses` are the mean loss of each text, in nats a token. Every text has the same weight: a model's perplexity is
    the exponential of its mean loss, and `difference` is the mean change of the loss with its interval, paired by text.
    A higher loss is worse. `kinds` is empty where no text has a kind.
    """

    def change(places: Sequence[int]) -> dict[str, Any]:
        chosen = {name: [values[at] for at in places] for name, values in losses.items()}
        found = paired_values(chosen["base"], chosen["tutor"], seed)
        return {
            "n": found.n,
            "perplexity": {name: _perplexity(values) for name, values in chosen.items()},
            "difference": round(found.mean, 4),
            "low": None if found.low is None else round(found.low, 4),
            "high": None if found.high is None else round(found.high, 4),
            "conclusion": conclude(found, more_is_better=False),
        }

    def groups(key: str) -> dict[str, dict[str, Any]]:
        names = sorted({row[key] for row in texts if key in row})
        return {name: change([at for at, row in enumerate(texts) if row.get(key) == name]) for name in names}

    return {**change(range(len(texts))), "languages": groups("language"), "kinds": groups(KIND)}


def _perplexity(losses: Sequence[float]) -> float:
    return round(math.exp(min(statistics.fmean(losses), 700.0)), 4)  # e^710 is no float


def findings(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the results as sentences: `conclusion` and `text`. Changes for the worse come first, all of them."""
    found: list[dict[str, str]] = []
    labels = verdict_labels(results.get("language"))
    for changed in results.get("differences", ()):
        found += _changed(changed, labels)
    if paraphrased := results.get("paraphrases"):
        found.append(_sentence("paraphrased questions", paraphrased))
    if general := results.get("general"):
        before, after = general["perplexity"]["base"], general["perplexity"]["tutor"]
        text = f"general texts: perplexity {before:.2f} before and {after:.2f} after tuning ({general['n']} texts)"
        conclusion = general["conclusion"]
        found.append({"conclusion": conclusion, "text": f"{text}: {conclusion}"})
    for name, model in results.get("models", {}).items():
        found += control_findings(name, model) if _is_tuned(name) else ()
    for name, copies in results.get("copied", {}).items():
        if copies["half_copied"] and _is_tuned(name):
            count = f"{copies['half_copied']} of {copies['n']}"
            found.append({"conclusion": "worse", "text": f"{name}: {count} answers are copied by half or more"})
    return sorted(found, key=lambda finding: finding["conclusion"] != "worse")


def _is_tuned(name: str) -> bool:
    """Whether a model was tuned, so that it can copy training text: not the base (`hf:base`, `base-F16`)."""
    return name != HELD_OUT and not re.fullmatch(r"(?:hf:)?base(?:-[A-Z0-9_]+)?", name)


def _changed(changed: Mapping[str, Any], labels: Mapping[str, str]) -> list[dict[str, str]]:
    """The change of `passed`, of verdicts with a difference, and of kinds of question with another conclusion."""
    names = f"{changed['before']} to {changed['after']}"
    found = []
    for name, over_all in changed["all"].items():
        if name == "passed" or over_all["conclusion"] != NO_DIFFERENCE:
            found.append(_sentence(f"{names}, {labels[name]}", over_all))
        for kind, entry in changed["kinds"].get(name, {}).items():
            if entry["conclusion"] not in (NO_DIFFERENCE, over_all["conclusion"]):
                found.append(_sentence(f"{names}, {labels[name]}, {kind or '(no kind)'}", entry))
    return [*found, *reference_findings(names, changed)]


def _sentence(what: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """A change of two rates as a finding."""
    shares = [f"{100 * side['share']:.0f} % ({side['n']}/{entry['n']})" for side in (entry["before"], entry["after"])]
    interval = f"{100 * entry['difference']:+.0f} points"
    if entry["low"] is not None:
        interval += f", {100 * entry['low']:+.0f} to {100 * entry['high']:+.0f}"
    conclusion = entry["conclusion"]
    return {"conclusion": conclusion, "text": f"{what}: {shares[0]}, then {shares[1]} ({interval}): {conclusion}"}
