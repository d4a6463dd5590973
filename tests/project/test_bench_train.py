"""scripts/bench_train.py: all ways run on equal rows and have equal losses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes.command import ROOT, environment

SCRIPT = ROOT / "scripts" / "bench_train.py"


@pytest.mark.pipeline
def test_all_ways_have_equal_losses_and_the_recipes_settings(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[train]\nrank = 2\nbatch_size = 1\naccumulation = 4\n", "utf-8")
    out = tmp_path / "bench.json"
    command = [sys.executable, SCRIPT, "--model", tiny, "--quantization", "none", "--precision", "fp32", "--rows", "8"]
    done = subprocess.run(
        [*command, "--recipe", tmp_path / "r.toml", "--json", out],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(out.read_text())
    plain, trl, ours = (measured[name] for name in ("plain", "trl", "ours"))
    assert len(plain["losses"]) == len(trl["losses"]) == len(ours["losses"]) == 2
    assert trl["losses"] == pytest.approx(plain["losses"], rel=1e-3)  # dropout has other draws
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    tokens = 8 * plain["tokens_per_row"]
    assert plain["operations"]["adapters"] == pytest.approx(6 * tokens * 2 * 2 * (128 + 96 + 96 + 128))
    for figures in (plain, trl, ours):
        assert figures["samples_per_second"] > 0
        assert figures["utilisation"] > 0
        assert figures["operations"] == plain["operations"]
        assert 0.1 < figures["rss_gb"] < 50
    speeds = [figures["samples_per_second"] for figures in (plain, trl, ours)]
    cells = [*speeds, speeds[2] / speeds[0], speeds[2] / speeds[1]]
    assert f"| samples_per_second | {' | '.join(f'{cell:.2f}' for cell in cells)} |" in done.stdout
