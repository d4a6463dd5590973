"""The ladder as a picture: SVG that needs nothing else. In: rungs. Out: the same text from the same rungs."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tutor.recipe.quantizations import F16

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 380, 76, 24, 64, 52
HALO = 'stroke="#ffffff" stroke-width="3" paint-order="stroke"'
"""Of text: it stays readable on a line."""
LINE, LABEL, NEAR = 14, 110, 30
"""A label's height and width at most, and how near points are that stand in each other's way."""
LEAST = 1e-5
"""Nats: what is drawn lowest, F16's own zero with it."""


def plot(rungs: Mapping[str, Mapping[str, Any]], budget: float, served: str) -> str:
    """Size against mean KL divergence from F16 (logarithmic): down and to the left is better."""
    largest = max(float(rung["size"]) for rung in rungs.values())
    values = [max(rung["kl"], LEAST) for rung in rungs.values()]
    decades = range(math.floor(math.log10(min(*values, budget))), math.ceil(math.log10(max(*values, budget))) + 1)

    def across(size: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * size / (1.12 * largest)

    def down(kl: float) -> float:
        share = (math.log10(max(kl, LEAST)) - decades[0]) / max(decades[-1] - decades[0], 1)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f"<title>{escape(_title(rungs, served))}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT - 60, 22, "What each quantization loses against F16, and its size", "start", "#222222"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "size (MB)", "middle", "#444444"),
        _text(LEFT - 60, 42, "mean KL divergence (nats a token)", "start", "#444444"),
    ]
    for decade in decades:
        parts += [_line(down(10.0**decade), "#dddddd"), _text(LEFT - 8, down(10.0**decade) + 4, f"{10.0**decade:g}")]
    for size in _steps(1.12 * largest / 1e6):
        parts.append(_text(across(size * 1e6), HEIGHT - BOTTOM + 18, f"{size:g}", "middle"))
    parts.append(_line(down(budget), "#b45309", dashes=True))
    parts.append(_text(WIDTH - RIGHT, down(budget) - 5, f"budget {budget:g}", "end", "#b45309"))
    points = [(across(rung["size"]), down(rung["kl"]), kind) for kind, rung in rungs.items()]
    above = sorted(points, key=_from_above)
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{_colour(kind, served)}"/>' for x, y, kind in above]
    for (x, y, kind), (label_x, label_y, anchor) in zip(above, _labels(above), strict=True):
        colour = _colour(kind, served)
        roles = ["reference"] * (kind == F16) + ["served"] * (kind == served)
        label = f"{kind} ({', '.join(roles)})" if roles else kind
        to = label_x + (-2 if anchor == "start" else 2)
        parts.append(f'<path d="M{x:.1f} {y:.1f}L{to:.1f} {label_y - 4:.1f}" stroke="{colour}"/>')
        parts.append(_text(label_x, label_y, label, anchor, colour))
    return "\n".join([*parts, "</svg>\n"])


def _from_above(point: tuple[float, float, str]) -> tuple[float, float]:
    return point[1], point[0]


def _labels(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Where each point's label stands: beside its cluster, and below another's that it would cover."""
    placed: list[tuple[float, float, str]] = []
    for x, y, _ in points:
        edge = max(other for other, at, _ in points if abs(other - x) < NEAR and abs(at - y) < NEAR) + 12
        below = [at + LINE for other, at, _ in placed if abs(other - edge) < LABEL and at + LINE > y + 4]
        inside = edge + LABEL < WIDTH
        placed.append((edge if inside else x - 12, max([y + 4, *below]), "start" if inside else "end"))
    return placed


def _colour(kind: str, served: str) -> str:
    return "#15803d" if kind == served else "#1d4ed8"


def _title(rungs: Mapping[str, Mapping[str, Any]], served: str) -> str:
    said = [f"{kind} {rung['size'] / 1e6:.1f} MB, KL {rung['kl']:.5f}" for kind, rung in rungs.items()]
    return f"{'; '.join(said)}; served: {served}"


def _steps(end: float) -> list[float]:
    """Round numbers from 0 to `end`, four to eight of them."""
    step = 10 ** math.floor(math.log10(end))
    step = next(step * share for share in (1, 0.5, 0.2, 0.1) if end / (step * share) >= 4)
    return [step * number for number in range(int(end / step) + 1)]


def _text(x: float, y: float, text: str, anchor: str = "end", fill: str = "#666666") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" {HALO}>{escape(text)}</text>'


def _line(y: float, colour: str, *, dashes: bool = False) -> str:
    style = ' stroke-dasharray="6 4"' if dashes else ""
    return f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"{style}/>'
