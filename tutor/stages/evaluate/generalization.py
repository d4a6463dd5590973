"""What few data can hide: copying the training set, knowing a question only in its own words, forgetting the rest.

Helper of the evaluate stage. In: its records, the training rows, and the two small files that a recipe may name:
`evaluate.paraphrases` (prompts of data.eval in other words) and `evaluate.general` (texts about anything else). Out:
figures as JSON has them, and findings in plain words. Does not ask a model.
"""

import math
import re
import statistics as figures
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.errors import DataError
from tutor.formats.rows.jsonl import Limits, RowError, check_file, read_values
from tutor.formats.rows.rows import PromptRow, parse_row
from tutor.graders.copied_text import longest_copies
from tutor.graders.verdict import LABELS
from tutor.stages.evaluate.intervals import paired_values, said

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

PARAPHRASE, GENERAL = ("original", "instruction"), ("text", "language")
"""The keys of a row, all texts and all needed."""
LIMITS = Limits(max_total_bytes=2**24)
NOTHING = "no difference shown"
HELD_OUT = "held-out rows"
"""What stands beside the models where copying is told: the author of the rows repeats things, too."""


def named_files(recipe: "Recipe") -> dict[str, Path]:
    """The files that the recipe names for the evaluation. Raises RecipeError or DataError where one cannot be read."""
    given = {"paraphrases": recipe.evaluate.paraphrases, "general": recipe.evaluate.general}
    files = {name: recipe.resolve(path) for name, path in given.items() if path}
    for path in files.values():
        check_file(path, LIMITS.max_total_bytes)
    return files


def check_files(recipe: "Recipe") -> None:
    """Raise RecipeError or DataError, naming file and line, for what the evaluation could not read in the end."""
    for name, path in named_files(recipe).items():
        read_texts(path, PARAPHRASE if name == "paraphrases" else GENERAL)


