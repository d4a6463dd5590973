"""The hardware of this machine: GPUs, memory, processor, disks.

In: /proc, /sys, nvidia-smi. Out: plain numbers. Needs neither torch nor NVML, so that the base install gives the
values that the trainer's image gives. Does not decide whether anything fits.
"""

import contextlib
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PROGRAM_TIMEOUT = 60
"""Maximum seconds that a program may run, such as nvidia-smi or docker."""

MIB = 1 << 20
"""Bytes of a MiB."""

CUDA_CONTEXT = 0.5e9
"""Bytes of a CUDA context in GPU memory: an allowance, not measured."""

NO_LIMIT = 1 << 60
"""Smallest number of bytes that means "no limit" in cgroup v1; cgroup v2 has the word "max"."""

CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
"""Files of limit and usage in cgroup v1, and the fields of the page cache in memory.stat."""

CGROUP_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
"""Files of limit and usage in cgroup v2, and the fields of the page cache in memory.stat."""

GPU_FIELDS = ("index", "uuid", "name", "driver_version", "compute_cap", "memory.total", "memory.free")
"""Columns of the nvidia-smi query."""

LOST_GPU = re.compile(r"library version mismatch|GPU is lost|Unable to determine the device handle")
"""Texts of nvidia-smi for a driver that was updated under its kernel module, and a GPU that fell off the bus."""

MATRIX_FEATURES = ("amx_bf16", "avx512_bf16", "bf16")
"""Processor flags (x86, Arm) of bf16 multiplication; how fast it is has to be measured."""

VECTOR_FEATURES = ("avx512f", "avx2", "asimd")
"""Processor flags (x86, Arm) of fast vector instructions."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU that is visible to programs started here."""

    index: int
    name: str
    driver: str
    capability: tuple[int, int]
    total: int  # bytes
    free: int  # bytes
    uuid: str = ""  # the name that CUDA_VISIBLE_DEVICES takes, whatever the order of CUDA's numbers


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes."""

    total: int  # of the machine, or the container's limit
    available: int  # without taking anything from other programs; swap included
    limit: int | None  # the container's, where it is below the machine's
    in_ram: int = field(default=0, compare=False)  # available without swap

    @property
    def owner(self) -> str:
        """Name for messages of what the memory is limited by."""
        return "this container" if self.limit else "this machine"


@dataclass(frozen=True)
class Processor:
    """The processor, limited to the cores that this process may use."""

    name: str
    cores: int
    features: tuple[str, ...]  # only matrix and vector features


def gpus() -> list[Gpu]:
    """The GPUs that CUDA would show, in nvidia-smi's order; empty without a working driver."""
    code, text, _ = run_program("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits")
    found = [gpu for line in text.splitlines() if code == 0 for gpu in _gpu(line)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return list(_visible(found, [name.strip() for name in visible.split(",")]))


def _gpu(line: str) -> Iterator[Gpu]:
    """The GPU of a line from nvidia-smi; nothing for another line, or where a number is missing ([N/A])."""
    values = [value.strip() for value in line.split(",")]
    with contextlib.suppress(ValueError):
        index, uuid, name, driver, capability, total, free = values
        major, minor = map(int, capability.split("."))
        yield Gpu(int(index), name, driver, (major, minor), int(total) * MIB, int(free) * MIB, uuid)


def _visible(found: Sequence[Gpu], names: Iterable[str]) -> Iterator[Gpu]:
    """The GPUs of CUDA_VISIBLE_DEVICES as CUDA reads it: numbers or UUID prefixes, up to the first unknown one."""
    for name in names:
        matches = [gpu for gpu in found if name == str(gpu.index) or (len(name) > 4 and gpu.uuid.startswith(name))]
        if not matches:
            return
        yield matches[0]


def driver_cuda() -> tuple[int, ...] | None:
    """The newest CUDA version that the driver can run, from nvidia-smi's heading; None without one."""
    code, text, _ = run_program("nvidia-smi")
    found = re.search(r"CUDA[\w ]*Version\s*:\s*(\d+(?:\.\d+)+)", text)
    return version(found[1]) if code == 0 and found else None


def lost_gpu() -> str | None:
    """The line in which nvidia-smi reports a GPU that only a reboot brings back; None without one."""
    code, *texts = run_program("nvidia-smi")
    lines = (line.strip() for line in "\n".join(texts).splitlines() if code and LOST_GPU.search(line))
    return next(lines, None)


def gpu_users() -> list[str]:
    """The programs that hold GPU memory, each as "PID NAME (N.N GB)"."""
    code, text, _ = run_program(
        "nvidia-smi", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"
    )
    rows = [line.split(",") for line in text.splitlines() if code == 0 and line.count(",") >= 2]
    return [
        f"{row[0].strip()} {Path(row[1].strip()).name} ({int(row[-1]) * MIB / 1e9:.1f} GB)"
        for row in rows
        if row[-1].strip().isdigit()
    ]


def memory(root: Path = Path("/")) -> Memory | None:
    """Main memory, or the part that a container (cgroup v1 or v2) may use; None where the kernel reports none."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        lines = (root / "proc/meminfo").read_text("ascii", "replace").splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
        total, in_ram, swap = sizes["MemTotal"], sizes["MemAvailable"], sizes.get("SwapFree", 0)
        limits = _cgroup_limits(root)
        limit = min((size for size, _ in limits), default=total)
        left = min((max(0, size - used) for size, used in limits), default=total)
        if limit >= total:
            return Memory(total, min(in_ram, left) + swap, None, min(in_ram, left))
        return Memory(limit, min(left, in_ram + swap), limit, min(left, in_ram))
    return None


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """Memory limits of this process's cgroup and of those above it, with what each has in use; both in bytes."""
    limits = []
    for folder, version in _cgroups(root, "memory"):
        limit, usage, cache = CGROUP_V2 if version == 2 else CGROUP_V1
        sizes = (size for size in _numbers(folder / limit) if size < NO_LIMIT)
        limits += [(size, _cgroup_use(folder, usage, cache)) for size in sizes]
    return limits


def _cgroups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """The folders of this process's cgroup and of those above it, each with its version of cgroup."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = (*line.split(":", 2), "-", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container the path may be the host's; the container's own files are then at the top.
        folders = [top / path.strip("/"), *(top / path.strip("/")).parents]
        for folder in folders[: folders.index(top) + 1]:
            yield folder, 1 if controllers else 2


def usable_cores(root: Path = Path("/")) -> int:
    """Number of threads that compute at a time: the cores of this process, or less by a container's quota of time."""
    quotas = [_own_cores()]
    for folder, version in _cgroups(root, "cpu"):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quota, period, *_ = (
            *(word for name in names for line in _lines(folder / name) for word in line.split()),
            "",
            "",
        )
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(math.ceil(int(quota) / int(period)))
    return max(1, min(quotas))


def _own_cores() -> int:
    """Number of cores that the kernel runs this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads() -> None:
    """Let libraries start no more threads than a container's quota has cores. Call it before torch is imported."""
    cores = usable_cores()
    if cores < _own_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))


