"""The device that computes: the precision it computes in, and the memory that is available for models.

In: a recipe's setting, the GPU that host.py finds, the CPU's rates, PyTorch's view of this process. Out: plain values,
or a HostError. The only decisions about precision and available memory. torch and psutil are imported where a function
needs this process's own device. Does not estimate what a model takes: memory/estimate.py does.
"""

import errno
import importlib.metadata
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tutor.artifacts.provenance import installed_version
from tutor.errors import HostError, RecipeError
from tutor.machine import distributed, host
from tutor.machine.host import CUDA_CONTEXT, Gpu, dotted
from tutor.machine.matmul_rate import MatmulRates, find_rates
from tutor.machine.memory.shapes import Shape

log = logging.getLogger(__name__)

PINNED_CUDA = (13, 2)
"""CUDA version of the pinned PyTorch, which the trainer's image has."""

CUDA_PACKAGE = re.compile(r"nvidia-cuda-runtime(-cu\d+)?")
"""Package whose version is the CUDA of the installed PyTorch."""

HIDE = "or hide the GPU to train on the CPU: CUDA_VISIBLE_DEVICES="
"""End of the hint of an error about a GPU."""

CUDA_CAPABILITY = (7, 5)
"""Minimum compute capability of the pinned CUDA 13 wheels."""

BF16_CAPABILITY = (8, 0)
"""Minimum compute capability with native bf16; PyTorch's is_bf16_supported() accepts emulation (docs/facts.md, 4)."""

BF16_GAIN = 1.5
"""Minimum rate of matrix products in bf16, as a multiple of fp32's, for bf16 on a CPU.

The rest of a pass is no faster in bf16 and can be slower, and bf16 rounds: less would gain under a fifth."""

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
"""Texts of a RuntimeError for memory that ran out, by CUDA, cuBLAS and PyTorch's CPU allocator."""

UNLIMITED = 1 << 62
"""Bytes that stand for memory of unknown size."""


@dataclass(frozen=True)
class DeviceMemory:
    """Memory that models are loaded into, in bytes."""

    available: int
    total: int
    device: str  # name for messages
    gpu: bool


@dataclass(frozen=True)
class PrecisionChoice:
    """The precision that a device computes in, and why."""

    precision: str  # bf16, fp16 or fp32
    reason: Literal["setting", "GPU", "checkpoint", "record", "rates", "memory", "range"]
    rates: MatmulRates | None = None  # of the CPU; None: they decided nothing

    def __str__(self) -> str:
        because = {
            "checkpoint": " as in the checkpoint",
            "memory": ", because fp32 does not fit into memory",
            "range": ", because activations of this family overflow in fp16, and this GPU has no native bf16",
        }
        rates = f": matrix products reach {self.rates}" if self.rates else ""
        return f"computing in {self.precision}{because.get(self.reason, '')}{rates}"

    @property
    def record(self) -> dict[str, Any]:
        """The choice as results of a stage."""
        rates = self.rates.gflops if self.rates else None
        return {"precision": self.precision, "precision_reason": self.reason, "matmul_gflops": rates}


def choose_precision(setting: str, shape: Shape) -> PrecisionChoice:
    """The precision for train.precision on PyTorch's device; "auto" measures the CPU.

    Raises HostError where the device lacks the precision, RecipeError where the base overflows in it.
    """
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    refuse_precision(setting, capability)
    refuse_overflow(setting, shape)
    measures = setting == "auto" and capability is None
    return decide_precision(setting, shape, capability, find_rates(shape, host.processor()) if measures else None)


def decide_precision(
    setting: str, shape: Shape, capability: tuple[int, int] | None, rates: MatmulRates | None
) -> PrecisionChoice:
    """The setting, or for "auto" the fastest precision that the device computes natively; refuses nothing.

    `capability` is the GPU's compute capability, None without a GPU; then `rates` decide. A GPU without bf16 computes
    in fp16, with loss scaling and fp32 adapters; in fp32 where the base's activations overflow in fp16.
    """
    if setting != "auto":
        return PrecisionChoice(setting, "setting", rates)
    if capability is not None and capability < BF16_CAPABILITY and shape.architecture.wide:
        return PrecisionChoice("fp32", "range")
    if capability is not None:
        return PrecisionChoice("bf16" if capability >= BF16_CAPABILITY else "fp16", "GPU")
    assert rates is not None, "without a GPU the rates of the CPU decide"
    return PrecisionChoice("bf16" if rates.bf16 >= BF16_GAIN * rates.fp32 else "fp32", "rates", rates)


def recorded_precision(results: Mapping[str, Any]) -> str | None:
    """The precision that a training on a CPU chose itself, from the results of its stage; None: there is none."""
    own = results.get("precision_reason") in ("checkpoint", "rates", "memory")
    return str(results["precision"]) if own else None


def refuse_precision(setting: str, capability: tuple[int, int] | None, name: str = "this GPU") -> None:
    """Raise HostError for a precision that the device does not have."""
    if capability is None:
        if setting == "fp16":
            raise HostError("fp16 needs a GPU", "set train.precision to auto, bf16 or fp32")
    elif setting == "bf16" and capability < BF16_CAPABILITY:
        raise HostError(f"{_found(name, capability)}, which has no native bf16", "set train.precision to auto")


def refuse_overflow(setting: str, shape: Shape) -> None:
    """Raise RecipeError for fp16 and a family whose activations exceed its 65504."""
    if setting == "fp16" and shape.architecture.wide:
        raise RecipeError(
            f"train.precision is fp16, and activations of {shape.family} models overflow in it",
            "set train.precision to auto, bf16 or fp32",
        )


