"""scripts/bench_merge.py: every way runs on equal random weights, scratch files go, a small disk is an error."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.processes.command import ROOT, environment

from tutor.engines.llamacpp.build import build_folder, is_built

SCRIPT = ROOT / "scripts" / "bench_merge.py"
sys.path.insert(0, str(SCRIPT.parent))
import bench_merge
from random_llama import PATTERNS, SIZES


def bench(folder: Path, *options: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, SCRIPT, "--size", "small", "--folder", folder / "disk", "--json", folder / "found.json"]
    return subprocess.run(
        [*command, *options], env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False
    )


def measured(folder: Path, part: str, *options: str | Path) -> Any:
    """Measure one layer of the small size; return the figures of a part."""
    done = bench(folder, "--layers", "1", "--parts", part, *options)
    assert done.returncode == 0, done.stderr
    assert list((folder / "disk").iterdir()) == []
    found = json.loads((folder / "found.json").read_text())
    assert list(found["parts"]) == [part]
    for way, row in found["parts"][part].items():
        assert f"| {way} | {row['work_s']:.2f} |" in done.stdout
    return found["parts"][part]


def check(ways: Any) -> None:
    """Check relations that hold on any machine: each time contains the one before, and ratios are quotients."""
    assert list(ways) == ["cp", "plain", "ours"]
    ours = ways["ours"]
    assert ours["work_times_cp"] == ours["work_s"] / ways["cp"]["work_s"]
    assert ours["work_times_plain"] == ours["work_s"] / ways["plain"]["work_s"]
    assert 0 < ours["work_s"] <= ours["checked_s"] <= ours["process_s"]
    assert 0 < ours["imported_rss_mb"] <= ours["peak_rss_mb"]


@pytest.mark.pipeline
def test_merge_is_measured_with_peft_and_cp(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    ways = measured(tmp_path, "merge")
    check(ways)
    assert 0 < ways["plain"]["imported_rss_mb"] <= ways["plain"]["peak_rss_mb"]


def test_measure_includes_child_processes(tmp_path: Path) -> None:
    """The child allocates 64 MiB, and reports 0.25 s of work."""
    (tmp_path / "model").mkdir()
    child = "held = b'x' * (64 << 20); import time; time.sleep(0.5)"
    says = json.dumps({"work_s": 0.25, "imported_rss_mb": 7.0})
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print({says!r})"
    (tmp_path / "out").mkdir()
    found = bench_merge.measure([sys.executable, "-c", parent], tmp_path / "model", tmp_path / "out")
    assert (found["work_s"], found["checked_s"], found["imported_rss_mb"]) == (0.25, 0.25, 7.0)
    assert found["process_s"] >= 0.5
    assert found["synced_s"] >= 0.25
    assert found["peak_anonymous_mb"] >= 64
    assert found["peak_rss_mb"] >= 64
    assert not (tmp_path / "out").exists()


def test_compare_adds_ratios_to_the_ways_before() -> None:
    ways = {
        name: {"work_s": work, "synced_s": 2 * work} for name, work in (("cp", 0.003), ("plain", 4.0), ("ours", 1.5))
    }
    bench_merge.compare(ways)
    assert ways["ours"] == {
        "work_s": 1.5, "synced_s": 3.0, "work_times_cp": 500.0, "work_times_plain": 0.375,
        "synced_times_cp": 500.0, "synced_times_plain": 0.375,
    }  # fmt: skip
    assert "work_times_cp" not in ways["plain"]
    assert [bench_merge.shown(name, ways["ours"]) for name in ("work_times_plain", "peak_rss_mb")] == ["0.38", ""]


@pytest.mark.pipeline
@pytest.mark.llamacpp
@pytest.mark.skipif(not is_built(build_folder()), reason="the pinned llama.cpp is not built")
def test_convert_is_measured_with_llamacpps_script_and_cp(demo_base: Path, tmp_path: Path) -> None:
    check(measured(tmp_path, "convert", "--base", demo_base))


def test_disk_too_small_for_two_models_exits_before_writing(tmp_path: Path) -> None:
    done = bench(tmp_path, "--layers", "200000")
    assert done.returncode == 1
    assert "free disk space, or give --layers" in done.stderr
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize(("dtype", "shift"), [("F16", 0), ("BF16", 16)])
def test_random_bits_have_magnitudes_of_trained_weights(dtype: str, shift: int) -> None:
    random, fixed = PATTERNS[dtype]
    bits = (np.arange(1 << 16, dtype=np.uint32) & random | fixed) << shift
    values = np.abs(bits.view(np.float32) if shift else bits.astype(np.uint16).view(np.float16).astype(np.float32))
    assert values.min() == 2**-7
    assert 0.12 < values.max() < 0.125


def test_size_8b_has_the_weight_count_of_an_8b() -> None:
    assert SIZES["8b"].weights == 8_030_261_248
