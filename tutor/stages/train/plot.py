"""Draw training.svg: losses, learning rate and gradient norm over the steps.

In: the trainer's history. Out: an SVG, equal bytes for an equal history. Does not read files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

REPRODUCIBLE: Any = {"svg.hashsalt": "tutor", "svg.fonttype": "path", "path.simplify": True}
"""matplotlib settings for equal bytes: without a salt, ids in an SVG are random; outlines need no installed font."""


def draw(history: Sequence[Mapping[str, Any]], start: float, best: int | None, path: Path) -> None:
    """Write the SVG. `start`: held-out loss before training; `best`: step whose adapter was kept."""
    steps = [entry for entry in history if "loss" in entry]
    with matplotlib.rc_context(REPRODUCIBLE):
        figure = Figure(figsize=(8, 8), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
        _losses(axes[0], steps, start, best)
        for axis, name, label in ((axes[1], "learning_rate", "learning rate"), (axes[2], "grad_norm", "gradient norm")):
            axis.plot(*_points(steps, name), color="tab:gray", linewidth=1)
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[2].set_xlabel("step")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _losses(axis: Axes, steps: Sequence[Mapping[str, Any]], start: float, best: int | None) -> None:
    axis.plot(*_points(steps, "loss"), color="tab:blue", linewidth=0.8, alpha=0.7, label="training, a step")
    evaluated, losses = _points(steps, "held_out_loss")
    axis.plot([0, *evaluated], [start, *losses], color="tab:orange", marker="o", markersize=4, label="held out")
    if best is not None:
        axis.axvline(best, color="tab:green", linestyle="--", linewidth=1, label=f"kept: step {best}")
    axis.set_ylabel("loss (nats a token)")
    axis.grid(alpha=0.3)
    axis.legend()


def _points(steps: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(int(entry["step"]), float(entry[name])) for entry in steps if entry.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]
