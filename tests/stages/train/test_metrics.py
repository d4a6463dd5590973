"""stages/train/metrics.py (speeds without evaluations, durations, utilization) and plot.py (equal bytes)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from support.models.training import history

from tutor.stages.train import metrics
from tutor.stages.train.plot import draw


def test_pace_excludes_evaluations_and_predicts_them() -> None:
    now = 100.0
    pace = metrics.Pace(lambda: now)
    pace.begin(10, 1.0)  # resumed after ten steps, one epoch
    now += 4
    with pace.paused():
        now += 6
    speeds = pace.since_report(12, 1.5, rows=20, tokens=800)
    assert speeds == {"seconds": 10.0, "steps_per_second": 0.5, "samples_per_second": 2.5, "tokens_per_second": 100.0}
    assert pace.seconds_left(12, 20, evaluations=2) == pytest.approx(8 * 2 + 2 * 6)
    assert pace.elapsed(1.5) == (pytest.approx(4.0), pytest.approx(0.5))
    now += 1
    assert pace.since_report(14, 1.75, rows=20, tokens=800)["steps_per_second"] == 2.0


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.2, "0:00"), (65, "1:05"), (3599.7, "1:00:00"), (90061, "25:01:01")]
)
def test_duration_is_formatted_as_minutes_or_hours(seconds: float, expected: str) -> None:
    assert metrics.format_duration(seconds) == expected


def test_gpu_utilization_without_its_library_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        assert metrics.gpu_utilization() in range(101)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert metrics.gpu_utilization() is None
    assert metrics.resources([50, 100])["gpu_utilization"] == 75.0


@pytest.mark.slow
def test_plot_has_equal_bytes_in_another_process(tmp_path: Path) -> None:
    found = history([5.0, None, 3.0], at3=2.0)
    found[1]["grad_norm"] = None
    draw(found, 6.0, 3, tmp_path / "one.svg")
    code = (
        "import json, sys; from pathlib import Path; from tutor.stages.train.plot import draw;"
        "draw(json.loads(sys.argv[1]), 6.0, 3, Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(found), tmp_path / "two.svg"], check=True)
    picture = (tmp_path / "one.svg").read_bytes()
    assert picture == (tmp_path / "two.svg").read_bytes()
    assert picture.rstrip().endswith(b"</svg>")
    assert b"20" + b"26-" not in picture