def read_texts(path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a small JSONL file, each with exactly these keys and a text for each. Raises DataError."""
    rows, problems = [], []
    for line, value in read_values(path, LIMITS, Counter()):
        if isinstance(value, RowError):
            problems.append(f"{path}:{line}: {value}")
        elif not isinstance(value, dict) or set(value) != set(keys):
            problems.append(f"{path}:{line}: is no object with {' and '.join(keys)}, and nothing else")
        elif fault := _fault(value):
            problems.append(f"{path}:{line}: {fault}")
        else:
            rows.append(value)
    if problems:
        shown = tuple(problems[: LIMITS.max_problems])
        raise DataError(f"{path}: {len(problems)} rows are not usable", "correct these lines", shown)
    return rows


def _fault(row: Mapping[str, Any]) -> str:
    """What is wrong with a row's texts; "" where nothing is."""
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


def in_other_words(rows: Sequence[Mapping[str, str]], prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The paraphrases of the prompts that are asked: `original` beside all that the original has and expects."""
    asked = {prompt["instruction"].strip(): prompt for prompt in prompts}
    return [
        {**asked[row["original"].strip()], "instruction": row["instruction"].strip(), "original": row["original"]}
        for row in rows
        if row["original"].strip() in asked
    ]


def copying(answers: Sequence[Mapping[str, Any]], training: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
    """For each record what it copies: `run` words and signs, their `share` of it, the `line` trained on, the text."""
    places = [place for place, answer in enumerate(answers) if "text" in answer]
    copies = longest_copies([answers[place]["text"] for place in places], [row["response"] for row in training])
    found: list[dict[str, Any] | None] = [None] * len(answers)
    for place, copy in zip(places, copies, strict=True):
        line = None if copy.line is None else training[copy.line].get("line")
        found[place] = {"run": copy.run, "share": round(copy.share, 4), "line": line, "text": copy.text}
    return found


def copied_runs(copies: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The longest runs of many answers: how many answers, median, the longest, and in how many it is half or more."""
    runs = [copy for copy in copies if copy is not None]
    return {
        "n": len(runs),
        "median": round(figures.median(copy["run"] for copy in runs), 1) if runs else None,
        "longest": max((copy["run"] for copy in runs), default=None),
        "half_copied": sum(copy["share"] >= 0.5 for copy in runs),
    }


def drift(losses: Mapping[str, Sequence[float]], texts: Sequence[Mapping[str, str]], seed: int) -> dict[str, Any]:
    """How well the `base` and the `tutor` predict general texts: perplexity, over all and by language.

    `losses` are each text's, in nats a token. Each text counts the same: a model's figure is e to the mean of its
    losses, and `difference` is their mean change. More is worse.
    """
    found = paired_values(losses["base"], losses["tutor"], seed)
    languages = sorted({row["language"] for row in texts})
    of_language = {name: [at for at, row in enumerate(texts) if row["language"] == name] for name in languages}
    return {
        "n": found.n,
        "perplexity": {name: _perplexity(values) for name, values in losses.items()},
        "languages": {
            language: {
                "n": len(at),
                "perplexity": {name: _perplexity([values[one] for one in at]) for name, values in losses.items()},
            }
            for language, at in of_language.items()
        },
        "difference": round(found.mean, 4),
        "low": None if found.low is None else round(found.low, 4),
        "high": None if found.high is None else round(found.high, 4),
        "said": said(found, more_is_better=False),
    }


def _perplexity(losses: Sequence[float]) -> float:
    return round(math.exp(min(figures.fmean(losses), 700.0)), 4)  # e^710 is no float


def findings(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the figures say, in plain words: `said` and `text`. What got worse comes first and is never left out."""
    found: list[dict[str, str]] = []
    for change in results.get("differences", ()):
        found += _changes(change)
    if asked := results.get("paraphrases"):
        found.append(_finding("the same questions in other words", asked))
    if general := results.get("general"):
        before, after = general["perplexity"]["base"], general["perplexity"]["tutor"]
        text = f"general texts: perplexity {before:.2f} before and {after:.2f} after tuning ({general['n']} texts)"
        found.append({"said": general["said"], "text": f"{text}: {general['said']}"})
    for name, copies in results.get("copied", {}).items():
        if copies["half_copied"] and _tuned(name):
            count = f"{copies['half_copied']} of {copies['n']}"
            found.append({"said": "worse", "text": f"{name}: {count} answers are copied by half or more"})
    return sorted(found, key=lambda finding: finding["said"] != "worse")


def _tuned(name: str) -> bool:
    """Whether tuning can be to blame for what a model copies: not the base (`hf:base`, `base-F16`)."""
    return name != HELD_OUT and not re.fullmatch(r"(?:hf:)?base(?:-[A-Z0-9_]+)?", name)


def _changes(change: Mapping[str, Any]) -> list[dict[str, str]]:
    """What was asked for, any verdict that changed, and a kind of question of which its verdict does not say so."""
    names = f"{change['before']} to {change['after']}"
    found = []
    for name, over_all in change["all"].items():
        if name == "passed" or over_all["said"] != NOTHING:
            found.append(_finding(f"{names}, {LABELS[name]}", over_all))
        for kind, entry in change["kinds"].get(name, {}).items():
            if entry["said"] not in (NOTHING, over_all["said"]):
                found.append(_finding(f"{names}, {LABELS[name]}, {kind or '(no kind)'}", entry))
    return found


def _finding(what: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """A difference of two rates as a sentence."""
    shares = [f"{100 * side['share']:.0f} % ({side['n']}/{entry['n']})" for side in (entry["before"], entry["after"])]
    interval = f"{100 * entry['difference']:+.0f} points"
    if entry["low"] is not None:
        interval += f", {100 * entry['low']:+.0f} to {100 * entry['high']:+.0f}"
    return {"said": entry["said"], "text": f"{what}: {shares[0]}, then {shares[1]} ({interval}): {entry['said']}"}
