"""The linter's report as one HTML page that needs nothing else: no script, no network, light and dark.

In: a report, and the files again for the questions that it points at. Out: the page's text. Whatever stands in a row
is shown as text: everything is escaped, and what cannot be seen is made visible.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tutor.formats.html import render
from tutor.formats.rows.jsonl import Limits, read_values
from tutor.stages.data.lint.linter import KINDS, NEAR, Report

TEMPLATE = Path(__file__).with_name("page.html.j2")
SHOWN = 300
"""Characters of a question."""
WIDTH, HEIGHT, FLOOR, CEILING = 720, 220, 196, 24
"""The chart, in its own units: where its bars stand, and how high they reach."""

Place = tuple[str, int]
"""A file and a line in it."""


def page(report: Report, limits: Limits | None = None) -> str:
    """The HTML of a report."""
    closest = _closest(report)
    places = {(each.file, each.line) for each in report.findings}
    places |= {pair[side] for pair in closest for side in ("row_place", "prompt_place")}
    texts = _questions(places, limits or Limits())
    groups = [
        {
            "kind": kind,
            "about": KINDS[kind],
            "count": count,
            "findings": [
                {
                    "file": each.file,
                    "line": each.line,
                    "message": each.message,
                    "text": texts.get((each.file, each.line), ""),
                }
                for each in report.findings
                if each.kind == kind
            ],
        }
        for kind, count in report.counts.items()
    ]
    return render(
        TEMPLATE,
        title=f"Lint of {', '.join(Path(name).name for name in report.files)}",
        files=report.files,
        figures=report.figures,
        total=sum(report.counts.values()),
        groups=groups,
        chart=_chart(report.figures["lengths"]),
        closest=[
            {
                "similarity": pair["similarity"],
                "row": pair["row_place"][1],
                "prompt": pair["prompt_place"][1],
                "row_text": texts.get(pair["row_place"], ""),
                "prompt_text": texts.get(pair["prompt_place"], ""),
            }
            for pair in closest
        ],
        near=NEAR,
    )


def _closest(report: Report) -> list[dict[str, Any]]:
    nearest = report.figures["nearest"] or {"closest": []}
    return [
        {
            "similarity": pair["similarity"],
            "row_place": (pair["file"], pair["line"]),
            "prompt_place": (pair["prompt_file"], pair["prompt"]),
        }
        for pair in nearest["closest"]
    ]


def _questions(places: Iterable[Place], limits: Limits) -> dict[Place, str]:
    """The questions on these lines: read again, for the linter keeps no texts."""
    wanted: defaultdict[str, set[int]] = defaultdict(set)
    for name, line in places:
        wanted[name] |= {line} - {0}
    texts = {}
    for name, lines in wanted.items():
        for line, found in read_values(Path(name), limits, Counter()) if lines else ():
            if line in lines and isinstance(found, dict):
                text = str(found.get("instruction", ""))
                texts[name, line] = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
    return texts


def _chart(lengths: dict[str, Any]) -> dict[str, Any]:
    """The histogram's bars in the chart's own units."""
    bars = lengths["bars"]
    most = max((bar["rows"] for bar in bars), default=1)
    step = WIDTH / max(1, len(bars))
    shown = []
    for number, bar in enumerate(bars):
        height = round((FLOOR - CEILING) * bar["rows"] / most, 1)
        over = lengths["limit"] is not None and bar["start"] > lengths["limit"]
        place = {"x": round(number * step + 2, 1), "y": FLOOR - height, "width": round(step - 4, 1), "height": height}
        shown.append({**bar, **place, "over": over})
    return {"width": WIDTH, "height": HEIGHT, "floor": FLOOR, "bars": shown}