def refuse_gpu(setting: str, shape: Shape, gpu: Gpu | None) -> None:
    """Raise HostError for a GPU that the pinned CUDA does not support, or a precision that the device does not have.

    Raises RecipeError for a precision that the base overflows in.
    """
    refuse_overflow(setting, shape)
    if gpu is not None and gpu.capability < CUDA_CAPABILITY:
        needed = f"the pinned CUDA needs {dotted(CUDA_CAPABILITY)}"
        raise HostError(
            f"{_found(gpu.name, gpu.capability)}; {needed}", "hide it with CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    refuse_precision(setting, gpu.capability if gpu else None, gpu.name if gpu else "")


def _found(name: str, capability: tuple[int, int]) -> str:
    return f"{name} has compute capability {dotted(capability)}"


def built_for_cuda() -> tuple[int, ...] | None:
    """The CUDA version of the installed PyTorch; None without CUDA."""
    for package in importlib.metadata.distributions():
        if CUDA_PACKAGE.fullmatch(package.metadata["Name"] or ""):
            return host.version(package.version)[:2]
    return None


def refuse_old_driver(gpu: Gpu, built: tuple[int, ...]) -> None:
    """Raise HostError for a driver that cannot run a PyTorch built for this CUDA; PyTorch would only see no GPU."""
    runs = host.driver_cuda()
    if runs and runs[0] < built[0]:
        raise HostError(
            f"the driver {gpu.driver} of {gpu.name} runs CUDA up to {dotted(runs)}, and PyTorch needs {dotted(built)}",
            f"update the driver, {HIDE}",
        )


def refuse_unusable_gpu(gpu: Gpu | None) -> None:
    """Raise HostError where the installed PyTorch cannot use this GPU, or a GPU is lost: the CPU would train."""
    if gpu is None:
        if "CUDA_VISIBLE_DEVICES" not in os.environ and (lost := host.lost_gpu()):
            raise HostError(f"the GPU does not answer: {lost}", f"reboot the machine, {HIDE}")
        return
    found, built = installed_version("torch"), built_for_cuda()
    if found and built is None:
        raise HostError(f"PyTorch {found} has no CUDA, which {gpu.name} needs", f"make install, {HIDE}")
    refuse_old_driver(gpu, built or PINNED_CUDA)


def use_one_gpu() -> None:
    """Hide all GPUs but the first before CUDA starts: a training that no launcher started uses one."""
    gpus = host.gpus()
    if distributed.world_size() == 1 and len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0].uuid
        log.warning(
            "%d GPUs are visible: training uses the first, %s (CUDA_VISIBLE_DEVICES chooses another, accelerate launch "
            "uses all)", len(gpus), gpus[0].name,
        )  # fmt: skip


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that main memory or a GPU's ran out; needs no torch."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    )


def reported_memory(gpu: Gpu | None) -> DeviceMemory:
    """Memory as driver and kernel report it, of this GPU or without one of the machine; needs no torch."""
    if gpu is not None:
        return DeviceMemory(gpu.free, gpu.total, gpu.name, gpu=True)
    return _main_memory(host.memory(), swap=True)


def training_memory() -> DeviceMemory:
    """Memory for this process's training, what it already holds included: of its GPU, or its part of main memory.

    Where FSDP shards the model: of all GPUs together.
    """
    import psutil
    import torch

    if torch.cuda.is_available():
        _refuse_several(torch.cuda.device_count())
        free, total = torch.cuda.mem_get_info()
        gpus = distributed.world_size() if distributed.is_sharded() else 1
        name = torch.cuda.get_device_name()
        return DeviceMemory(min(int(free + CUDA_CONTEXT), total) * gpus, total * gpus, name, gpu=True)
    _refuse_unseen()
    processes, own = distributed.local_world_size(), psutil.Process().memory_info()
    memory = host.memory()
    if memory is None:
        machine = psutil.virtual_memory()
        available, total = int(machine.available) // processes, int(machine.total) // processes
        return DeviceMemory(available, total, "this machine", gpu=False)
    total = memory.total // processes
    available = min(memory.available // processes + own.rss - own.shared, total)
    return DeviceMemory(available, total, memory.owner, gpu=False)


def _refuse_several(count: int) -> None:
    """Raise HostError for several GPUs without a launcher, where nvidia-smi could not show them (`use_one_gpu`)."""
    if count > 1 and distributed.world_size() == 1:
        raise HostError(
            f"{count} GPUs are visible, and training takes one", "set CUDA_VISIBLE_DEVICES=0, or use accelerate launch"
        )


def _refuse_unseen() -> None:
    """Raise HostError with PyTorch's reason where the driver shows a GPU that PyTorch does not."""
    import torch

    if gpu := next(iter(host.gpus()), None):
        reason = "it gives no reason"
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
        raise HostError(f"the driver shows {gpu.name}, PyTorch does not: {reason}", f"see tutor doctor, {HIDE}")


def loading_memory(root: Path = Path("/")) -> DeviceMemory:
    """Memory for one more model that this process loads now: of its GPU, or of main memory without swap."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return DeviceMemory(int(free), int(total), torch.cuda.get_device_name(), gpu=True)
    return main_memory(root)


def main_memory(root: Path = Path("/")) -> DeviceMemory:
    """Main memory for what this process loads now, without swap."""
    return _main_memory(host.memory(root), swap=False)


def _main_memory(memory: host.Memory | None, *, swap: bool) -> DeviceMemory:
    """Main memory that is available, with swap or without; unlimited where the kernel does not report it."""
    if memory is None:
        return DeviceMemory(UNLIMITED, UNLIMITED, "this machine", gpu=False)
    return DeviceMemory(memory.available if swap else memory.in_ram, memory.total, memory.owner, gpu=False)
