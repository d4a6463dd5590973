"""The quantization benchmark's chart as an SVG that needs no other file.

In: the figures of each quantization. Out: the SVG's text; equal figures give equal bytes. Computes no position
(tutor/formats/chart.py does).
"""

from collections.abc import Mapping
from html import escape
from typing import Any

from tutor.formats.chart import Frame, size_and_kl

FRAME = Frame(width=720, height=380, left=76, right=696, top=64, floor=328)
HALO = 'stroke="#ffffff" stroke-width="3" paint-order="stroke"'
"""Outline of a text, which keeps it readable on a line."""
SERVED = "#15803d"
"""Colour of the served quantization."""
OTHER = "#1d4ed8"
"""Colour of the other quantizations."""
BUDGET = "#b45309"
"""Colour of the budget line."""
GRID = "#dddddd"
"""Colour of the grid."""


def plot(quantizations: Mapping[str, Mapping[str, Any]], budget: float, served: str) -> str:
    """Draw size against mean KL divergence from F16 (logarithmic): lower left is better."""
    chart = size_and_kl(FRAME, quantizations, budget, served)
    left, right = FRAME.left, FRAME.right
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {FRAME.width} {FRAME.height}" font-family="sans-serif" '
        'font-size="12">',
        f"<title>{escape(_title(quantizations, served))}</title>",
        f'<rect width="{FRAME.width}" height="{FRAME.height}" fill="#ffffff"/>',
        _text(left - 60, 22, "Divergence of each quantization from F16, and size", "start", "#222222"),
        _text((left + right) / 2, FRAME.height - 12, "size (MB)", "middle", "#444444"),
        _text(left - 60, 42, "mean KL divergence (nats a token)", "start", "#444444"),
    ]
    for tick in chart["y_ticks"]:
        parts += [_line(tick["at"], GRID), _text(left - 8, tick["at"] + 4, tick["text"])]
    parts += [_text(tick["at"], FRAME.floor + 18, tick["text"], "middle") for tick in chart["x_ticks"]]
    parts.append(_line(chart["budget"]["at"], BUDGET, dashes=True))
    parts.append(_text(right, chart["budget"]["at"] - 5, f"budget {chart['budget']['text']}", "end", BUDGET))
    for dot in chart["dots"]:
        parts.append(f'<circle cx="{dot["x"]:.1f}" cy="{dot["y"]:.1f}" r="5" fill="{_colour(dot)}"/>')
    for dot in chart["dots"]:
        x, y, line_x, label_y = (dot[name] for name in ("x", "y", "line_x", "label_y"))
        parts.append(f'<path d="M{x:.1f} {y:.1f}L{line_x:.1f} {label_y - 4:.1f}" stroke="{_colour(dot)}"/>')
        parts.append(_text(dot["label_x"], label_y, dot["label"], dot["anchor"], _colour(dot)))
    return "\n".join([*parts, "</svg>\n"])


def _colour(dot: Mapping[str, Any]) -> str:
    return SERVED if dot["served"] else OTHER


def _title(quantizations: Mapping[str, Mapping[str, Any]], served: str) -> str:
    each = [f"{kind} {found['size'] / 1e6:.1f} MB, KL {found['kl']:.5f}" for kind, found in quantizations.items()]
    return f"{'; '.join(each)}; served: {served}"


def _text(x: float, y: float, text: str, anchor: str = "end", fill: str = "#666666") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" {HALO}>{escape(text)}</text>'


def _line(y: float, colour: str, *, dashes: bool = False) -> str:
    style = ' stroke-dasharray="6 4"' if dashes else ""
    return f'<line x1="{FRAME.left}" x2="{FRAME.right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"{style}/>'
