"""GPUs, memory, processor and disks of this machine; /proc and /sys are folders of the test."""

import os
from pathlib import Path

import pytest

from tutor.machine import host
from tutor.machine.host import MIB, Gpu, Memory


def test_gpus_are_read_with_memory_in_bytes(machine):
    machine.gpu(24, 20, name="NVIDIA GeForce RTX 4090")
    sizes = (22888 * MIB, round(20e9 / MIB) * MIB)
    assert host.gpus() == [Gpu(0, "NVIDIA GeForce RTX 4090", "580.95.05", (8, 9), *sizes, "GPU-0aaaa-0")]
    assert host.driver_cuda() == (13, 0)


def test_gpus_without_a_working_driver_are_none(machine):
    assert host.gpus() == []
    assert host.driver_cuda() is None
    machine.gpu()
    (machine.folder / "code").write_text("9")
    assert host.gpus() == []


@pytest.mark.parametrize(
    "text", ["No devices were found", "0, GPU-0, a card, 580, 8.9, [N/A], [N/A]", "0, GPU-0, a card, 580, [N/A], 1, 1"]
)
def test_gpu_with_a_missing_value_is_ignored(machine, text):
    machine.gpu()
    (machine.folder / "gpus").write_text(text + "\n")
    assert host.gpus() == []


@pytest.mark.parametrize(
    ("visible", "indexes"),
    [
        ("0,1", [0, 1]),
        ("1", [1]),
        ("1,0", [1, 0]),
        ("", []),
        ("-1", []),
        ("GPU-1aaaa", [1]),
        ("0,7,1", [0]),
        ("GPU", []),
    ],
)
def test_hidden_gpus_are_left_out_like_in_cuda(machine, monkeypatch, visible, indexes):
    machine.gpu()
    machine.gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in host.gpus()] == indexes


def kernel(root: Path, cgroup: str = "", **limits: str) -> Path:
    """A machine with 24 GiB, 20 of them available, and cgroup files by their path."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal: {24 << 20} kB\nMemFree: 1 kB\nMemAvailable: {20 << 20} kB\nSwapFree: {1 << 20} kB\n"
    )
    (root / "proc/self/cgroup").write_text(cgroup)
    for path, text in limits.items():
        (root / "sys/fs/cgroup" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / path).write_text(text + "\n")
    return root


GIB = 1 << 30


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("", {}, None),
        ("0::/\n", {"memory.max": str(4 * GIB)}, 4 * GIB),
        ("0::/\n", {"memory.max": "max"}, None),
        ("0::/user/job\n", {"user/job/memory.max": "max", "user/memory.max": str(6 * GIB)}, 6 * GIB),
        ("0::/user/job\n", {"user/job/memory.max": str(3 * GIB), "user/memory.max": str(6 * GIB)}, 3 * GIB),
        (
            "0::/user/job\n",
            {"memory.max": str(2 * GIB)},
            2 * GIB,
        ),  # the path is the host's, the files are the container's
        ("9:name=systemd:/\n4:memory:/docker/1\n", {"memory/docker/1/memory.limit_in_bytes": str(5 * GIB)}, 5 * GIB),
        ("4:cpu,memory:/docker/1\n", {"memory/memory.limit_in_bytes": str(5 * GIB)}, 5 * GIB),
        ("4:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("0::/\n", {"memory.max": str(48 * GIB)}, None),  # more than the machine's memory
        ("0::/../..\n", {"memory.max": str(4 * GIB)}, 4 * GIB),
        ("nonsense\n", {}, None),
    ],
)
def test_memory_limit_of_cgroups_v1_and_v2_is_read(tmp_path, cgroup, limits, expected):
    total = expected or 24 * GIB
    found = host.memory(kernel(tmp_path, cgroup, **limits))
    assert found == Memory(total, min(total, 21 * GIB), expected)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_in_use_by_the_cgroup_is_not_available(tmp_path, version):
    """The page cache can be reclaimed, so it counts as available."""
    files = (
        {
            "memory.max": str(8 * GIB),
            "memory.current": str(5 * GIB),
            "memory.stat": f"anon 7\ninactive_file {GIB}\nactive_file {GIB}",
        }
        if version == 2
        else {
            "memory/memory.limit_in_bytes": str(8 * GIB),
            "memory/memory.usage_in_bytes": str(5 * GIB),
            "memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}",
        }
    )
    found = host.memory(kernel(tmp_path, "0::/\n" if version == 2 else "4:memory:/\n", **files))
    assert found == Memory(8 * GIB, 5 * GIB, 8 * GIB)
    assert found.in_ram == 5 * GIB


def test_memory_available_in_ram_excludes_swap(tmp_path):
    assert host.memory(kernel(tmp_path)).in_ram == 20 * GIB


def test_memory_without_proc_files_is_none(tmp_path):
    assert host.memory(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "name", "features"),
    [
        ("model name\t: Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n", "Xeon", 4),
        ("model name\t: Old\nflags\t\t: fpu sse2\n", "Old", 0),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", os.uname().machine, 2),
        ("", os.uname().machine, 0),
    ],
)
def test_processor_features_are_read_from_cpuinfo(tmp_path, text, name, features):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(text)
    found = host.processor(tmp_path)
    assert (found.name, len(found.features)) == (name, features)
    assert found.cores == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/of/the/host\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),
        ("3:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ("3:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("0::/\n", {"cpu.max": "garbage"}, 8),
        ("", {}, 8),
    ],
)
def test_quota_of_a_container_limits_the_usable_cores(tmp_path, monkeypatch, cgroup, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    root = kernel(tmp_path, cgroup, **files)
    assert host.usable_cores(root) == expected
    assert host.processor(root).cores == expected


@pytest.mark.parametrize(("cores", "given", "expected"), [(2, None, "2"), (2, "6", "6"), (8, None, None)])
def test_quota_limits_the_threads_of_libraries(monkeypatch, cores, given, expected):
    monkeypatch.setattr(os, "environ", {} if given is None else {"OMP_NUM_THREADS": given})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(host, "usable_cores", lambda: cores)
    host.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == expected


def test_closed_folder_is_on_its_parents_disk(tmp_path):
    (tmp_path / "closed" / "inside").mkdir(parents=True)
    (tmp_path / "closed").chmod(0)
    if os.access(tmp_path / "closed", os.X_OK):
        pytest.skip("this user may enter any folder (root)")
    assert host.free_disk(tmp_path / "closed" / "inside" / "more")[1] == tmp_path / "closed"
