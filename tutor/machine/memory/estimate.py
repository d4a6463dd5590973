"""Estimate of the memory that a training step takes, in bytes by part, from a model's shape and the step's settings.

In: plain numbers. Out: plain numbers. Reads nothing from the machine. The only memory estimate: `tutor doctor` prints
it, memory/plan.py decides with it. The formulas follow the tensors that PyTorch keeps for the backward pass;
docs/benchmarks.md compares them with measured peaks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tutor.engines.protocol import SCORE_CHUNK_TOKENS
from tutor.machine.host import CUDA_CONTEXT
from tutor.machine.memory.shapes import MATRIX_INPUTS, Shape

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits per weight of double-quantized NF4: 4-bit code, 8-bit scale per 64 weights, fp32 scale per 256 scales."""

ADAPTER_BYTES = 4
"""Bytes per trainable parameter for its fp32 value."""

OPTIMIZER_BYTES = 8
"""Bytes per trainable parameter for AdamW's two moments."""

GRADIENT_BYTES = 4
"""Bytes per trainable parameter for its gradient."""

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes per number of each precision."""

HEAD_COLUMNS = 32768
"""Vocabulary entries in one tile of TRL's output head (its kernels/chunked_logprob.py)."""

HEAD_ROWS = 4096
"""Maximum tokens in one tile of TRL's output head."""

CHUNK_ROWS = 128
"""Tokens whose fp32 logits exist at one time with PyTorch's own output head."""

HEAD_TEMPORARIES = 29
"""Bytes of temporaries per number of a tile on a CPU, where no Triton kernel fuses the operations."""

SCORE_BYTES = 8
"""Bytes per logit of the copies made to score an answer: fp32, and its logarithm."""

PROCESS_BYTES = 1.1e9
"""Bytes of a Python process with its libraries after a first step, measured on a CPU."""

KERNEL_BYTES = 1.3e9
"""Bytes of oneDNN's kernels for micro-batches of many lengths on a CPU: in 16 bits, and in fp32 for fused layers.

Measured: 28 MB per new length at first, hardly more after 80 micro-batches.
"""

CPU_SLACK = 0.25
"""Share of the used bytes that the allocator holds in addition, measured on a CPU with glibc."""

GPU_SLACK = 0.05
"""Share of the used bytes that CUDA's allocator holds in addition: an allowance, not measured."""


@dataclass(frozen=True)
class StepWorkload:
    """Settings that decide how much memory a training step takes."""

    tokens: int  # of the largest micro-batch
    longest: int  # tokens of the longest row
    quantization: str  # nf4, int8, none
    precision: str  # bf16, fp16, fp32
    rank: int
    targets: Sequence[str]
    dropout: bool
    checkpointing: bool
    head: Literal["tiled", "chunked"]  # TRL's head, or PyTorch's linear_cross_entropy
    gpu: bool
    resident: int | None = None  # layers on the GPU, the others wait in main memory; None: all
    packed: bool = True  # rows fill a micro-batch up to its tokens; else the recipe's number of rows
    varied: bool = False  # micro-batches have many lengths
    fused: bool = False  # layers of the train stage's own functions (kernels/fused_layers.py), not transformers'
    unpacked: bool = False  # 4-bit weights are kept in the precision too
    dora: bool = False  # PEFT's DoRA

    @property
    def width(self) -> int:
        """Bytes per number of the precision."""
        return WIDTHS[self.precision]


def memory(shape: Shape, step: StepWorkload) -> dict[str, int]:
    """Peak bytes of a training by part: of GPU memory where the step uses a GPU, else of main memory."""
    adapters = trainable_parameters(shape, step.rank, step.targets, dora=step.dora)
    gradients = GRADIENT_BYTES * adapters
    activations = _activations(shape, step)
    workspace = max(_head(shape, step), _recomputation(shape, step), _scoring(shape, step) - activations)
    fixed, slack = (CUDA_CONTEXT, GPU_SLACK) if step.gpu else (PROCESS_BYTES, CPU_SLACK)
    if step.varied and (step.width == 2 or step.fused) and not step.gpu:
        fixed += KERNEL_BYTES
    parts = {
        "weights": _weights(shape, step),
        "adapters": ADAPTER_BYTES * adapters,
        "optimizer": OPTIMIZER_BYTES * adapters,
        "gradients": gradients,
        "activations": activations,
        "workspace": workspace,
        "process": fixed + slack * (gradients + activations + workspace),
    }
    return {name: math.ceil(size) for name, size in parts.items()}


def needed_bytes(shape: Shape, step: StepWorkload) -> int:
    """Bytes of all parts together."""
    return sum(memory(shape, step).values())


def layer_bytes(shape: Shape, quantization: str, width: int) -> float:
    """Bytes of the matrices of one layer."""
    # int8 keeps one fp32 scale per output row.
    numbers, scales = shape.matrix_parameters / shape.layers, 4 * sum(outputs for _, outputs in shape.matrices.values())
    return {"nf4": NF4_BITS / 8 * numbers, "int8": numbers + scales}.get(quantization, width * numbers)


def waiting_bytes(shape: Shape, step: StepWorkload) -> int:
    """Bytes of main memory for the layers that wait there."""
    waiting = shape.layers - (shape.layers if step.resident is None else step.resident)
    return math.ceil(waiting * layer_bytes(shape, step.quantization, step.width))


def _weights(shape: Shape, step: StepWorkload) -> float:
    layer = layer_bytes(shape, step.quantization, step.width)
    rest = step.width * (shape.other_parameters + (shape.matrix_parameters if step.unpacked else 0))
    if step.resident is None or step.resident >= shape.layers:
        return shape.layers * layer + rest
    # One waiting layer at a time is copied to the GPU; the NF4 scales of all layers stay on the GPU.
    scales = (NF4_BITS - 4) / 8 * shape.matrix_parameters / shape.layers if step.quantization == "nf4" else 0.0
    return (step.resident + 1) * layer + (shape.layers - step.resident - 1) * scales + rest


