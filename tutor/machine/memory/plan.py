"""How a training goes into a machine's memory: the base's quantization, checkpointing, layers left in RAM.

In: a base's shape, what the recipe says, bytes that are free. Out: a `Plan`, or a refusal; `tutor doctor` and the train
stage both ask here. How many bytes a training takes is estimate.py's to say. Loads nothing and asks no device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tutor.errors import ArtifactError, HostError, RecipeError
from tutor.formats.models.model_folder import read_json
from tutor.machine.memory import batching as passes
from tutor.machine.memory import estimate
from tutor.machine.memory.estimate import SOURCES, Shape, Training, gb

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tutor.recipe.settings import TrainSettings

UNITS = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}


@dataclass(frozen=True)
class Wanted:
    """What the recipe says of it, and what it trains on."""

    quantization: Literal["auto", "nf4", "int8", "none"]
    checkpointing: bool | Literal["auto"]
    precision: str  # bf16, fp16 or fp32
    tokens: int  # of the largest pass
    rank: int
    targets: Sequence[str]
    dropout: bool = True
    on_gpu: bool = True
    packed: bool = True
    longest: int = 0  # of the longest row; 0: as the largest pass
    gpu: int | None = None  # bytes
    cpu: int | None = None  # bytes

    def training(self, quantization: str, *, checkpointing: bool) -> Training:
        """The training that is estimated, with all layers where it computes."""
        return Training(
            tokens=self.tokens,
            longest=self.longest or self.tokens,
            quantization=quantization,
            precision=self.precision,
            rank=self.rank,
            targets=tuple(name for name in self.targets if name in SOURCES),
            dropout=self.dropout,
            checkpointing=checkpointing,
            head="tiled" if self.on_gpu else "chunked",
            gpu=self.on_gpu,
            packed=self.packed,
            varied=True,
        )


@dataclass(frozen=True)
class Plan:
    """What training does, and the bytes that it is expected to take of the device."""

    quantization: Literal["nf4", "int8", "none"]
    checkpointing: bool
    resident: int  # decoder layers on the device; the others wait in RAM
    needed: int
    parts: "Mapping[str, int]" = field(default_factory=dict)


def read_shape(folder: Path) -> Shape:
    """The shape of a model folder, from its config.json. Raises ArtifactError when it has none."""
    try:
        return estimate.shape_of(read_json(folder / "config.json"))
    except ValueError as error:
        raise ArtifactError(f"{folder / 'config.json'}: {error}") from None


def parse_bytes(text: str) -> int:
    """Bytes of "6GiB" or "500 MB"."""
    unit = text.lstrip("0123456789. ")
    return int(float(text.removesuffix(unit)) * UNITS[unit])


def wanted(settings: "TrainSettings", precision: str, tokens: int, longest: int, *, on_gpu: bool) -> Wanted:
    """What a recipe's settings mean for memory, for passes of so many tokens; the one place that reads them.

    Without a GPU all of the base is in RAM, whatever train.max_memory says.
    """
    limits = (settings.max_memory.gpu, settings.max_memory.cpu)
    gpu, cpu = (parse_bytes(text) if text and on_gpu else None for text in limits)
    return Wanted(
        quantization=settings.quantization,
        checkpointing=settings.gradient_checkpointing,
        precision=precision,
        tokens=tokens,
        rank=settings.rank,
        targets=settings.target_modules,
        dropout=settings.dropout > 0,
        on_gpu=on_gpu,
        packed=settings.packing,
        longest=longest,
        gpu=gpu,
        cpu=cpu,
    )


def choose_pass_tokens(
    shape: Shape,
    settings: "TrainSettings",
    precision: str,
    sizes: "Callable[[TrainSettings], tuple[int, int]]",
    room: tuple[int, int],
    *,
    on_gpu: bool,
) -> int:
    """`train.pass_tokens`, or for auto the most of 4096, 2048, ... for which nothing else has to give way.

    `sizes` tells the tokens of the largest pass and of the longest row with given settings; `room` is free and total
    bytes. Of a GPU what is free counts, of main memory half of all: the same machine then trains the same way again.
    """
    if isinstance(settings.pass_tokens, int):
        return settings.pass_tokens
    free = room[0] if on_gpu else room[1] // 2
    fit: list[tuple[bool, bool, int]] = []
    tokens = passes.LARGEST
    while True:
        largest, longest = sizes(settings.model_copy(update={"pass_tokens": tokens}))
        asked = wanted(settings, precision, largest, longest, on_gpu=on_gpu)
        training = decide(shape, asked, free)
        if training.resident is None and needed_bytes(shape, training) <= _budget(asked, free):
            fit.append((training.quantization == "none", not training.checkpointing, tokens))
        if largest <= longest or tokens == 1:
            return max(fit)[2] if fit else tokens
        tokens //= 2


def decide(shape: Shape, wanted: Wanted, free: int) -> Training:
    """The training that `free` bytes of the device are for, at most `wanted.gpu` of them, whether it fits or not.

    16 bits where they fit, nf4 elsewhere, when the recipe leaves it open; activations are computed again where they do
    not fit; layers wait in RAM only where a limit says so.
    """
    budget = _budget(wanted, free)
    quantization: str = wanted.quantization
    if quantization == "auto":
        smallest = wanted.training("none", checkpointing=wanted.checkpointing is not False)
        quantization = "none" if needed_bytes(shape, smallest) <= budget else "nf4"
    checkpointing = wanted.checkpointing
    if checkpointing == "auto":
        checkpointing = needed_bytes(shape, wanted.training(quantization, checkpointing=False)) > budget
    training = wanted.training(quantization, checkpointing=checkpointing)
    if wanted.gpu is None or needed_bytes(shape, training) <= budget:
        return training
    streamed = [replace(training, checkpointing=True, resident=count) for count in range(shape.layers, -1, -1)]
    return next((fewer for fewer in streamed if needed_bytes(shape, fewer) <= budget), streamed[-1])


def plan(shape: Shape, wanted: Wanted, free: int, total: int) -> Plan:
    """How to train in `free` bytes of the device, which has `total`. Raises HostError when it cannot fit.

    Of a GPU's memory what is free counts; of main memory all, for who holds it may end, and machine/capacity.py warned.
    """
    training = decide(shape, wanted, free)
    parts = estimate.memory(shape, training)
    refuse_limits(shape, wanted, training, free)
    certain, there = estimate.certain(parts, gpu=wanted.on_gpu), _budget(wanted, free) if wanted.on_gpu else total
    if certain > there:
        raise HostError(
            f"the base takes {gb(parts['weights'])} in {training.quantization} and this training {gb(certain)}, "
            f"and {gb(there)} are {'free' if wanted.on_gpu else 'there'}",
            "end what else uses the device, set train.quantization to nf4, or train.max_memory.gpu to what it may take",
        )
    resident = shape.layers if training.resident is None else training.resident
    quantization = training.quantization
    assert quantization in ("nf4", "int8", "none")
    return Plan(quantization, training.checkpointing, resident, sum(parts.values()), parts)  # type: ignore[arg-type]


def refuse_limits(shape: Shape, wanted: Wanted, training: Training, free: int) -> None:
    """Raise HostError where train.max_memory leaves too little room, RecipeError for weights that cannot stream."""
    if training.resident is None:
        return
    if training.quantization == "int8":
        raise RecipeError("train.max_memory cannot stream int8 weights", "set train.quantization to nf4 or none")
    budget = _budget(wanted, free)
    if (needed := needed_bytes(shape, training)) > budget:
        raise HostError(
            f"without its layers the base and the training take {gb(needed)}, and {gb(budget)} are there for them",
            "raise train.max_memory.gpu, or lower train.pass_tokens",
        )
    waiting = estimate.waiting_bytes(shape, training)
    if wanted.cpu is not None and waiting > wanted.cpu:
        raise HostError(
            f"{shape.layers - training.resident} of {shape.layers} layers take {gb(waiting)} of RAM, more than "
            f"train.max_memory.cpu ({gb(wanted.cpu)})",
            "raise one of the two limits",
        )


def needed_bytes(shape: Shape, training: Training) -> int:
    """Bytes of the device, all parts together."""
    return sum(estimate.memory(shape, training).values())


def _budget(wanted: Wanted, free: int) -> int:
    return free if wanted.gpu is None else min(free, wanted.gpu)
