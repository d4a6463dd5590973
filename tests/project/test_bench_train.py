"""scripts/bench_train.py: both loops run on equal rows and have equal losses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes.command import ROOT, environment

SCRIPT = ROOT / "scripts" / "bench_train.py"


@pytest.mark.pipeline
def test_both_loops_have_equal_losses_and_table_has_speeds(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, SCRIPT, "--model", tiny, "--quantization", "none", "--precision", "fp32"]
    done = subprocess.run(
        [*command, "--rows", "20", "--json", out], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(out.read_text())
    plain, ours = measured["plain"], measured["ours"]
    assert len(plain["losses"]) == len(ours["losses"]) == 2
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-3)  # dropout has other draws
    for figures in (plain, ours):
        assert figures["samples_per_second"] > 0
        assert 0.1 < figures["rss_gb"] < 50
    ratio = ours["samples_per_second"] / plain["samples_per_second"]
    assert (
        f"| samples_per_second | {plain['samples_per_second']:.2f} | {ours['samples_per_second']:.2f} | {ratio:.2f} |"
        in (done.stdout)
    )
