"""Geometry of charts: a frame, its ticks, and the chart of quantizations by size and KL divergence. Pure.

In: figures. Out: positions in the chart's own units, with which a stage draws an SVG or fills in a template. Chooses
no colour and no font.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tutor.recipe.quantizations import BF16, F16

MIN_KL = 1e-5
"""Smallest KL divergence that is drawn, in nats: the place of F16's own zero on a logarithmic axis."""
HEADROOM = 1.12
"""Length of the size axis, as a multiple of the largest file."""
LABEL_WIDTH = 125
"""Maximum width of a label."""
LABEL_HEIGHT = 16
"""Height of a label."""
CLUSTER = 30
"""Distance below which two points share the place of their labels."""


@dataclass(frozen=True)
class Frame:
    """The size of a chart and the edges of its plot area."""

    width: int
    height: int
    left: int
    right: int
    top: int
    floor: int

    def x(self, share: float) -> float:
        """Return the horizontal position of a share of the axis."""
        return round(self.left + (self.right - self.left) * share, 1)

    def y(self, share: float) -> float:
        """Return the vertical position of a share of the axis, counted from below."""
        return round(self.floor - (self.floor - self.top) * share, 1)

    def edges(self) -> dict[str, int]:
        """Return all fields by name."""
        return asdict(self)


def ticks(low: float, high: float) -> list[float]:
    """Return about five equidistant round numbers, the first at or below `low` and the last at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 5)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(number * step, 10) for number in range(first, last + 1)]


def size_and_kl(
    frame: Frame, quantizations: Mapping[str, Mapping[str, Any]], budget: float, served: str
) -> dict[str, Any]:
    """Return the chart of size (MB) against mean KL divergence from F16 (logarithmic): lower left is better."""
    largest = HEADROOM * max(float(each["size"]) for each in quantizations.values()) / 1e6
    values = [max(each["kl"], MIN_KL) for each in quantizations.values()]
    low = math.floor(math.log10(min(*values, budget)))
    high = max(math.ceil(math.log10(max(*values, budget))), low + 1)

    def y(kl: float) -> float:
        return frame.y((math.log10(max(kl, MIN_KL)) - low) / (high - low))

    points = [(frame.x(each["size"] / 1e6 / largest), y(each["kl"]), kind) for kind, each in quantizations.items()]
    points.sort(key=lambda point: (point[1], point[0]))
    return {
        **frame.edges(),
        "x_ticks": [
            {"at": frame.x(size / largest), "text": f"{size:g}"} for size in ticks(0, largest) if size <= largest
        ],
        "y_ticks": [{"at": y(10.0**power), "text": f"{10.0**power:g}"} for power in range(low, high + 1)],
        "budget": {"at": y(budget), "text": f"{budget:g}"},
        "dots": [
            {"x": x, "y": at, "served": kind == served, "label": _label(kind, served), **place}
            for (x, at, kind), place in zip(points, _label_places(frame, points), strict=True)
        ],
    }


def _label(kind: str, served: str) -> str:
    roles = ["reference"] * (kind in (F16, BF16)) + ["served"] * (kind == served)
    return f"{kind} ({', '.join(roles)})" if roles else kind


def _label_places(frame: Frame, points: Sequence[tuple[float, float, str]]) -> list[dict[str, Any]]:
    """The place of each point's label: beside its cluster, and below another label that it would cover."""
    placed: list[dict[str, Any]] = []
    for x, y, _ in points:
        edge = max(other for other, at, _ in points if abs(other - x) < CLUSTER and abs(at - y) < CLUSTER) + 12
        inside = edge + LABEL_WIDTH < frame.width
        label_x, anchor = (edge, "start") if inside else (x - 12, "end")
        below = [
            other["label_y"] + LABEL_HEIGHT
            for other in placed
            if abs(other["label_x"] - label_x) < LABEL_WIDTH and other["label_y"] + LABEL_HEIGHT > y + 4
        ]
        place = {"label_x": round(label_x, 1), "label_y": round(max([y + 4, *below]), 1), "anchor": anchor}
        placed.append({**place, "line_x": round(label_x + (-2 if inside else 2), 1)})
    return placed