def _cgroup_use(folder: Path, usage: str, cache: Sequence[str]) -> int:
    """Bytes of a cgroup that the kernel cannot reclaim: its usage without the page cache, as in MemAvailable."""
    lines = (line.split() for line in _lines(folder / "memory.stat"))
    reclaimable = sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in cache)
    return max(0, next(iter(_numbers(folder / usage)), 0) - reclaimable)


def _numbers(path: Path) -> list[int]:
    return [int(text) for text in _lines(path) if text.isdigit()]


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text("utf-8", "replace").splitlines()
    return []


def processor(root: Path = Path("/")) -> Processor:
    """The processor's name, usable cores, and matrix and vector features."""
    fields = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in _lines(root / "proc/cpuinfo"))
    }
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    features = tuple(name for name in (*MATRIX_FEATURES, *VECTOR_FEATURES) if name in flags)
    return Processor(fields.get("model name", os.uname().machine), usable_cores(root), features)


def free_disk(folder: Path) -> tuple[int, Path, int]:
    """The disk of a folder that may not exist yet: device number, nearest existing folder, free bytes."""
    place = next((path for path in (folder.absolute(), *folder.absolute().parents) if _exists(path)), Path("/"))
    return place.stat().st_dev, place, shutil.disk_usage(place).free


def _exists(path: Path) -> bool:
    with contextlib.suppress(OSError):  # a parent folder that this user may not enter
        return path.exists()
    return False


def listener(port: int, root: Path = Path("/")) -> str:
    """The program that listens on a TCP port, as "NAME (PID)"; "" where none is found, as of another user."""
    lines = (line.split() for name in ("tcp", "tcp6") for line in _lines(root / "proc/net" / name)[1:])
    sockets = {f"socket:[{line[9]}]" for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")}
    for link in (root / "proc").glob("[0-9]*/fd/*") if sockets else ():
        with contextlib.suppress(OSError):
            if str(link.readlink()) in sockets:
                folder = link.parents[1]
                return f"{''.join(_lines(folder / 'comm')[:1])} ({folder.name})"
    return ""


def version(text: str) -> tuple[int, ...]:
    """The first dotted number in a text; (0,) without one."""
    found = re.search(r"\d+(\.\d+)+", text)
    return tuple(map(int, found[0].split("."))) if found else (0,)


def dotted(version: tuple[int, ...]) -> str:
    """The numbers of a version, with dots between."""
    return ".".join(map(str, version))


class ProgramOutput(NamedTuple):
    """Exit code and output of a program; 127 when it is not installed, 126 when it fails to run or times out."""

    code: int
    text: str  # stdout
    error: str  # stderr, or why it did not run


def run_program(*command: str) -> ProgramOutput:
    """Run a program to its end, without input. What it prints on stderr, such as a warning, is no part of its text."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROGRAM_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        return ProgramOutput(127, "", "")
    except subprocess.TimeoutExpired:
        return ProgramOutput(126, "", f"no answer within {PROGRAM_TIMEOUT} s")
    except OSError as error:
        return ProgramOutput(126, "", str(error))
    return ProgramOutput(done.returncode, done.stdout, done.stderr)
