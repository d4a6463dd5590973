"""The device's precision and available memory, in a container and outside."""

from pathlib import Path

import pytest


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
