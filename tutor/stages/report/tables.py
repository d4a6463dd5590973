"""The tables of the report: hand-offs, quantizations, verdicts. Pure.

In: the results of the stages parity, ladder and evaluate. Out: rows of texts, and of rates where the page draws bars.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tutor.graders.labels import LABELS, limits, verdict_labels
from tutor.recipe.values import LANGUAGES
from tutor.stages.report import charts

Json = Mapping[str, Any]


def parity(gate: Json, published: Json) -> dict[str, Any]:
    """Return the hand-offs with their figures as texts; the last one is to the published model, if compared."""
    return {
        "conversations": gate["conversations"],
        "transformers": gate["transformers"],
        "refused": gate.get("refused") or published.get("refused"),
        "published": bool(published),
        "rows": [_hand_off(item) for item in (*gate["hand_offs"], *published.get("hand_offs", ()))],
    }


def _hand_off(item: Json) -> dict[str, Any]:
    checks = {check["name"]: check["figures"] for check in item["checks"]}
    numbers = checks.get("log-probabilities", {})
    limit = item.get("tolerance") or {}
    return {
        "names": (item["ours"], item["theirs"]),
        "kind": item["kind"],
        "state": item["state"],
        "why": item["missing"] or next((check["what"] for check in item["checks"] if not check["ok"]), ""),
        "cells": [
            _counted(checks.get("prompt")),
            _counted(checks.get("tokens")),
            *(f"{numbers[key]:.2g}" if key in numbers else "–" for key in ("mean", "worst", "kl")),
            f"{limit['kl']:g}" if limit.get("kl") is not None else "–",
            _counted(checks.get("greedy answer"), "agreed", "steps"),
            _counted(checks.get("end")),
        ],
    }


def _counted(figures: Json | None, part: str = "equal", whole: str = "of") -> str:
    return f"{figures[part]:.0f}/{figures[whole]:.0f}" if figures and figures[whole] else "–"


def ladder(found: Json, converted: Json) -> dict[str, Any]:
    """Return the files, the largest first, with their loss, speed and memory, and the chart."""
    rows = [
        {
            "kind": kind,
            "served": kind == found["served"],
            "cells": [
                megabytes(each["size"]),
                f"{each['perplexity']:.2f}",
                f"{100 * math.expm1(each['more']):+.2f} %",
                f"{each['kl']:.4f}",
                f"{each['kl_p99']:.3f}",
                percent(each["same"]),
                f"{each['prompt_per_second']:.0f}",
                f"{each['tokens_per_second']:.1f}",
                "–" if each["memory"] is None else megabytes(each["memory"]),
            ],
        }
        for kind, each in sorted(found["quantizations"].items(), key=lambda item: -item[1]["size"])
    ]
    chart = charts.quantizations(found["quantizations"], found["budget"], found["served"])
    notes = [
        f"{kind} is larger and less accurate than {better}: remove it from convert.quantizations."
        for kind, better in found.get("worse_and_larger", {}).items()
    ] + [
        f"{name}: Q8_0 in place of {kind} in {count} tensors: {kind} does not keep the LoRA update."
        for name, entry in converted.get("files", {}).items()
        for kind, count in entry.get("replaced", {}).items()
    ]
    chosen = {name: found[name] for name in ("budget", "chosen", "served")}
    base = {name: entry for name, entry in found["perplexity"].items() if name.startswith("base-")}
    return {
        **chosen,
        "rows": rows,
        "notes": notes,
        "chart": chart,
        "base": base,
        "tokens": next(iter(found["quantizations"].values()))["tokens"],
    }


def references(evaluated: Json) -> dict[str, Any] | None:
    """Return the overlap with the reference answers of every model, and the changes; None without references."""
    models = {name: model.get("reference") for name, model in evaluated["models"].items()}
    if not all(models.values()):
        return None
    changes = list(evaluated.get("differences") or ())
    return {
        "models": models,
        "changes": {f"{change['before']} to {change['after']}": change["reference"] for change in changes},
    }


def verdicts(evaluated: Json) -> dict[str, Any]:
    """Return the rates of every model over all prompts and by kind, and the changes from the first model to others."""
    models: Mapping[str, Json] = evaluated["models"]
    shown = [name for name in LABELS if all(name in model["all"] for model in models.values())]
    labels = verdict_labels(evaluated.get("language"))
    changes = list(evaluated.get("differences") or ())
    kinds = sorted({kind for model in models.values() for kind in model["categories"]})
    return {
        "n": next(iter(models.values()))["all"]["n"],
        "errors": sum(model["all"]["errors"] for model in models.values()),
        # A model in Ollama has no file.
        "models": {
            name: {"file": each.get("file", ""), "speed": each["tokens_per_second"], "asked": each.get("asked", "")}
            for name, each in models.items()
        },
        "changes": [f"{change['before']} to {change['after']}" for change in changes],
        "limits": limits(models),
        "all": [
            {
                "label": labels[name],
                "rates": [(model["all"][name], model["all"]["n"]) for model in models.values()],
                "changes": [change["all"].get(name) for change in changes],
            }
            for name in shown
        ],
        "kinds": [
            {
                "label": kind or "(no kind)",
                "rates": [
                    (each["passed"], each["n"]) for each in (model["categories"][kind] for model in models.values())
                ],
                "changes": [change["categories"].get(kind) for change in changes],
            }
            for kind in kinds
        ],
        "each": [
            _verdicts_by_kind(name, model["categories"], kinds, {each: labels[each] for each in shown})
            for name, model in models.items()
        ],
    }


def drift_rows(general: Json) -> list[dict[str, Any]]:
    """Return the perplexity of general texts before and after tuning: over all, by language, by kind.

    `cells`: number of texts, perplexity before, after, and its change with the interval, paired by text.
    """
    languages = {LANGUAGES.get(name, name): entry for name, entry in general["languages"].items()}
    rows = [("all", general), *languages.items(), *general["kinds"].items()]
    return [
        {"label": label, "conclusion": entry["conclusion"], "cells": [str(entry["n"]), *_drift_cells(entry)]}
        for label, entry in rows
    ]


def _drift_cells(entry: Json) -> list[str]:
    before, after = (f"{entry['perplexity'][name]:.2f}" for name in ("base", "tutor"))
    changed = f"{_percent_more(entry['difference'])} %"
    if entry["low"] is not None:
        changed += f" ({_percent_more(entry['low'])} to {_percent_more(entry['high'])})"
    return [before, after, changed]


def _percent_more(nats: float) -> str:
    """A change of the loss as the change of the perplexity, in percent."""
    return f"{100 * math.expm1(min(nats, 700.0)):+.1f}"


def _verdicts_by_kind(
    model: str, by_kind: Mapping[str, Json], kinds: Sequence[str], shown: Mapping[str, str]
) -> dict[str, Any]:
    """All verdicts of one model, a row a kind."""
    rows = [
        {"kind": kind or "(no kind)", "n": by_kind[kind]["n"], "rates": [by_kind[kind].get(name) for name in shown]}
        for kind in kinds
    ]
    return {"model": model, "heads": list(shown.values()), "rows": rows}


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.0f} %"


def megabytes(size: float) -> str:
    """Return a number of bytes as MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
