"""scripts/bench_help.py: both commands run by turns, and the table has their medians and the ratio."""

import subprocess
import sys

from support.processes.command import ROOT, environment

SCRIPT = ROOT / "scripts" / "bench_help.py"
sys.path.insert(0, str(SCRIPT.parent))
import bench_help


def test_table_has_medians_and_their_ratio_to_python_alone() -> None:
    times = {"python -c pass": [0.03, 0.01, 0.02], "tutor --help": [0.05, 0.9, 0.04]}
    assert bench_help.table(times).splitlines()[2:] == [
        "| `python -c pass` | 20 | 1.00 |",
        "| `tutor --help` | 50 | 2.50 |",
    ]


def test_bench_help_runs_both_commands() -> None:
    command = [sys.executable, SCRIPT, "--runs", "1"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[2:]] == ["| `python -c pass`", "| `tutor --help`"]
