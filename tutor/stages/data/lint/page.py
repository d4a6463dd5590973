"""The linter's report as one HTML page without script or network.

In: a report, and the linted files for the questions that it points at. Out: the text of the page. Row content is shown
as escaped text, with visible replacements for invisible characters. Writes no file.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tutor.formats.html import render_page
from tutor.formats.importing.names import Options
from tutor.formats.importing.reading import open_rows
from tutor.formats.rows.jsonl import Limits
from tutor.recipe.values import LANGUAGES
from tutor.stages.data.lint.conversations import shown_questions
from tutor.stages.data.lint.linter import KINDS, NEAR, LintReport

TEMPLATE = Path(__file__).with_name("page.html.j2")
MAX_CHARACTERS = 300
"""Maximum number of characters that are shown of a question."""
WIDTH = 720
"""Width of the chart, in its own units, as the next three."""
HEIGHT = 220
"""Height of the chart."""
FLOOR = 196
"""Vertical position of the foot of the bars."""
CEILING = 24
"""Vertical position of the top of the highest bar."""

Place = tuple[str, int]
"""File and line."""


def lint_page(report: LintReport, limits: Limits | None = None) -> str:
    """Return the HTML of a report."""
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
    return render_page(
        TEMPLATE,
        title=f"Lint of {', '.join(Path(name).name for name in report.files)}",
        files=report.files,
        figures=report.figures,
        language=LANGUAGES[report.figures["language"]["language"]] if report.figures["language"] else "",
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


def _closest(report: LintReport) -> list[dict[str, Any]]:
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
    """Questions on these lines; read from the files, because the linter keeps no texts."""
    wanted: defaultdict[str, set[int]] = defaultdict(set)
    for name, line in places:
        wanted[name] |= {line} - {0}
    texts = {}
    for name, lines in wanted.items():
        for line, found in open_rows(Path(name), limits, Counter(), Options(answered=False)) if lines else ():
            if line in lines and isinstance(found, dict):
                text = shown_questions(found)
                texts[name, line] = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
    return texts


def _chart(lengths: dict[str, Any]) -> dict[str, Any]:
    """Bars of the histogram in the chart's units."""
    bars = lengths["bars"]
    most = max((bar["rows"] for bar in bars), default=1)
    step = WIDTH / max(1, len(bars))
    drawn = []
    for number, bar in enumerate(bars):
        height = round((FLOOR - CEILING) * bar["rows"] / most, 1)
        over = lengths["limit"] is not None and bar["start"] > lengths["limit"]
        place = {"x": round(number * step + 2, 1), "y": FLOOR - height, "width": round(step - 4, 1), "height": height}
        drawn.append({**bar, **place, "over": over})
    return {"width": WIDTH, "height": HEIGHT, "floor": FLOOR, "bars": drawn}
