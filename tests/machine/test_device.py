"""The device's precision and available memory, in a container and outside."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fakes.machine import HEADING
from support.processes.command import ROOT

from tutor.errors import HostError, RecipeError
from tutor.machine import device, host
from tutor.machine.device import (
    BF16_GAIN,
    PrecisionChoice,
    choose_precision,
    decide_precision,
    recorded_precision,
    refuse_overflow,
    refuse_precision,
)
from tutor.machine.matmul_rate import MatmulRates
from tutor.machine.memory.shapes import SHAPES


@pytest.mark.parametrize(
    ("limit", "expected"), [("max\n", 5000 * 1024), ("4096000\n", 4096000 - 96000), (None, 5000 * 1024)]
)
def test_available_memory_is_limited_by_the_container(tmp_path: Path, limit: str | None, expected: int) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("GPU memory is read from its driver")
    from tutor.machine.device import loading_memory

    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    meminfo = "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 5000 kB\nSwapFree: 700 kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    if limit:
        (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
        (tmp_path / "sys/fs/cgroup/memory.max").write_text(limit)
        (tmp_path / "sys/fs/cgroup/memory.current").write_text("96000\n")
    assert loading_memory(tmp_path).available == expected


def test_training_memory_of_this_process_is_plausible() -> None:
    pytest.importorskip("torch")
    from tutor.machine.device import training_memory

    memory = training_memory()
    assert 10**8 < memory.available <= memory.total < 10**14


@pytest.mark.parametrize(
    ("bf16", "fp32", "chosen"),
    [
        (927e9, 219e9, "bf16"),  # AVX-512 bf16 without AMX, measured
        (156e9, 288e9, "fp32"),  # AVX-512 bf16 without AMX too, on another processor
        (BF16_GAIN * 100e9, 100e9, "bf16"),
        (BF16_GAIN * 100e9 - 1, 100e9, "fp32"),
        (100e9, 100e9, "fp32"),
    ],
)
def test_auto_precision_of_a_cpu_follows_its_rates(bf16: float, fp32: float, chosen: str) -> None:
    rates = MatmulRates(bf16, fp32)
    assert decide_precision("auto", SHAPES["tiny"], None, rates) == PrecisionChoice(chosen, "rates", rates)


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16"), ((9, 0), "bf16"), ((12, 0), "bf16")],
)
def test_auto_precision_of_a_gpu_follows_its_capability(capability: tuple[int, int], chosen: str) -> None:
    assert decide_precision("auto", SHAPES["tiny"], capability, None) == PrecisionChoice(chosen, "GPU")


@pytest.mark.parametrize(
    ("setting", "capability"), [("fp32", None), ("bf16", None), ("fp16", (9, 0)), ("fp32", (7, 5))]
)
def test_precision_of_the_recipe_is_kept_for_any_rates(setting: str, capability: Any) -> None:
    slow = MatmulRates(1e9, 1e9)
    assert decide_precision(setting, SHAPES["tiny"], capability, slow) == PrecisionChoice(setting, "setting", slow)


@pytest.mark.parametrize(
    ("capability", "chosen"), [((7, 5), PrecisionChoice("fp32", "range")), ((8, 0), PrecisionChoice("bf16", "GPU"))]
)
def test_auto_precision_of_a_wide_family_is_never_fp16(capability: tuple[int, int], chosen: PrecisionChoice) -> None:
    shape = replace(SHAPES["tiny"], family="gemma3_text")
    found = decide_precision("auto", shape, capability, None)
    assert found == chosen
    assert ("overflow in fp16" in str(found)) == (chosen.reason == "range")
    with pytest.raises(RecipeError, match="gemma3_text models overflow") as caught:
        refuse_overflow("fp16", shape)
    assert "\n" not in str(caught.value)
    refuse_overflow("fp16", SHAPES["tiny"])


def test_precision_unknown_to_the_machine_raises_error() -> None:
    with pytest.raises(HostError, match="fp16 needs a GPU") as caught:
        refuse_precision("fp16", None)
    assert caught.value.code == 4
    with pytest.raises(HostError, match=r"this GPU has compute capability 7\.5, which has no native bf16"):
        refuse_precision("bf16", (7, 5))
    for setting, capability in (("fp16", (9, 0)), ("bf16", (8, 0)), ("bf16", None), ("auto", (7, 0)), ("fp32", None)):
        refuse_precision(setting, capability)


def test_choice_on_this_cpu_measures_only_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    fast, measured = MatmulRates(900e9, 200e9), []

    def find_rates(shape: Any, processor: Any) -> MatmulRates:
        measured.append(shape)
        return fast

    monkeypatch.setattr(device, "find_rates", find_rates)
    assert choose_precision("fp32", SHAPES["tiny"]) == PrecisionChoice("fp32", "setting")
    assert measured == []
    assert choose_precision("auto", SHAPES["tiny"]) == PrecisionChoice("bf16", "rates", fast)
    assert measured == [SHAPES["tiny"]]


def test_choice_is_one_line_with_both_rates_and_a_record() -> None:
    choice = PrecisionChoice("fp32", "rates", MatmulRates(156.24e9, 288e9))
    assert str(choice) == "computing in fp32: matrix products reach 288 GFLOP/s in fp32, 156 in bf16"
    assert choice.record == {
        "precision": "fp32",
        "precision_reason": "rates",
        "matmul_gflops": {"bf16": 156.2, "fp32": 288.0},
    }
    assert str(PrecisionChoice("bf16", "checkpoint")) == "computing in bf16 as in the checkpoint"
    assert PrecisionChoice("bf16", "checkpoint").record["matmul_gflops"] is None


@pytest.mark.parametrize(
    ("reason", "expected"),
    [("rates", "bf16"), ("memory", "bf16"), ("checkpoint", "bf16"), ("GPU", None), ("setting", None), (None, None)],
)
def test_recorded_precision_is_a_cpus_own_choice(reason: str | None, expected: str | None) -> None:
    results = {"precision": "bf16"} | ({"precision_reason": reason} if reason else {})
    assert recorded_precision(results) == expected


# GPUs that PyTorch cannot use, or that are too many


def test_pinned_cuda_is_that_of_the_requirements() -> None:
    text = (ROOT / "requirements" / "train.txt").read_text("utf-8")
    assert f"nvidia-cuda-runtime=={'.'.join(map(str, device.PINNED_CUDA))}." in text


def test_driver_older_than_pytorch_is_refused_with_both(machine: Any) -> None:
    pytest.importorskip("torch")
    machine.gpu()
    for runs in ("13.0", "14.1"):
        (machine.folder / "heading").write_text(HEADING.replace("13.0", runs))
        device.refuse_unusable_gpu(*host.gpus())
    (machine.folder / "heading").write_text(HEADING.replace("13.0", "12.8"))
    with pytest.raises(
        HostError, match=r"driver 580\.95\.05 of a card runs CUDA up to 12\.8, and PyTorch needs 13\.2"
    ) as one:
        device.refuse_unusable_gpu(*host.gpus())
    assert "update the driver" in one.value.hint
    assert "CUDA_VISIBLE_DEVICES=" in one.value.hint


def test_pytorch_without_cuda_is_refused_where_a_gpu_is(
    machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "site" / "torch-2.15.0+cpu.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.15.0+cpu\n")
    machine.gpu()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    with pytest.raises(HostError, match=r"PyTorch 2\.15\.0\+cpu has no CUDA, which a card needs; make install"):
        device.refuse_unusable_gpu(*host.gpus())


@pytest.mark.parametrize(
    ("says", "refused"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95", True),
        ("Unable to determine the device handle for GPU0000:01:00.0: Unknown Error", True),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", False),  # perhaps no GPU
    ],
)
def test_lost_gpu_is_refused_unless_it_is_hidden(
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    says: str,
    refused: bool,  # noqa: FBT001
) -> None:
    machine.program("nvidia-smi", f'#!/bin/sh\necho "{says}"\nexit 18\n')
    if refused:
        with pytest.raises(HostError, match=r"the GPU does not answer: .*; reboot the machine") as one:
            device.refuse_unusable_gpu(None)
        assert one.value.message.endswith(says.partition("\n")[0])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    device.refuse_unusable_gpu(None)


def test_gpu_that_pytorch_does_not_see_is_refused_with_reason(machine: Any) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("PyTorch sees a GPU here")
    machine.gpu()
    with pytest.raises(HostError, match=r"the driver shows a card, PyTorch does not: .*NVIDIA driver"):
        device.training_memory()


def test_first_of_two_gpus_is_used_and_named(
    machine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    machine.gpu(name="first")
    device.use_one_gpu()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    machine.gpu(name="second")
    device.use_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-0aaaa-0"
    assert [gpu.name for gpu in host.gpus()] == ["first"]
    assert "2 GPUs are visible: training uses the first, first" in caplog.text


def test_launched_processes_keep_all_gpus(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.gpu()
    machine.gpu()
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    device.use_one_gpu()
    assert len(host.gpus()) == 2


def test_two_gpus_that_nvidia_smi_does_not_show_are_refused(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(HostError, match="2 GPUs are visible, and training takes one; set CUDA_VISIBLE_DEVICES=0"):
        device.training_memory()
