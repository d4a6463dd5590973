"""Terminal tables of an evaluation: the verdicts of models, how each was asked, and the changes between two.

In: the results of the evaluate stage, or of a comparison. Out: lines. Asks no model and computes no figure.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from tutor.graders.labels import (
    LABELS,
    OTHER_REFERENCE_LABEL,
    REFERENCE_LABEL,
    REFERENCE_LIMITS,
    limits,
    verdict_labels,
)

TABLE_VERDICTS = ("passed", "language", "ended", "stopped", "code_block", "no_loop", "compiles", "expected")
"""Verdicts of the terminal table; the results and the report have all of them."""


def verdict_lines(evaluate: Mapping[str, Any]) -> list[str]:
    """Return one row a verdict and one column a model: rates with counts, median speed, kinds of question, findings."""
    models = evaluate["models"]
    number = next(iter(models.values()))["all"]["n"]
    width, labels = max(18, *(len(name) + 2 for name in models)), verdict_labels(evaluate.get("language"))
    rows = ["", f"  {f'{number} held-out prompts':<22}" + "".join(f"{name:>{width}}" for name in models)]
    for verdict in TABLE_VERDICTS:
        if all(verdict in model["all"] for model in models.values()):
            shares = "".join(f"{_share(model['all'][verdict], number):>{width}}" for model in models.values())
            rows.append(f"  {labels[verdict]:<22}{shares}")
    speeds = "".join(f"{model['tokens_per_second'] or 0:>{width}.0f}" for model in models.values())
    rows.append(f"  {'tokens per second':<22}{speeds}")
    rows += _references(list(models.values()), width)
    rows += [line for text in limits(models) for line in _wrapped(text)]
    rows += asked_lines(models)
    rows += _kinds(evaluate, width)
    findings = [f"  {_finding(found)}" for found in evaluate.get("findings", ())]
    return [*rows, *([""] if findings else []), *findings]


def _references(models: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """Return the overlap with the reference answers, one column a model."""
    found = [model.get("reference") for model in models]
    if not all(found):
        return []
    own = "".join(f"{_mean(each):>{width}}" for each in found if each)
    rows = [f"  {REFERENCE_LABEL:<22}{own}"]
    controls = [each["control"] for each in found if each and each["control"]]
    if controls:
        rows.append(f"  {OTHER_REFERENCE_LABEL:<22}" + "".join(f"{each['before']:>{width}.1f}" for each in controls))
    return rows


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="  ")


def _mean(overlap: Mapping[str, Any]) -> str:
    interval = "" if overlap["low"] is None else f" [{overlap['low']:.0f}, {overlap['high']:.0f}]"
    return f"{overlap['mean']:.1f}{interval}"


def asked_lines(models: Mapping[str, Any]) -> list[str]:
    """Return how each model was asked; models that were asked alike share a line."""
    ways: dict[str, list[str]] = {}
    for name, model in models.items():
        if asked := model.get("asked"):
            ways.setdefault(asked, []).append(name)
    texts = [f"{', '.join(names)}: asked with {way}" for way, names in ways.items()]
    return [line for text in texts for line in textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="    ")]


def _kinds(evaluate: Mapping[str, Any], width: int) -> list[str]:
    """Return the rates by kind of question: with their changes from the first model, or plain without a comparison."""
    rows: list[str] = []
    for change in evaluate.get("differences", ()):
        sides = f"{change['before']:>18}{change['after']:>18}"
        rows += [
            "",
            f"  {LABELS['passed']:<22}{sides}   change, in points (95 %)",
            _change("all", change["all"]["passed"]),
        ]
        rows += [_change(name or "(no kind)", entry) for name, entry in change["categories"].items()]
        rows += _reference_change(change)
    if rows:
        return rows
    models = evaluate["models"].values()
    kinds = next(iter(models)).get("categories", {})
    for kind in kinds if len(kinds) > 1 else ():
        asked = [model["categories"][kind] for model in models]
        shares = "".join(f"{_share(rate['passed'], rate['n']):>{width}}" for rate in asked)
        rows.append(f"  {kind or '(no kind)':<22}{shares}")
    return ["", f"  {LABELS['passed']}, by kind of question", *rows] if rows else []


def _share(rate: Mapping[str, Any], number: int) -> str:
    return f"{100 * rate['share']:.0f} % ({rate['n']}/{number})"


def _finding(found: Mapping[str, str]) -> str:
    return f"WORSE: {found['text']}" if found["conclusion"] == "worse" else found["text"]


def comparison_lines(result: Mapping[str, Any]) -> list[str]:
    """Return what changed between two models: every verdict, every kind of question, and the prompts that changed."""
    left_out = sum(result["left_out"].values())
    note = f"; {left_out} answered by only one are left out" if left_out else ""
    number, labels = result["n"], verdict_labels(result.get("language"))
    rows = [
        *_side("A", result["before"], result.get("asked", {}).get("before")),
        *_side("B", result["after"], result.get("asked", {}).get("after")),
        f"{number} prompts answered by both{note}",
        "",
        f"  {'':<22}{'A':>18}{'B':>18}   B - A, in points (95 %)",
        *(_change(labels[name], entry) for name, entry in result["all"].items()),
        *_reference_change(result),
        *(_wrapped(REFERENCE_LIMITS) if result.get("reference") else ()),
    ]
    for verdict, kinds in result["kinds"].items() if len(result["categories"]) > 1 else ():
        rows += ["", f"  {labels[verdict]}, by kind of question"]
        rows += [_change(kind or "(no kind)", entry) for kind, entry in kinds.items()]
    for name in ("better", "worse"):
        if result[name]:
            rows += ["", f"  {name} in B: {len(result[name])} of {number}"]
            rows += [f"  » {textwrap.shorten(question, 96, placeholder=' …')}" for question in result[name]]
    return rows


def _side(letter: str, name: str, asked: str | None) -> list[str]:
    """Return the name of one side of a comparison, and how it was asked where that is known."""
    text = f"asked with {asked}" if asked else ""
    return [f"{letter}: {name}", *textwrap.wrap(text, 110, initial_indent="   ", subsequent_indent="   ")]


def _change(label: str, entry: Mapping[str, Any]) -> str:
    shares = "".join(f"{_share(entry[side], entry['n']):>18}" for side in ("before", "after"))
    interval = "" if entry["low"] is None else f"[{100 * entry['low']:+.0f}, {100 * entry['high']:+.0f}]"
    return f"  {label:<22}{shares}   {100 * entry['difference']:+4.0f} {interval:<14}{entry['conclusion']}"


def _reference_change(change: Mapping[str, Any]) -> list[str]:
    """Return the change of the overlap with the reference answers as a row of _change; none without references."""
    entry = change.get("reference")
    if not entry:
        return []
    interval = "" if entry["low"] is None else f"[{entry['low']:+.1f}, {entry['high']:+.1f}]"
    sides = f"{entry['before']:>18.1f}{entry['after']:>18.1f}"
    return [f"  {REFERENCE_LABEL:<22}{sides}   {entry['difference']:+4.1f} {interval:<13} {entry['conclusion']}"]
