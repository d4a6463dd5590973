"""What a training needs of the card, and what follows: the base's quantization, checkpointing, layers left in RAM.

In: the shapes in a model folder, bytes that are free. Out: a `Plan`. Estimates, measured on the CPU: weights to the
byte, activations as autograd keeps them. Loads nothing and asks no device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from tutor.errors import HostError, RecipeError
from tutor.modelfolder import WEIGHTS, open_weights, read_json

UNITS = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}
PACKED = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes a weight: nf4 has an 8-bit scale for 64 weights, and an fp32 one for 256 of those."""
TRAINED = 16
"""Bytes a trained number: itself, its gradient and Adam's two moments, in fp32."""
ROOM = 1_500_000_000
"""Bytes for the CUDA context, a tile of logits and what the allocator cannot use."""


@dataclass(frozen=True)
class Shape:
    """A Llama in numbers."""

    layers: int
    linears: Mapping[str, tuple[int, int]]  # of one layer: name -> (out, in)
    rest: int  # numbers outside the linear layers of the decoder: embedding, head, norms

    @property
    def linear(self) -> int:
        """Numbers in the linear layers of one decoder layer."""
        return sum(map(prod, self.linears.values()))

    @property
    def parameters(self) -> int:
        """All numbers of the base."""
        return self.layers * self.linear + self.rest

    def adapter(self, rank: int, targets: Sequence[str]) -> int:
        """Numbers of a LoRA."""
        return self.layers * sum(rank * sum(self.linears[name]) for name in targets if name in self.linears)


@dataclass(frozen=True)
class Wanted:
    """What the recipe says of it."""

    quantization: Literal["auto", "nf4", "int8", "none"]
    checkpointing: bool | Literal["auto"]
    precision: str  # bf16, fp16 or fp32
    tokens: int  # of the largest pass
    rank: int
    targets: Sequence[str]
    gpu: int | None = None  # bytes
    cpu: int | None = None  # bytes


@dataclass(frozen=True)
class Plan:
    """What training does, and the bytes that it is expected to take of the device."""

    quantization: Literal["nf4", "int8", "none"]
    checkpointing: bool
    resident: int  # decoder layers on the device; the others wait in RAM
    needed: int


def read_shape(folder: Path) -> Shape:
    """The shape of a model folder, from its weight files' headers. Raises ArtifactError when they are damaged."""
    layers = int(read_json(folder / "config.json")["num_hidden_layers"])
    linears: dict[str, tuple[int, int]] = {}
    total = 0
    for path in sorted(folder.glob(WEIGHTS)):
        with open_weights(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                shape = file.get_slice(name).get_shape()
                total += prod(shape)
                if ".layers.0." in name and len(shape) == 2:
                    linears[name.split(".")[-2]] = (shape[0], shape[1])
    return Shape(layers, linears, total - layers * sum(map(prod, linears.values())))


def parse_bytes(text: str) -> int:
    """Bytes of "6GiB" or "500 MB"."""
    unit = text.lstrip("0123456789. ")
    return int(float(text.removesuffix(unit)) * UNITS[unit])


def weight_bytes(shape: Shape, quantization: str, precision: str) -> tuple[int, int]:
    """Bytes of one decoder layer's linear weights, and of all else in the base."""
    width = WIDTHS[precision]
    return int(shape.linear * PACKED.get(quantization, width)), shape.rest * width


def activation_bytes(shape: Shape, wanted: Wanted, *, checkpointing: bool) -> int:
    """Bytes that autograd keeps of one pass of `wanted.tokens`.

    Measured on Llamas of two and four layers, two widths, with and without adapters on the MLP: 10 hidden + 6
    intermediate numbers a token and layer in the base's width, and 9 bytes an input of an adapter (its fp32 copy, the
    same after dropout, the mask). With checkpointing a layer keeps its input alone, and one layer is computed again.
    """
    hidden, intermediate = shape.linears["q_proj"][1], shape.linears["gate_proj"][0]
    width = WIDTHS[wanted.precision]
    adapted = sum(shape.linears[name][1] for name in wanted.targets if name in shape.linears)
    layer = (10 * hidden + 6 * intermediate) * width // 2 + 9 * adapted
    if checkpointing:
        return wanted.tokens * (shape.layers * hidden * width + layer)
    return wanted.tokens * shape.layers * layer


def needed_bytes(shape: Shape, wanted: Wanted, quantization: str, *, checkpointing: bool) -> int:
    """Bytes of the device for a training with all layers on it."""
    layer, rest = weight_bytes(shape, quantization, wanted.precision)
    trained = TRAINED * shape.adapter(wanted.rank, wanted.targets)
    return shape.layers * layer + rest + trained + activation_bytes(shape, wanted, checkpointing=checkpointing) + ROOM


def plan(shape: Shape, wanted: Wanted, free: int) -> Plan:
    """How to train in `free` bytes of the device, at most `wanted.gpu` of them.

    16 bits where they fit, nf4 elsewhere, when the recipe leaves it open; activations are computed again where they do
    not fit; layers wait in RAM only where a limit says so. Raises HostError when it cannot fit.
    """
    budget = free if wanted.gpu is None else min(free, wanted.gpu)
    quantization = wanted.quantization
    if quantization == "auto":
        fits = needed_bytes(shape, wanted, "none", checkpointing=wanted.checkpointing is not False) <= budget
        quantization = "none" if fits else "nf4"
    checkpointing = wanted.checkpointing
    if checkpointing == "auto":
        checkpointing = needed_bytes(shape, wanted, quantization, checkpointing=False) > budget
    needed = needed_bytes(shape, wanted, quantization, checkpointing=checkpointing)
    if needed > budget and wanted.gpu is not None:
        return _streamed(shape, wanted, quantization, budget)
    layer, rest = weight_bytes(shape, quantization, wanted.precision)
    if shape.layers * layer + rest > budget:
        raise HostError(
            f"the base takes {_gb(shape.layers * layer + rest)} in {quantization}, and {_gb(budget)} are free",
            "end what else uses the device, set train.quantization to nf4, or train.max_memory.gpu to what it may take",
        )
    return Plan(quantization, checkpointing, shape.layers, needed)


def _streamed(shape: Shape, wanted: Wanted, quantization: Literal["nf4", "int8", "none"], budget: int) -> Plan:
    """A plan with only so many layers on the device as fit beside all else, and one more that passes through."""
    if quantization == "int8":
        raise RecipeError("train.max_memory cannot stream int8 weights", "set train.quantization to nf4 or none")
    layer, _ = weight_bytes(shape, quantization, wanted.precision)
    fixed = needed_bytes(shape, wanted, quantization, checkpointing=True) - (shape.layers - 1) * layer
    if fixed > budget:
        raise HostError(
            f"without its layers the base and the training take {_gb(fixed)}, and {_gb(budget)} are there for them",
            "raise train.max_memory.gpu, or lower train.batch_size",
        )
    resident = min((budget - fixed) // layer, shape.layers)
    waiting = (shape.layers - resident) * layer
    if wanted.cpu is not None and waiting > wanted.cpu:
        raise HostError(
            f"{shape.layers - resident} of {shape.layers} layers take {_gb(waiting)} of RAM, more than "
            f"train.max_memory.cpu ({_gb(wanted.cpu)})",
            "raise one of the two limits",
        )
    return Plan(quantization, checkpointing=True, resident=resident, needed=fixed + resident * layer)


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
