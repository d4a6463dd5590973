"""formats/chart.py: ticks. The charts of the ladder and report stages cover the positions."""

import pytest

from tutor.formats.chart import ticks


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (2, 2), (0, 0), (1e-9, 3e6), (-3, 700)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 8
