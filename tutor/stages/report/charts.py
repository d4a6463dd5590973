"""The charts of the report, in their own units; the page's template draws them in the page's colours. Pure.

In: points by curve, figures by quantization. Out: the values that the template fills in.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tutor.formats.chart import Frame, size_and_kl, ticks

CURVES = Frame(width=560, height=290, left=56, right=544, top=24, floor=248)
"""Size of a chart of curves, in units of the SVG."""
QUANTIZATIONS = Frame(width=620, height=320, left=62, right=600, top=24, floor=278)
"""Size of the chart of quantizations, in units of the SVG."""

Points = Sequence[tuple[float, float]]


def curves(points_by_name: Mapping[str, Points], mark: float | None = None) -> dict[str, Any] | None:
    """Return curves over the steps of a training, and a step to mark; None where there is nothing to draw."""
    points = [point for each in points_by_name.values() for point in each]
    if len({x for x, _ in points}) < 2:
        return None
    last = max(x for x, _ in points)
    across = [tick for tick in ticks(0, last) if tick <= last]
    up = ticks(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        return CURVES.x(x / last), CURVES.y((y - up[0]) / (up[-1] - up[0]))

    return {
        **CURVES.edges(),
        "x_ticks": [{"at": place(value, up[0])[0], "text": f"{value:g}"} for value in across],
        "y_ticks": [{"at": place(0, value)[1], "text": f"{value:g}"} for value in up],
        "lines": [
            {
                "name": name,
                "points": " ".join(f"{x},{y}" for x, y in (place(*point) for point in each)),
                "dots": [{"x": place(x, y)[0], "y": place(x, y)[1], "step": x, "value": f"{y:.3f}"} for x, y in each],
            }
            for name, each in points_by_name.items()
        ],
        "mark": None if mark is None else {"at": place(mark, up[0])[0], "step": f"{mark:g}"},
    }


def quantizations(figures: Mapping[str, Mapping[str, Any]], budget: float, served: str) -> dict[str, Any]:
    """Return the chart of size against mean KL divergence from F16: lower left is better."""
    return size_and_kl(QUANTIZATIONS, figures, budget, served)
