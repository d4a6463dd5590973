"""stages/ladder/plot.py: the SVG of the quantizations."""

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from support.outputs.quantizations import DEMO, F16, quantization

from tutor.stages.ladder.plot import plot


def figures(*names: str) -> dict[str, dict[str, Any]]:
    return {**F16, **{name: quantization(130 + number, 0.01, 0.01 / (number + 1)) for number, name in enumerate(names)}}


def test_plot_is_xml_with_every_quantization_and_the_budget() -> None:
    drawn = plot(DEMO, 0.01, "Q8_0")
    text = " ".join(ET.fromstring(drawn).itertext())
    assert all(word in text for word in (*DEMO, "Q8_0 (served)", "F16 (reference)", "budget 0.01"))
    assert plot(DEMO, 0.01, "Q8_0") == drawn


def test_labels_of_equal_sizes_do_not_overlap() -> None:
    drawn = plot(figures("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M"), 0.01, "Q6_K")
    placed = [
        (float(x), float(y))
        for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="start"[^>]*>Q', drawn)
    ]
    assert len(placed) == 5
    assert all(
        abs(one[1] - two[1]) >= 12 or abs(one[0] - two[0]) >= 60
        for number, one in enumerate(placed)
        for two in placed[:number]
    )


@pytest.mark.parametrize("budget", [1e-9, 1.0])
def test_all_shapes_are_inside_the_picture(budget: float) -> None:
    drawn = plot(DEMO, budget, "F16")
    for attribute, end in (("cx", 720), ("x", 720), ("x1", 720), ("x2", 720), ("cy", 380), ("y", 380), ("y1", 380)):
        assert all(0 <= float(value) <= end for value in re.findall(rf' {attribute}="(-?[\d.]+)"', drawn))
