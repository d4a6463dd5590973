"""Terminal tables of the model: its training, its files, the quantization benchmark.

In: the results of the stages train, convert and ladder. Out: lines. Computes no figure.
"""

import math
from collections.abc import Mapping
from typing import Any

from tutor.recipe.quantizations import BF16, F16


def training_lines(train: Mapping[str, Any]) -> list[str]:
    """Return rows, seconds and held-out loss of the training."""
    held = train["held_out"]
    return [
        "",
        f"Trained on {train['rows']} rows in {train['seconds']:.0f} s ({train['samples_per_second']:.2f} samples/s, "
        f"{train['quantization']}, {train['precision']}); {held['rows']} rows held out",
        f"  {'':<22}{'before':>9}{'after':>9}",
        f"  {'held-out loss':<22}{held['loss_before']:>9.3f}{held['loss_after']:>9.3f}",
        f"  {'held-out perplexity':<22}{held['perplexity_before']:>9.2f}{held['perplexity_after']:>9.2f}",
    ]


def file_lines(convert: Mapping[str, Any], perplexities: Mapping[str, Any]) -> list[str]:
    """Return one row a GGUF: size and perplexity; then the tensors that another quantization replaces."""
    rows = ["", f"  {'file':<22}{'size':>11}{'held-out perplexity':>22}"]
    for name, entry in sorted(convert["files"].items(), key=lambda item: -item[1]["size"]):
        scored = perplexities.get(name.removesuffix(".gguf"), {}).get("perplexity")
        rows.append(f"  {name:<22}{entry['size'] / 1e6:>8.1f} MB{'' if scored is None else f'{scored:>22.2f}'}")
    for name, entry in convert["files"].items():
        for kind, count in entry.get("replaced", {}).items():
            rows.append(f"  {name}: Q8_0 in place of {kind} in {count} tensors: {kind} would lose what was trained")
    return rows


def ladder_lines(ladder: Mapping[str, Any]) -> list[str]:
    """Return one row a quantization: size, loss against F16, speed and memory; the largest first."""
    widths = {"size": 12, "perplexity": 11, "loses": 9, "KL": 8, "KL p99": 8, "same": 8, "reads": 10, "writes": 11}
    widths |= {"memory": 10}
    whole = next((kind for kind in (F16, BF16) if kind in ladder["quantizations"]), F16)
    rows = ["", f"  {f'against {whole}':<13}" + "".join(f"{head:>{width}}" for head, width in widths.items())]
    worse = ladder.get("worse_and_larger", {})
    for kind, each in sorted(ladder["quantizations"].items(), key=lambda item: -item[1]["size"]):
        memory = "-" if each["memory"] is None else f"{each['memory'] / 1e6:.0f} MB"
        cells = (
            f"{each['size'] / 1e6:.1f} MB",
            f"{each['perplexity']:.2f}",
            f"{100 * (math.exp(each['more']) - 1):+.2f} %",
            f"{each['kl']:.4f}",
            f"{each['kl_p99']:.3f}",
            f"{100 * each['same']:.1f} %",
            f"{each['prompt_per_second']:.0f} t/s",
            f"{each['tokens_per_second']:.1f} t/s",
            memory,
        )
        marks = " *" * (kind == ladder["served"]) + " !" * (kind in worse)
        sized = zip(cells, widths.values(), strict=True)
        rows.append(f"  {kind + marks:<13}" + "".join(f"{cell:>{width}}" for cell, width in sized))
    chosen = "no quantization is" if ladder["chosen"] == whole else f"{ladder['chosen']} is the smallest"
    inside = f"{chosen} within {ladder['budget']:g} nats of {whole}, in loss and in KL"
    flags = [
        f"  ! {kind} is larger and less accurate than {better}: remove it from convert.quantizations"
        for kind, better in worse.items()
    ]
    return [*rows, f"  * is served; {inside}", *flags]
