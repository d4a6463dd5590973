"""The device's precision and available memory, in a container and outside."""

from pathlib import Path
from typing import Any

import pytest

from tutor.errors import HostError
from tutor.machine import device
from tutor.machine.device import choose_precision, decide_precision, refuse_precision
from tutor.machine.host import Gpu, Processor


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


CPU = Processor("a processor", 2, ("avx2",))


def test_auto_precision_without_bf16_is_fp16_or_fp32(based_on):
    train = based_on().train
    old = Gpu(0, "T4", "580", (7, 5), 1, 1)
    assert device.precision_on(train.precision, old, CPU) == "fp16"
    assert device.precision_on(train.precision, None, CPU) == "fp32"
    assert device.precision_on(train.precision, None, Processor("x", 2, ("bf16",))) == "bf16"


@pytest.mark.parametrize(
    ("capability", "cpu_bf16", "chosen"),
    [
        (None, True, "bf16"),
        (None, False, "fp32"),
        ((7, 0), True, "fp16"),
        ((7, 5), True, "fp16"),
        ((8, 0), False, "bf16"),
        ((8, 9), False, "bf16"),
        ((9, 0), False, "bf16"),
        ((12, 0), False, "bf16"),
    ],
)
def test_auto_precision_is_native_to_the_machine(capability: Any, cpu_bf16: Any, chosen: str) -> None:
    assert decide_precision("auto", capability, cpu_bf16=cpu_bf16) == chosen
    for wanted in ("fp32", "bf16" if chosen == "bf16" else "fp32"):
        assert decide_precision(wanted, capability, cpu_bf16=cpu_bf16) == wanted


def test_precision_unknown_to_the_machine_raises_error() -> None:
    with pytest.raises(HostError, match="fp16 needs a GPU") as caught:
        refuse_precision("fp16", None)
    assert caught.value.code == 4
    with pytest.raises(HostError, match=r"this GPU has compute capability 7\.5, which has no native bf16"):
        refuse_precision("bf16", (7, 5))
    for setting, capability in (("fp16", (9, 0)), ("bf16", (8, 0)), ("bf16", None), ("auto", (7, 0)), ("fp32", None)):
        refuse_precision(setting, capability)
    assert decide_precision("fp16", (9, 0), cpu_bf16=True) == "fp16"


def test_auto_precision_on_this_cpu_is_bf16_only_if_native() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    flags = Path("/proc/cpuinfo").read_text()
    native = any(name in flags.split() for name in ("avx512_bf16", "amx_bf16", "bf16"))
    assert choose_precision("auto") == ("bf16" if native else "fp32")
