"""What this machine has: GPUs, memory, processor, disks. In: /proc, /sys, nvidia-smi. Out: plain numbers.

Needs neither torch nor NVML: the base install asks the same questions as the trainer's image. Judges nothing.
"""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ASKING = 60  # seconds until a program has answered
MIB = 1 << 20
CUDA = 0.5e9
"""Bytes of a CUDA context in GPU memory: an allowance, not measured."""

NO_LIMIT = 1 << 60
"""Smallest number of bytes that means "no limit" in cgroup v1; cgroup v2 has the word "max"."""

CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Files of limit and usage in cgroup v1, and the field of the inactive page cache in memory.stat."""

CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
"""Files of limit and usage in cgroup v2, and the field of the inactive page cache in memory.stat."""

GPU_FIELDS = ("index", "uuid", "name", "driver_version", "compute_cap", "memory.total", "memory.free")
MATRIX_FEATURES = ("amx_bf16", "avx512_bf16", "bf16")
"""Processor flags (x86, Arm) that multiply in bf16 themselves, as engines/hf/engine.py asks torch for them."""
VECTOR_FEATURES = ("avx512f", "avx2", "asimd")


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU that a program started here would see."""

    index: int
    name: str
    driver: str
    capability: tuple[int, int]
    total: int  # bytes
    free: int  # bytes


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes."""

    total: int  # of the machine, or the container's limit
    available: int  # without taking anything from other programs; swap included
    limit: int | None  # the container's, where it is below the machine's
    in_ram: int = field(default=0, compare=False)  # available without swap


@dataclass(frozen=True)
class Processor:
    """The processor as this process may use it."""

    name: str
    cores: int
    features: tuple[str, ...]  # of those that decide how fast models run

    @property
    def multiplies_bf16(self) -> bool:
        """Whether bf16 is quicker than fp32 here."""
        return any(name in self.features for name in MATRIX_FEATURES)


def gpus() -> list[Gpu]:
    """The GPUs that CUDA would show, in nvidia-smi's order; none where no driver answers."""
    code, text = said("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits")
    found = [(uuid, gpu) for line in text.splitlines() if code == 0 for uuid, gpu in _gpu(line)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [gpu for _, gpu in found]
    return list(_chosen(found, [name.strip() for name in visible.split(",")]))


def _gpu(line: str) -> Iterator[tuple[str, Gpu]]:
    """A line of nvidia-smi's, by its UUID; nothing where it is no such line, or a number is missing ([N/A])."""
    values = [value.strip() for value in line.split(",")]
    with contextlib.suppress(ValueError):
        index, uuid, name, driver, capability, total, free = values
        major, minor = map(int, capability.split("."))
        yield uuid, Gpu(int(index), name, driver, (major, minor), int(total) * MIB, int(free) * MIB)


def _chosen(found: Sequence[tuple[str, Gpu]], names: Iterable[str]) -> Iterator[Gpu]:
    """As CUDA reads CUDA_VISIBLE_DEVICES: numbers or beginnings of UUIDs, and nothing behind the first unknown one."""
    for name in names:
        fits = [gpu for uuid, gpu in found if name == str(gpu.index) or (len(name) > 4 and uuid.startswith(name))]
        if not fits:
            return
        yield fits[0]


def driver_cuda() -> tuple[int, ...] | None:
    """The newest CUDA that the driver can run, as nvidia-smi's heading says; None where it does not."""
    code, text = said("nvidia-smi")
    found = re.search(r"CUDA[\w ]*Version\s*:\s*(\d+(?:\.\d+)+)", text)
    return version(found[1]) if code == 0 and found else None


def gpu_users() -> list[str]:
    """Who holds memory of the GPUs: "PID NAME (N.N GB)" each."""
    code, text = said(
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
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = (*line.split(":", 2), "-", "")[:3]
        if controllers == "":
            top, names = root / "sys/fs/cgroup", CGROUP_V2
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", CGROUP_V1
        else:
            continue
        # In a container the path may be the host's; the container's own files are then at the top.
        folders = [top / path.strip("/"), *(top / path.strip("/")).parents]
        for folder in folders[: folders.index(top) + 1]:
            sizes = (size for size in _numbers(folder / names[0]) if size < NO_LIMIT)
            limits += [(size, _cgroup_use(folder, *names[1:])) for size in sizes]
    return limits


def _cgroup_use(folder: Path, usage: str, cached: str) -> int:
    """Bytes of a cgroup that the kernel cannot take back: its usage without the inactive part of the page cache."""
    lines = (line.split() for line in _lines(folder / "memory.stat"))
    inactive = sum(int(line[1]) for line in lines if len(line) == 2 and line[0] == cached)
    return max(0, next(iter(_numbers(folder / usage)), 0) - inactive)


def _numbers(path: Path) -> list[int]:
    return [int(text) for text in _lines(path) if text.isdigit()]


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text("utf-8", "replace").splitlines()
    return []


def processor(root: Path = Path("/")) -> Processor:
    """The processor's name, the cores that this process may use, and the features that models are fast with."""
    fields = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in _lines(root / "proc/cpuinfo"))
    }
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    features = tuple(name for name in (*MATRIX_FEATURES, *VECTOR_FEATURES) if name in flags)
    return Processor(fields.get("model name", os.uname().machine), len(os.sched_getaffinity(0)), features)


def free_disk(folder: Path) -> tuple[int, Path, int]:
    """The disk that a folder lies on, or would: its number, the nearest folder that exists, free bytes."""
    place = next((path for path in (folder.absolute(), *folder.absolute().parents) if _is_there(path)), Path("/"))
    return place.stat().st_dev, place, shutil.disk_usage(place).free


def _is_there(path: Path) -> bool:
    with contextlib.suppress(OSError):  # a folder above it that this user may not enter
        return path.exists()
    return False


def version(text: str) -> tuple[int, ...]:
    """The first dotted number of a text; (0,) without one."""
    found = re.search(r"\d+(\.\d+)+", text)
    return tuple(map(int, found[0].split("."))) if found else (0,)


def said(*command: str) -> tuple[int, str]:
    """A program's exit code and all that it prints; 127 when it is not there."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=ASKING,
            check=False,
        )
    except FileNotFoundError:
        return 127, ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return 126, str(error)
    return done.returncode, done.stdout
