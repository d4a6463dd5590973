"""The processes of one distributed training, which `accelerate launch` or torchrun starts; without a launcher: one.

In: the launcher's environment variables. Out: rank and world size, values of rank 0, this rank's rows of each step.
Only rank 0 prints, locks and writes. With one process every function is a no-op and needs no torch.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, ParamSpec, Protocol, TypeVar

from tutor.errors import HostError, RecipeError

log = logging.getLogger(__name__)

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")

LAUNCHER = ("WORLD_SIZE", "RANK", "MASTER_ADDR")
"""Variables that every launcher sets: where one is missing or empty, the others are left over."""

LIBRARY_SETTINGS = re.compile(
    r"(ACCELERATE|FSDP|DEEPSPEED|MEGATRON_LM|PARALLELISM_CONFIG|TORCHELASTIC|PMI|OMPI_COMM_WORLD|MV2_COMM_WORLD)_\w+"
    r"|(LOCAL_|GROUP_|NODE_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)"
)
"""Names of variables that accelerate, transformers and PyTorch read as settings of a launcher."""

RECIPE_SETTINGS = re.compile(r"ACCELERATE_(MIXED_PRECISION|GRADIENT_ACCUMULATION_STEPS|DOWNCAST_BF16|DYNAMO_\w+)")
"""Names of those that would change what the recipe decides."""

OTHER_TRAINERS = ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""Ways to train in several processes that accelerate can be configured for, and tutor cannot."""

PARSED_AT_IMPORT = {
    "PYTORCH_ALLOC_CONF": (r"(\w+:.+)?", "NAME:VALUE"),
    "PYTORCH_CUDA_ALLOC_CONF": (r"(\w+:.+)?", "NAME:VALUE"),
    "HF_HUB_DOWNLOAD_TIMEOUT": (r"\d+", "a whole number of seconds"),
    "HF_HUB_ETAG_TIMEOUT": (r"\d+", "a whole number of seconds"),
}
"""Variables that end the process when a library that parses them is imported: pattern of a value, in words."""

TIMEOUT = timedelta(minutes=30)
"""Maximum wait for the other ranks; rank 0 may hash a base of 16 GB in that time."""

PEER_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|process group|TCPStore|Socket", re.IGNORECASE)
"""Text in PyTorch's RuntimeError when another process has ended."""


def world_size() -> int:
    """Number of processes of this training; 1 where the launcher's variables are incomplete or no numbers."""
    size, rank, address = (os.environ.get(name, "") for name in LAUNCHER)
    valid = size.isdecimal() and rank.isdecimal() and int(rank) < int(size)
    return int(size) if valid and address else 1


def rank() -> int:
    """Number of this process; 0 is the main process."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def local_world_size() -> int:
    """Number of this training's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or "1") if world_size() > 1 else 1


def settle_environment() -> None:
    """Remove variables that libraries would take for a launcher's settings: all without a launcher, else the recipe's.

    Raises RecipeError for a launcher whose variables are wrong, or that is configured for another way to train, and for
    a variable at which a library would end the process.
    """
    for name, (pattern, expected) in PARSED_AT_IMPORT.items():
        if name in os.environ and not re.fullmatch(pattern, os.environ[name]):
            raise RecipeError(f"{name} is {os.environ[name]!r}, not {expected}", f"correct it, or: unset {name}")
    launched = world_size() > 1
    if launched or (all(map(os.environ.get, LAUNCHER)) and os.environ["WORLD_SIZE"] != "1"):
        _refuse_launcher()
    settings = RECIPE_SETTINGS if launched else LIBRARY_SETTINGS
    ignored = [name for name in os.environ if settings.fullmatch(name)]
    for name in ignored:
        del os.environ[name]
    if ignored and not launched:
        log.info("no launcher started this process: ignoring %s", ", ".join(sorted(ignored)))