def _activations(shape: Shape, step: StepWorkload) -> float:
    """Bytes that all layers keep for the backward pass; with checkpointing only their inputs."""
    layer = step.width * shape.hidden * step.tokens if step.checkpointing else _layer(shape, step)
    return float(shape.layers * layer)


def _layer(shape: Shape, step: StepWorkload) -> int:
    """Bytes that one layer keeps."""
    return _layer_token(shape, step) * step.tokens + _dora_weights(shape, step)


def _layer_token(shape: Shape, step: StepWorkload) -> int:
    """Bytes per token that one layer keeps."""
    width, inner = step.width, shape.heads * shape.head_dim
    if step.fused:
        # Inputs of both halves; queries, keys, values and their result; gate, up; what each adapter's A returns.
        kept = 2 * shape.hidden + 2 * inner + 2 * shape.kv_heads * shape.head_dim + 2 * shape.intermediate
        masks = sum(shape.matrices[name][0] for name in step.targets) if step.dropout else 0
        return width * (kept + step.rank * len(step.targets)) + masks
    # Norms in fp32; queries, keys, values and their result; gate, its activation, up.
    norms = 4 * shape.architecture.norms * shape.hidden
    if shape.architecture.head_norms:
        norms += (2 if width == 4 else 1) * 4 * (inner + shape.kv_heads * shape.head_dim)
    kept = norms + 4 * width * inner + 3 * width * shape.intermediate
    if step.dora:  # what the base and what the adapter returns, before the magnitudes scale them
        kept += 2 * width * sum(shape.matrices[name][1] for name in step.targets)
    # An adapter keeps its own cast or dropped-out copy of its input; without both, adapters share an input.
    shared = step.precision == "fp32" and not step.dropout
    read = {MATRIX_INPUTS[name] if shared else name: shape.matrices[name][0] for name in step.targets}
    return kept + sum(read.values()) * (width + step.dropout)  # the dropout mask is one byte per number


def _dora_weights(shape: Shape, step: StepWorkload) -> int:
    """Bytes of weights that one layer keeps for the backward pass: of PEFT's DoRA with dropout, dequantized or cast."""
    copied = step.quantization != "none" or step.width == 2
    if not (step.dora and step.dropout and copied):
        return 0
    return step.width * sum(math.prod(shape.matrices[name]) for name in step.targets)


def _recomputation(shape: Shape, step: StepWorkload) -> float:
    """Bytes to recompute one layer from its input, and its largest matrix in 16 bits where it is quantized."""
    matrix = step.width * max(inputs * outputs for inputs, outputs in shape.matrices.values())
    layer = _layer(shape, step) if step.checkpointing else 0
    if step.dora:
        # An identity, whose product with the adapter is its change of the weight; the change, the weight, their sum.
        sizes = [shape.matrices[name] for name in step.targets]
        layer += max(4 * (inputs**2 + 3 * inputs * outputs) for inputs, outputs in sizes)
    if step.fused:
        # Gate, its activation, up and their gradients while the MLP is differentiated.
        layer += step.width * step.tokens * (4 * shape.intermediate + 3 * shape.hidden)
    return float(layer + (matrix if step.quantization != "none" and not step.unpacked else 0))


def _scoring(shape: Shape, step: StepWorkload) -> float:
    """Bytes of the logits of part of a held-out row, scored while nothing is kept for a backward pass."""
    return float(min(step.tokens, SCORE_CHUNK_TOKENS) * shape.vocabulary * (step.width + SCORE_BYTES))


def _head(shape: Shape, step: StepWorkload) -> float:
    """Bytes of one part of the logits, and of the hidden states in fp32."""
    width = step.width
    if step.head == "chunked":
        weights = 0 if width == 4 else 4 * shape.vocabulary * shape.hidden
        return float(weights + 4 * CHUNK_ROWS * shape.vocabulary + 12 * step.tokens * shape.hidden)
    columns, rows = min(shape.vocabulary, HEAD_COLUMNS), min(step.tokens, HEAD_ROWS)
    # TRL allocates the tile in full width; main memory that a small vocabulary does not touch is not used.
    tile = width * rows * (HEAD_COLUMNS if step.gpu else columns)
    if not step.gpu:
        # The larger of two moments: temporaries of the sum, or tile and weights cast to fp32.
        cast = 0 if width == 4 else 4 * columns * (rows + shape.hidden)
        tile += max(HEAD_TEMPORARIES * rows * columns, cast)
    return float(tile + 4 * step.tokens * shape.hidden)


def certain_bytes(parts: Mapping[str, int], *, gpu: bool) -> int:
    """Bytes that a training certainly needs: on a GPU without the assumed parts, CUDA's context and the allocator's."""
    return sum(parts.values()) - (parts["process"] if gpu else 0)


def trainable_parameters(shape: Shape, rank: int, targets: Sequence[str], *, dora: bool = False) -> int:
    """Number of parameters of an adapter of this rank on the named matrices; DoRA has a magnitude for each output."""
    pairs = rank * sum(sum(shape.matrices[name]) for name in targets)
    return shape.layers * (pairs + (sum(shape.matrices[name][1] for name in targets) if dora else 0))


def parts_line(parts: Mapping[str, int]) -> str:
    """The larger parts of an estimate in GB, for one sentence."""
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)


def gb(size: float) -> str:
    """Bytes as text in GB."""
    return f"{size / 1e9:.1f} GB"
