"""The geometry of the report's charts, in their own units; the template draws them in the page's colours. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 290, 56, 16, 24, 42
LEAST = 1e-5
"""Nats: what is drawn lowest, F16's own zero with it."""
NEAR_X, NEAR_Y = 90, 18
"""Of labels: nearer ones would cover each other, and the second goes below its point."""

Points = Sequence[tuple[float, float]]


def curves(lines: Mapping[str, Points], mark: float | None = None) -> dict[str, Any] | None:
    """Lines over the steps of a training, by name, and a step to mark; None where there is nothing to draw."""
    points = [point for line in lines.values() for point in line]
    if len({x for x, _ in points}) < 2:
        return None
    last = max(x for x, _ in points)
    across = [tick for tick in ticks(0, last) if tick <= last]
    up = ticks(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        return _x(x / last), _y((y - up[0]) / (up[-1] - up[0]))

    return {
        **_frame(),
        "x_ticks": [{"at": place(value, up[0])[0], "text": f"{value:g}"} for value in across],
        "y_ticks": [{"at": place(0, value)[1], "text": f"{value:g}"} for value in up],
        "lines": [
            {
                "name": name,
                "points": " ".join(f"{x},{y}" for x, y in (place(*point) for point in line)),
                "dots": [{"x": place(x, y)[0], "y": place(x, y)[1], "step": x, "value": f"{y:.3f}"} for x, y in line],
            }
            for name, line in lines.items()
        ],
        "mark": None if mark is None else {"at": place(mark, up[0])[0], "step": f"{mark:g}"},
    }


def ladder(rungs: Mapping[str, Mapping[str, Any]], budget: float, served: str) -> dict[str, Any]:
    """Size against mean KL divergence from F16 (logarithmic): down and to the left is better."""
    largest = 1.12 * max(float(rung["size"]) for rung in rungs.values()) / 1e6
    values = [max(rung["kl"], LEAST) for rung in rungs.values()]
    low = math.floor(math.log10(min(*values, budget)))
    high = max(math.ceil(math.log10(max(*values, budget))), low + 1)

    def down(kl: float) -> float:
        return _y((math.log10(max(kl, LEAST)) - low) / (high - low))

    dots: list[dict[str, Any]] = []
    for kind, rung in sorted(rungs.items(), key=lambda item: (item[1]["size"], item[0])):
        x, y = _x(rung["size"] / 1e6 / largest), down(rung["kl"])
        covered = any(
            not dot["below"] and abs(dot["x"] - x) < NEAR_X and abs(dot["y"] - y) < NEAR_Y + 10 for dot in dots
        )
        dots.append({"x": x, "y": y, "name": kind, "served": kind == served, "below": covered})
    return {
        **_frame(),
        "x_ticks": [{"at": _x(size / largest), "text": f"{size:g}"} for size in ticks(0, largest) if size <= largest],
        "y_ticks": [{"at": down(10.0**power), "text": f"{10.0**power:g}"} for power in range(low, high + 1)],
        "budget": {"at": down(budget), "text": f"{budget:g}"},
        "dots": dots,
    }


def ticks(low: float, high: float) -> list[float]:
    """Round numbers at even distances that hold both ends between them, five or so."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 5)
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _frame() -> dict[str, Any]:
    edges = {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "floor": HEIGHT - BOTTOM}
    return {"width": WIDTH, "height": HEIGHT, **edges}


def _x(share: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * share, 1)


def _y(share: float) -> float:
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)
