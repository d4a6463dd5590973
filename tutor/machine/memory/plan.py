"""The plan of a training: how it uses a device's memory, and what to change in the recipe where it does not fit.

In: a base's shape, the recipe's train settings, the rows' lengths, the device's memory and precision. Out: a
`TrainingPlan`, a refusal (HostError, RecipeError), or a suggestion of settings. The only decision about quantization,
checkpointing, resident layers and tokens of a micro-batch. estimate.py has the bytes. Loads nothing, reads no device.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from tutor.errors import HostError, RecipeError
from tutor.machine.device import DeviceMemory, PrecisionChoice
from tutor.machine.host import MIB
from tutor.machine.memory import estimate
from tutor.machine.memory.batching import MAX_TOKENS, MicroBatches, split_step
from tutor.machine.memory.estimate import StepWorkload, gb, needed_bytes, parts_line
from tutor.machine.memory.row_lengths import RowLengths, largest_batch
from tutor.machine.memory.shapes import MATRIX_INPUTS, Shape
from tutor.recipe.values import parse_bytes

if TYPE_CHECKING:
    from tutor.recipe.settings import TrainSettings

SHORTER_LENGTHS = (512, 384, 256, 128)
"""Values of train.max_length that are suggested, in tokens."""

Change = tuple[str | int, dict[str, Any]]
"""Value of a setting, and the fields of the workload that it changes."""


@dataclass(frozen=True)
class MemoryRequest:
    """The memory settings of a recipe, with "auto" undecided, and the sizes of its rows."""

    quantization: Literal["auto", "nf4", "int8", "none"]
    checkpointing: bool | Literal["auto"]
    precision: str  # bf16, fp16 or fp32
    tokens: int  # of the largest micro-batch
    rank: int
    targets: Sequence[str]
    dropout: bool = True
    on_gpu: bool = True
    packed: bool = True
    plain: bool = True  # layers and adapters of which kernels/fused_layers.py has functions: no DoRA
    dora: bool = False
    longest: int = 0  # tokens of the longest row; 0: as the largest micro-batch
    gpu: int | None = None  # train.max_memory.gpu in bytes
    cpu: int | None = None  # train.max_memory.cpu in bytes

    def workload(self, quantization: str, *, checkpointing: bool) -> StepWorkload:
        """The workload with these decisions, and all layers on the device."""
        return StepWorkload(
            tokens=self.tokens,
            longest=self.longest or self.tokens,
            quantization=quantization,
            precision=self.precision,
            rank=self.rank,
            targets=tuple(name for name in self.targets if name in MATRIX_INPUTS),
            dropout=self.dropout,
            checkpointing=checkpointing,
            head="tiled" if self.on_gpu else "chunked",
            gpu=self.on_gpu,
            packed=self.packed,
            varied=True,
            # int8 layers round their input.
            fused=self.plain and self.packed and not self.on_gpu and quantization != "int8",
            dora=self.dora,
        )


@dataclass(frozen=True)
class TrainingPlan:
    """All decisions about a training, and the bytes that it is expected to take of the device."""

    precision: str  # bf16, fp16 or fp32
    quantization: str  # nf4, int8 or none
    checkpointing: bool
    layers: int  # decoder layers of the base
    resident: int  # decoder layers on the device; the others wait in RAM
    batches: MicroBatches
    parts: Mapping[str, int]  # expected bytes
    available: int  # bytes of the device when the plan was made
    choice: PrecisionChoice | None = None  # the reason of the precision
    unpacked: bool = False  # 4-bit weights are kept in the precision too

    @property
    def needed(self) -> int:
        """Expected bytes of all parts together."""
        return sum(self.parts.values())

    @property
    def streams(self) -> bool:
        """Whether some layers wait in RAM."""
        return self.resident < self.layers

    def __str__(self) -> str:
        sixteen = self.quantization == "none" and self.precision != "fp32"
        unpacked = f" unpacked to {self.precision}" if self.unpacked else ""
        base = "16 bits" if sixteen else self.quantization.replace("none", "fp32") + unpacked
        waiting = f", {self.layers - self.resident} of {self.layers} layers in RAM" if self.streams else ""
        return (
            f"base in {base}, computing in {self.precision}, gradient checkpointing "
            f"{'on' if self.checkpointing else 'off'}{waiting}, {self.batches}: about {self.needed / 1e9:.2f} GB "
            f"({parts_line(self.parts)}) of the {self.available / 1e9:.2f} GB that are free"
        )


def memory_request(
    shape: Shape, settings: "TrainSettings", precision: str, tokens: int, longest: int, *, on_gpu: bool
) -> MemoryRequest:
    """The request of these settings, with micro-batches of up to `tokens` and rows of up to `longest` tokens.

    Without a GPU the whole base is in RAM and train.max_memory has no effect.
    """
    limits = (settings.max_memory.gpu, settings.max_memory.cpu)
    gpu, cpu = (parse_bytes(text) if text and on_gpu else None for text in limits)
    return MemoryRequest(
        quantization=settings.quantization,
        checkpointing=settings.gradient_checkpointing,
        precision=precision,
        tokens=tokens,
        rank=settings.rank,
        targets=settings.target_modules,
        dropout=settings.dropout > 0,
        on_gpu=on_gpu,
        packed=settings.packing,
        plain=shape.architecture.plain_layers and settings.variant != "dora",
        dora=settings.variant == "dora",
        longest=longest,
        gpu=gpu,
        cpu=cpu,
    )


def choose_tokens(
    shape: Shape, settings: "TrainSettings", precision: str, rows: RowLengths | None, memory: DeviceMemory, ranks: int
) -> int:
    """`train.pass_tokens`, or for auto the most of 4096, 2048, ... for which no other setting has to change.

    Of a GPU the available memory counts, of main memory half of the total: a machine then repeats its training exactly.
    """
    if isinstance(settings.pass_tokens, int):
        return settings.pass_tokens
    available = memory.available if memory.gpu else memory.total // 2
    fits: list[tuple[bool, bool, int]] = []
    tokens = MAX_TOKENS
    while True:
        largest, longest = largest_batch(settings.model_copy(update={"pass_tokens": tokens}), rows, ranks)
        request = memory_request(shape, settings, precision, largest, longest, on_gpu=memory.gpu)
        step = decide(shape, request, available)
        if step.resident is None and needed_bytes(shape, step) <= _budget(request, available):
            fits.append((step.quantization == "none", not step.checkpointing, tokens))
        if largest <= longest or tokens == 1:
            return max(fits)[2] if fits else tokens
        tokens //= 2


def decide(shape: Shape, request: MemoryRequest, available: int) -> StepWorkload:
    """The workload for `available` bytes of the device, at most `request.gpu` of them, whether it fits or not.

    For "auto": 16 bits where they fit, else nf4; checkpointing where the activations do not fit. Layers wait in RAM
    only where train.max_memory demands it. On a CPU, nf4 weights are kept unpacked where that fits: equal numbers.
    """
    budget = _budget(request, available)
    quantization: str = request.quantization
    if quantization == "auto":
        smallest = request.workload("none", checkpointing=request.checkpointing is not False)
        quantization = "none" if needed_bytes(shape, smallest) <= budget else "nf4"
    checkpointing = request.checkpointing
    if checkpointing == "auto":
        checkpointing = needed_bytes(shape, request.workload(quantization, checkpointing=False)) > budget
    step = request.workload(quantization, checkpointing=checkpointing)
    unpacked = replace(step, unpacked=step.fused and quantization == "nf4")
    if request.gpu is None or needed_bytes(shape, step) <= budget:
        return unpacked if needed_bytes(shape, unpacked) <= budget else step
    streamed = [replace(step, checkpointing=True, resident=count) for count in range(shape.layers, -1, -1)]
    return next((fewer for fewer in streamed if needed_bytes(shape, fewer) <= budget), streamed[-1])


def plan_training(
    shape: Shape, settings: "TrainSettings", precision: str, rows: RowLengths, memory: DeviceMemory, world_size: int
) -> TrainingPlan:
    """The plan of a training on `world_size` ranks over counted rows.

    Raises HostError when it cannot fit, RecipeError for settings that exclude each other.
    """
    tokens = choose_tokens(shape, settings, precision, rows, memory, world_size)
    chosen = settings.model_copy(update={"pass_tokens": tokens})
    batches = split_step(chosen, [min(settings.max_length, length) for length in rows.lengths], world_size)
    request = memory_request(shape, chosen, precision, batches.tokens, batches.tokens, on_gpu=memory.gpu)
    return plan(shape, request, batches, memory)


def plan(shape: Shape, request: MemoryRequest, batches: MicroBatches, memory: DeviceMemory) -> TrainingPlan:
    """The plan for a request. Raises HostError when it cannot fit.

    Of a GPU the available memory counts; of main memory the total: the programs that hold the rest may end.
    """
    step = decide(shape, request, memory.available)
    parts = estimate.memory(shape, step)
    refuse_limits(shape, request, step, memory.available)
    certain = estimate.certain_bytes(parts, gpu=request.on_gpu)
    usable = _budget(request, memory.available) if request.on_gpu else memory.total
    if certain > usable:
        raise HostError(
            f"the base takes {gb(parts['weights'])} in {step.quantization} and this training {gb(certain)}, "
            f"and {gb(usable)} are {'free' if request.on_gpu else 'installed'}",
            "end what else uses the device, set train.quantization to nf4, or train.max_memory.gpu to what it may take",
        )
    return TrainingPlan(
        precision=request.precision,
        quantization=step.quantization,
        checkpointing=step.checkpointing,
        layers=shape.layers,
        resident=shape.layers if step.resident is None else step.resident,
        batches=batches,
        parts=parts,
        available=memory.available,
        unpacked=step.unpacked,
    )


def refuse_limits(shape: Shape, request: MemoryRequest, step: StepWorkload, available: int) -> None:
    """Raise HostError where train.max_memory leaves too little memory, RecipeError for weights that cannot stream."""
    if step.resident is None:
        return
    if step.quantization == "int8":
        raise RecipeError("train.max_memory cannot stream int8 weights", "set train.quantization to nf4 or none")
    budget = _budget(request, available)
    if (needed := needed_bytes(shape, step)) > budget:
        raise HostError(
            f"without its layers the base and the training take {gb(needed)}, and {gb(budget)} are available for them",
            "raise train.max_memory.gpu, or lower train.pass_tokens",
        )
    waiting = estimate.waiting_bytes(shape, step)
    if request.cpu is not None and waiting > request.cpu:
        raise HostError(
            f"{shape.layers - step.resident} of {shape.layers} layers take {gb(waiting)} of RAM, more than "
            f"train.max_memory.cpu ({gb(request.cpu)})",
            "raise one of the two limits",
        )


def _budget(request: MemoryRequest, available: int) -> int:
    return available if request.gpu is None else min(available, request.gpu)


def suggest_settings(
    shape: Shape, step: StepWorkload, budget: int, allowed: Collection[str], size: Callable[[Mapping[str, int]], int]
) -> dict[str, str | int] | None:
    """The fewest, least invasive settings with which a training fits into `budget` bytes; None where none do.

    By their names in the recipe's `train` section, only `allowed` ones; empty when it fits already. `size` gives the
    bytes of an estimate that have to fit.
    """
    chosen: dict[str, Change] = {}

    def fits(given: Mapping[str, Change]) -> bool:
        changed = replace(step, **{name: value for _, change in given.values() for name, value in change.items()})
        if changed.resident is not None and (changed.quantization == "int8" or not changed.checkpointing):
            return False  # the recipe refuses both
        return size(estimate.memory(shape, changed)) <= budget

    for name, value, change in _smaller_settings(shape, step, budget):
        if fits(chosen):
            break
        if name in allowed:
            chosen[name] = (value, change)
    if not fits(chosen):
        return None
    for name in list(chosen):
        rest = {other: change for other, change in chosen.items() if other != name}
        chosen = rest if fits(rest) else chosen
    return {name: value for name, (value, _) in chosen.items()}


def _smaller_settings(shape: Shape, step: StepWorkload, budget: int) -> Iterator[tuple[str, str | int, dict[str, Any]]]:
    """Settings that take less and less memory: name, value, changes. First those that cost only time."""
    if not step.checkpointing:
        yield "gradient_checkpointing", True, {"checkpointing": True}
    tokens = step.tokens
    while tokens > step.longest:
        tokens = max(step.longest, tokens // 2)
        if step.packed:
            yield "pass_tokens", tokens, {"tokens": tokens}
        else:
            rows = max(1, tokens // step.longest)
            yield "batch_size", rows, {"tokens": rows * step.longest}
    if step.quantization != "nf4":
        yield "quantization", "nf4", {"quantization": "nf4"}
    # Before max_length: layers in RAM cost time, shorter rows are other rows.
    for resident in range(shape.layers - 1, -1, -1) if step.gpu else ():
        yield "max_memory.gpu", f"{budget // MIB}MiB", {"resident": resident}
    for length in SHORTER_LENGTHS:
        if length < step.longest:
            yield "max_length", length, {"tokens": length, "longest": length}
