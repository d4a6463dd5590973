"""The tables of scripts/sweep.py. In: cells by setting, learning rate and seed. Out: Markdown. Does not train."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Done = dict[float, dict[int, dict[str, Any]]]
"""A setting's cells that are done, by learning rate and seed."""
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantile 0.975 of Student's t, by number of seeds."""


def loss_of(cell: Mapping[str, Any]) -> float:
    """Return a cell's held-out loss; infinite when its training failed."""
    return math.inf if cell["loss"] is None else float(cell["loss"])


def best_rate(done: Done, seed: int) -> float:
    """Return the learning rate of lowest loss with this seed; NaN when no cell is done."""
    losses = {rate: loss_of(cells[seed]) for rate, cells in done.items() if seed in cells}
    return min(losses, key=losses.__getitem__, default=math.nan)


def best_cells(done: Done, seeds: Sequence[int]) -> tuple[float, list[dict[str, Any]]] | None:
    """Return the learning rate of lowest mean loss and its cells, of the rates that were trained with all seeds."""
    complete = {rate: [cells[seed] for seed in seeds] for rate, cells in done.items() if set(seeds) <= set(cells)}
    means = {rate: statistics.fmean(map(loss_of, cells)) for rate, cells in complete.items()}
    rate = min(means, key=means.__getitem__, default=math.nan)
    return (rate, complete[rate]) if math.isfinite(means.get(rate, math.inf)) else None


def half_width(values: Sequence[float]) -> float:
    """Return half of the width of the 95 % interval of the mean."""
    return STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def group_table(title: str, found: Mapping[str, Done], seeds: Sequence[int]) -> str:
    """Return the settings of a group at their best rates, with differences from the first one paired by seed."""
    lines = [
        f"**{title}**, {len(seeds)} seeds",
        "",
        "| setting | rate | held-out loss | from the first | lowest on the way | steps | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    first = best_cells(next(iter(found.values())), seeds)
    for name, done in found.items():
        best = best_cells(done, seeds)
        if best is None:
            lines.append(f"| {name} | | not measured | | | | |")
            continue
        rate, cells = best
        losses = [loss_of(cell) for cell in cells]
        apart = [mine - loss_of(other) for mine, other in zip(losses, first[1], strict=True)] if first else []
        lowest = [min(loss for _, loss in cell["curve"]) for cell in cells if cell["curve"]]
        columns = (
            f"{rate:g}",
            f"{statistics.fmean(losses):.3f} ± {half_width(losses):.3f}",
            f"{statistics.fmean(apart):+.3f} ± {half_width(apart):.3f}" if any(apart) else "",
            f"{statistics.fmean(lowest):.3f}" if lowest else "",
            str(cells[0]["steps"]),
            f"{statistics.fmean(cell['seconds'] for cell in cells):.0f}",
        )
        lines.append(f"| {name} | {' | '.join(columns)} |")
    rates = sorted({rate for done in found.values() for rate in done})
    lines += ["", f"| seed {seeds[0]}, by rate | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines.append("| --- |" + " ---: |" * len(rates))
    for name, done in found.items():
        if done:
            cells_by_rate = [done.get(rate, {}).get(seeds[0]) for rate in rates]
            texts = [
                "" if cell is None else "failed" if cell["loss"] is None else f"{cell['loss']:.3f}"
                for cell in cells_by_rate
            ]
            lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)
