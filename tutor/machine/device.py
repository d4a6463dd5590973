"""The device that computes: its precision, and the memory that it has for models.

In: a recipe's setting, PyTorch's answers, this process's place among those of a training. Out: plain values.
"""

from tutor.errors import HostError
from tutor.machine import distributed, host
from tutor.machine.host import CUDA

CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Processor features (x86, Arm) that multiply in bf16 themselves; without them it is slower than fp32."""


def choose_precision(wanted: str) -> str:
    """bf16, fp16 or fp32: as wanted, or for "auto" what this machine computes natively. Raises HostError."""
    import torch

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    features = torch.cpu.get_capabilities()
    return decide_precision(wanted, capability, cpu_bf16=any(features.get(name) for name in CPU_BF16))


def decide_precision(wanted: str, capability: tuple[int, int] | None, *, cpu_bf16: bool) -> str:
    """The same for a GPU of that compute capability, or none and a CPU that has bf16 itself or not.

    bf16 needs 8.0; PyTorch's own is_bf16_supported() says yes to emulation (docs/facts.md, 4). Below it fp16 computes,
    with loss scaling, over adapters in fp32.
    """
    if capability is None:
        if wanted == "fp16":
            raise HostError("fp16 needs a GPU", "set train.precision to auto, bf16 or fp32")
        return ("bf16" if cpu_bf16 else "fp32") if wanted == "auto" else wanted
    native = capability >= (8, 0)
    if wanted == "bf16" and not native:
        raise HostError("this GPU has no native bf16 (compute capability below 8.0)", "set train.precision to auto")
    return ("bf16" if native else "fp16") if wanted == "auto" else wanted


def room() -> tuple[int, int]:
    """Bytes where models are loaded, on this process's GPU or its part of RAM: free, what it holds included; and all.

    Of all GPUs together where the model is sharded over them.
    """
    import psutil
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        cards = distributed.world_size() if distributed.is_sharded() else 1
        return min(int(free + CUDA), total) * cards, total * cards
    memory, own, sharers = host.memory(), psutil.Process().memory_info(), distributed.local_world_size()
    if memory is None:
        machine = psutil.virtual_memory()
        return int(machine.available) // sharers, int(machine.total) // sharers
    total = memory.total // sharers
    return min(memory.available // sharers + own.rss - own.shared, total), total
