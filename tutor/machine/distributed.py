"""The processes of one training: `accelerate launch` and torchrun start them, one a GPU; without them there is one.

In: the launcher's environment. Out: who this process is, what the first one decided, and which rows of a step are this
one's. The first alone prints, locks and writes. Everything here is a no-op in a single process, which needs no torch.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, ParamSpec, Protocol, TypeVar

from tutor.errors import HostError, RecipeError

Given = ParamSpec("Given")
Made = TypeVar("Made")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others; the first may hash a base of 16 GB meanwhile."""

LOST = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|process group|TCPStore|Socket", re.IGNORECASE)
"""What PyTorch says when another process is gone, in a RuntimeError."""


def world() -> int:
    """How many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if {"WORLD_SIZE", "RANK", "MASTER_ADDR"} <= os.environ.keys() else 1


def rank() -> int:
    """Which of them this is; 0 is the first."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def is_first() -> bool:
    """Whether this is the one that prints and writes."""
    return rank() == 0


def beside() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world() > 1 else 1


def is_sharded() -> bool:
    """Whether accelerate's configuration shards the model over the GPUs (FSDP).

    Raises RecipeError for the two of its settings that would make another model without a word.
    """
    if world() == 1 or os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
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
def joined() -> Iterator[None]:
    """Be one of the processes inside. Raises HostError when another one ends meanwhile."""
    if world() == 1:
        yield
        return
    import torch
    from accelerate import PartialState

    try:
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        yield
        torch.distributed.destroy_process_group()
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or LOST.search(str(error))):
            raise
        raise HostError(
            "another process of this training ended",
            "its own line or the launcher's report says why; run again: it goes on from the last checkpoint",
        ) from error


def tell(value: Made | None = None) -> Made | None:
    """The first process's `value`, in all of them."""
    if world() == 1:
        return value
    import torch

    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def same(make: Callable[Given, Made], *args: Given.args, **kwargs: Given.kwargs) -> Made:
    """What `make` gives in the first process, in all of them; the others do not call it."""
    return tell(make(*args, **kwargs) if is_first() else None)  # type: ignore[return-value]


def gather(value: Made) -> list[Made]:
    """Every process's value, in the order of the processes."""
    if world() == 1:
        return [value]
    import torch

    held: list[Any] = [None] * world()
    torch.distributed.all_gather_object(held, value)
    return held


def wait() -> None:
    """Go on when all have come here."""
    gather(None)


class Order(Protocol):
    """The rows of an epoch, shuffled: accelerate's sampler, which all processes have alike."""

    def __iter__(self) -> Iterator[int]:
        """Their numbers."""

    def __len__(self) -> int:
        """How many."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""


class Share:
    """A sampler: this process's rows of each step of an epoch. Together they are the rows that one process takes.

    accelerate's own way fills the last step of an epoch up with rows of the first, which then count twice, and after
    resuming in an epoch it takes the rows in the first one's order.
    """

    def __init__(self, order: Order, step_rows: int) -> None:
        self._order = order
        self._step_rows = step_rows

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        whole, rest = divmod(len(self._order), self._step_rows)
        return whole * (self._step_rows // world()) - (-rest // world())

    def __iter__(self) -> Iterator[int]:
        return iter(share(list(self._order), self._step_rows, rank(), world()))


def share(order: Sequence[int], step_rows: int, number: int, processes: int) -> list[int]:
    """The rows of process `number`: of each step every `processes`-th, as many as every other process takes.

    Where a last step does not divide, len(order) stands for a row without loss.
    """
    mine = []
    for start in range(0, len(order), step_rows):
        step = [*order[start : start + step_rows]]
        step += [len(order)] * (-len(step) % processes)
        mine += step[number::processes]
    return mine


def whole(tensor: Any) -> Any:
    """A tensor with all its numbers, where FSDP left each process a part; all processes ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def parted(tensor: Any, like: Any) -> Any:
    """A whole tensor as `like` is: with this process's part alone where FSDP parts it."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
