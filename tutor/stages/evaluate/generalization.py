"""Figures about generalization: copied training text, and answers to paraphrased prompts; the findings.

In: the evaluate stage's records, the training rows, and the file of `evaluate.paraphrases`, which a recipe may name
(paraphrases of data.eval's prompts). Out: figures as JSON values, and findings as sentences. Runs no model.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tutor.formats.rows.evaluation_texts import PARAPHRASE_KEYS, read_texts
from tutor.formats.rows.recipe_files import paraphrase_files
from tutor.graders.copied_text import longest_copies
from tutor.graders.intervals import NO_DIFFERENCE
from tutor.graders.labels import verdict_labels
from tutor.stages.evaluate.references import control_findings, reference_findings

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

HELD_OUT = "held-out rows"
"""Key of the held-out rows among the models in `copied`: the baseline, because the author of the rows repeats text."""

HALF = 0.5
"""Minimum share of an answer in one training row that counts as copied."""


def read_paraphrases(recipe: "Recipe", prompts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the paraphrases of these prompts that the recipe names a file of. Raises RecipeError or DataError."""
    files = paraphrase_files(recipe).values()
    return [row for path in files for row in paraphrased_prompts(read_texts(path, PARAPHRASE_KEYS), prompts)]


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


def findings(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the results as sentences: `conclusion` and `text`. Changes for the worse come first, all of them."""
    found: list[dict[str, str]] = []
    labels = verdict_labels(results.get("language"))
    for changed in results.get("differences", ()):
        found += _changed(changed, labels)
    if paraphrased := results.get("paraphrases"):
        found.append(_sentence("paraphrased questions", paraphrased))
    for name, model in results.get("models", {}).items():
        found += control_findings(name, model) if _is_tuned(name) else ()
    for name, copies in results.get("copied", {}).items():
        if copies["half_copied"] and _is_tuned(name):
            count = f"{copies['half_copied']} of {copies['n']}"
            found.append({"conclusion": "worse", "text": f"{name}: {count} answers are copied by half or more"})
    return sorted(found, key=lambda finding: finding["conclusion"] != "worse")


def _is_tuned(name: str) -> bool:
    """Whether a model was tuned, so that it can copy training text: not the base (`hf:base`, `base-F16`)."""
    return name != HELD_OUT and not re.fullmatch(r"(?:hf:)?base(?:-as-tutor)?(?:-[A-Z0-9_]+)?", name)


def _changed(changed: Mapping[str, Any], labels: Mapping[str, str]) -> list[dict[str, str]]:
    """The change of `passed`, of verdicts with a difference, and of kinds of question with another conclusion."""
    names = f"{changed['before']} to {changed['after']}"
    found = []
    for name, over_all in changed["all"].items():
        if name == "stopped" and over_all == changed["all"].get("ended"):
            continue  # no answer ended at a stop text
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