def _refuse_launcher() -> None:
    """Raise RecipeError for a variable that is no number, and for a configuration of another trainer."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    values = {name: os.environ.get(name, "") for name in names}
    values["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE") or "1"
    wrong = {name: value for name, value in values.items() if not value.isdecimal()}
    if wrong or int(values["RANK"]) >= int(values["WORLD_SIZE"]):
        found = ", ".join(f"{name} is {value!r}" for name, value in (wrong or values).items())
        raise RecipeError(
            f"a launcher's variables are wrong: {found}",
            "start it with accelerate launch; if none started it: unset WORLD_SIZE RANK MASTER_ADDR",
        )
    for name in OTHER_TRAINERS:
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise RecipeError(
                f"accelerate is configured for {name}", "set distributed_type to MULTI_GPU, MULTI_CPU or FSDP"
            )


def is_sharded() -> bool:
    """Whether accelerate's configuration shards the model over the GPUs (FSDP).

    Raises RecipeError for the two FSDP settings that would change the trained model without an error.
    """
    if world_size() == 1 or os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RecipeError("FSDP 1 cannot shard 4-bit weights beside fp32 adapters", "set fsdp_version: 2")
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "").lower() == "true":
        raise RecipeError(
            "all processes score the held-out rows before training, and so each needs the base",
            "set fsdp_cpu_ram_efficient_loading: false",
        )
    return True


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the process group inside the block. Raises HostError when another process ends in that time."""
    if world_size() == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    try:
        PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
        yield
        torch.distributed.destroy_process_group()
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or PEER_LOST.search(str(error))):
            raise
        raise HostError(
            "another process of this training ended",
            "its own error or the launcher's report has the reason; "
            "run again: training continues from the last checkpoint",
        ) from error


def broadcast(value: Value | None = None) -> Value | None:
    """Broadcast rank 0's `value` to all ranks."""
    if world_size() == 1:
        return value
    import torch

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_result(make: Callable[Arguments, Value], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
    """Call `make` on rank 0 alone and broadcast its result to all ranks."""
    return broadcast(make(*args, **kwargs) if is_main_process() else None)  # type: ignore[return-value]


def all_gather(value: Value) -> list[Value]:
    """Gather the values of all ranks, in the order of the ranks."""
    if world_size() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all ranks have reached this call."""
    all_gather(None)


class EpochSampler(Protocol):
    """Shuffled row numbers of an epoch, equal on all ranks: the interface of accelerate's SeedableRandomSampler."""

    def __iter__(self) -> Iterator[int]:
        """Row numbers."""

    def __len__(self) -> int:
        """Number of rows."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""


class DistributedStepSampler:
    """Sampler of this rank's rows of each optimizer step; all ranks together take the rows that one process takes.

    accelerate's own sharding repeats rows of the epoch's start in its last step, which then count twice, and after
    a resume within an epoch it takes the rows in the order of the first epoch.
    """

    def __init__(self, order: EpochSampler, step_rows: int) -> None:
        self._order = order
        self._step_rows = step_rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        steps, rest = divmod(len(self._order), self._step_rows)
        return steps * (self._step_rows // world_size()) - (-rest // world_size())

    def __iter__(self) -> Iterator[int]:
        return iter(rank_rows(list(self._order), self._step_rows, rank(), world_size()))


def rank_rows(order: Sequence[int], step_rows: int, rank: int, world_size: int) -> list[int]:
    """Rows of one rank: every `world_size`-th row of each step, equally many on every rank.

    Where a last step does not divide, len(order) stands for a row without loss.
    """
    rows = []
    for start in range(0, len(order), step_rows):
        step = [*order[start : start + step_rows]]
        step += [len(order)] * (-len(step) % world_size)
        rows += step[rank::world_size]
    return rows


def full_tensor(tensor: Any) -> Any:
    """Gather a tensor that FSDP shards; a collective call. Other tensors are returned unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_like(tensor: Any, like: Any) -> Any:
    """Shard a full tensor over the device mesh of `like`; unchanged where `like` is not sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
