"""The comparison with ways without training, as a table for the page and the terminal. Pure.

In: the manifest of `tutor baselines`, that of the GGUF files. Out: texts, a row a way; None where the comparison was
not made, or was made with another tutor.
"""

from collections.abc import Mapping
from typing import Any

from tutor.artifacts.manifest import Manifest
from tutor.graders.labels import verdict_labels

VERDICTS = ("language", "ended", "stopped", "code_block", "no_loop", "compiles", "expected")
"""Verdicts of the table, beside the measure that decides."""
MEASURES = {
    "passed": "answers that do all that was asked",
    "chrf": "chrF with the reference answers, 0 to 100",
    "form": "answers in good form and in their language; no prompt states what an answer must contain",
}
"""Texts of the measures (serving/evaluation/decision.py)."""
COSTS = {"prompt_tokens": 0, "tokens": 0, "seconds": 1}
"""Costs of an answer, with their decimal places."""
NOTHING = "–"
"""Cell without a value."""


def current(made: Manifest | None, converted: Manifest | None) -> Mapping[str, Any] | None:
    """Return the results of the comparison if its tutor is among the converted files."""
    if made is None or converted is None or "files" not in made.results:
        return None
    hashes = {entry["sha256"] for entry in converted.outputs.values()}
    return made.results if made.results["files"]["tutor"] in hashes else None


def baselines(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table: heads and rows of texts, the sentence, what was left out."""
    decision, ways, labels = found["decision"], found["ways"], verdict_labels(found["language"])
    shown = [name for name in VERDICTS if all(name in way["all"] for way in ways.values())]
    rate = decision["measure"] != "chrf"
    n = decision["n"]
    return {
        "n": n,
        "measure": MEASURES[decision["measure"]],
        "sentence": decision["sentence"],
        "outcome": decision["outcome"],
        "left_out": list(found["left_out"].items()),
        "system": found["system"],
        "line": found["line"],
        "verdicts": [labels[name] for name in shown],
        "rows": [
            {
                "name": name,
                "score": f"{100 * way['score']:.0f} % ({round(n * way['score'])}/{n})"
                if rate
                else f"{way['score']:.1f}",
                "change": _change(decision["to_tuned"].get(name), scale=100 if rate else 1),
                "conclusion": decision["to_tuned"].get(name, {}).get("conclusion", ""),
                "verdicts": [f"{100 * way['all'][each]['share']:.0f} %" for each in shown],
                "costs": [
                    NOTHING if way[cost] is None else f"{way[cost]:.{places}f}" for cost, places in COSTS.items()
                ],
            }
            for name, way in ways.items()
        ],
    }


def _change(change: Mapping[str, Any] | None, scale: int) -> str:
    """How much better the tutor is than a way, with the interval; "" for the tutor itself."""
    if change is None:
        return ""
    text = f"{scale * change['mean']:+.0f}"
    return text if change["low"] is None else f"{text} [{scale * change['low']:+.0f}, {scale * change['high']:+.0f}]"


def baseline_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the comparison as lines for a terminal: scores and costs, the other verdicts, the sentence."""
    table = baselines(found)
    width = max(20, *(len(row["name"]) for row in table["rows"])) + 2
    number = f"{table['n']} held-out prompts"
    head = f"  {number:<{width}}{'score':>14}   {'tutor - it (95 %)':<18}{'':<20}"
    rows = ["", f"  score: {table['measure']}", f"{head}{'prompt':>8}{'answer':>8}{'seconds':>9}"]
    for row in table["rows"]:
        prompt, answer, seconds = row["costs"]
        change = f"   {row['change']:<18}{row['conclusion']:<20}"
        rows.append(f"  {row['name']:<{width}}{row['score']:>14}{change}{prompt:>8}{answer:>8}{seconds:>9}")
    widths = [max(9, len(label) + 2) for label in table["verdicts"]]
    heads = zip(table["verdicts"], widths, strict=True)
    rows += ["", f"  {'':<{width}}" + "".join(f"{label:>{wide}}" for label, wide in heads)]
    for row in table["rows"]:
        cells = zip(row["verdicts"], widths, strict=True)
        rows.append(f"  {row['name']:<{width}}" + "".join(f"{cell:>{wide}}" for cell, wide in cells))
    left_out = [f"  left out: {name}: {reason}" for name, reason in table["left_out"]]
    return [*rows, *([""] if left_out else []), *left_out, "", f"  {table['sentence']}"]
