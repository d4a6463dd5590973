"""What a run takes: bytes of memory by part, bytes of disk and seconds by stage, from a model's shape and settings.

In: plain numbers. Out: plain numbers. Pure: asks no machine. The one estimate: `tutor doctor` prints it, the train
stage decides with it. Memory follows what PyTorch keeps for the backward pass; docs/benchmarks.md compares it with
measured peaks.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tutor.engines.protocol import SCORE_ROWS
from tutor.machine.host import CUDA

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight in NF4, double-quantized: its code, a byte of scale for 64, fp32 for 256 of those scales."""
ADAPTER_BYTES, OPTIMIZER_BYTES, GRADIENT_BYTES = 4, 8, 4
"""Of a trained number: fp32, AdamW's two moments, its gradient."""
WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}
HEAD_COLUMNS, HEAD_ROWS = 32768, 4096
"""TRL's tile of the head: so many words at once, for so many tokens (its kernels/chunked_logprob.py)."""
CHUNK_ROWS = 128
"""Of logits in fp32 at a time, where the head is PyTorch's."""
HEAD_TEMPORARIES = 29
"""Bytes of fp32 and flags a tile's number has beside itself where no Triton kernel folds it: on a CPU."""
SCORE_BYTES = 8
"""Bytes of a logit's copies when an answer is scored: in fp32, and its logarithm."""
PROCESS = 1.1e9
"""Bytes of Python with its libraries after a first step, measured on a CPU."""
KERNELS = 1.3e9
"""What oneDNN's kernels for passes of ever other lengths come to, in 16 bits on a CPU: measured, 28 MB a new length at
first, hardly more after 80 passes. Of fp32 it keeps none."""
CPU_SLACK, GPU_SLACK = 0.25, 0.05
"""What the allocator holds beside what is in use: measured on a CPU (glibc), an allowance on a GPU."""
GGUF_BITS = {
    "F16": (16.0, 16.0),
    "Q8_0": (8.5, 8.5),
    "Q6_K": (6.6, 8.5),
    "Q5_K_M": (5.71, 6.6),
    "Q5_K_S": (5.6, 6.5),
    "Q5_0": (5.6, 6.2),
    "Q4_K_M": (4.9, 6.2),
    "Q4_K_S": (4.7, 6.0),
    "Q4_0": (4.7, 5.4),
    "Q5_1": (6.1, 6.6),
    "Q4_1": (5.1, 5.8),
    "IQ4_NL": (4.7, 5.4),
    "IQ4_XS": (4.5, 5.4),
    "Q3_K_L": (4.3, 5.7),
    "Q3_K_M": (4.0, 5.5),
    "Q3_K_S": (3.7, 5.2),
    "IQ3_M": (3.8, 5.3),
    "IQ3_S": (3.7, 5.2),
    "IQ3_XS": (3.5, 5.2),
    "IQ3_XXS": (3.4, 5.2),
    "Q2_K": (3.2, 5.2),
    "Q2_K_S": (3.0, 5.1),
    "IQ2_M": (3.0, 5.0),
    "IQ2_S": (2.8, 5.0),
    "IQ2_XS": (2.6, 5.0),
    "IQ2_XXS": (2.4, 4.9),
    "TQ2_0": (2.6, 4.9),
    "TQ1_0": (2.2, 4.8),
    "IQ1_M": (2.2, 4.9),
    "IQ1_S": (2.0, 4.8),
}
"""Of a number on average: of the 8B, by its matrices' types, and where rows do not fill blocks, of the demo's 135M;
rounded up from what `llama-quantize --dry-run` of the pinned llama.cpp says."""
CPU_RATES = {"bf16": 70e9, "fp32": 40e9}
"""Floating-point operations a second and core that a training gets: the 135M on a core with AMX."""
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "T4": 65e12, "4090": 165e12}
"""Dense 16-bit operations a second by the cards' data sheets."""
GPU_SHARE = 0.2
"""Of that, what a training gets: an assumption."""
TOKEN_BYTES = 60  # of a tokenizer in a GGUF file, a word
START = 15.0  # seconds until torch and transformers are imported
MERGE_RATE, CONVERT_RATE = 200e6, 480e6
"""Bytes a second: the 8B on two cores (docs/facts.md, 9)."""
QUANTIZE_RATE = 4.5e6
"""Numbers a second and thread into a K-quant: the same table. The other kinds take a tenth of it."""
READ_RATE = 3.2e9
"""Bytes of a model a second and core that llama.cpp goes through while it answers: the demo on two cores."""
SOURCES = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "heads",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "product",
}
"""What a layer's matrices read."""


@dataclass(frozen=True)
class Shape:
    """A Llama's size, as its config.json says."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the head is the embedding

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """A layer's matrices: inputs and outputs by name."""
        inner, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, inner),
            "k_proj": (self.hidden, shared),
            "v_proj": (self.hidden, shared),
            "o_proj": (inner, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def in_matrices(self) -> int:
        """Numbers in the layers' matrices, which is what a 4-bit base quantizes."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def elsewhere(self) -> int:
        """Numbers in embedding, head and norms, which stay in 16 bits."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden * (2 * self.layers + 1)

    @property
    def parameters(self) -> int:
        """All numbers of the model."""
        return self.in_matrices + self.elsewhere


SHAPES = {
    "tiny": Shape(64, 2, 128, 4, 2, 16, 1024, tied=False),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": Shape(4096, 32, 14336, 32, 8, 128, 128256, tied=False),
}
"""What config.json will say, for before it is there: of stages/base/tiny_model.py, and of hub models by name."""


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape in a config.json. Raises ValueError naming what it lacks or what cannot be."""

    def number(name: str, default: int | None = None) -> int:
        value = config.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise ValueError(f"{name} is {value!r}")
        return value

    heads, hidden = number("num_attention_heads"), number("hidden_size")
    # Both may stand there as null.
    config = {name: value for name, value in config.items() if value is not None}
    return Shape(
        hidden=hidden,
        layers=number("num_hidden_layers"),
        intermediate=number("intermediate_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", max(1, hidden // heads)),
        vocabulary=number("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


@dataclass(frozen=True)
class Training:
    """What decides how much memory a training step takes."""

    tokens: int  # of one pass, at most
    longest: int  # of the longest row
    quantization: str  # nf4, int8, none
    precision: str  # bf16, fp16, fp32
    rank: int
    targets: Sequence[str]
    dropout: bool
    checkpointing: bool
    head: Literal["tiled", "chunked"]  # TRL's; PyTorch's linear_cross_entropy
    gpu: bool
    resident: int | None = None  # layers on the GPU, where not all: the others wait in main memory
    packed: bool = True  # rows fill a pass up to its tokens; else so many rows as the recipe has
    varied: bool = False  # passes are of many lengths

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return WIDTHS[self.precision]


def memory(shape: Shape, training: Training) -> dict[str, int]:
    """Bytes at the peak of a training, by part: of the GPU where it has one, else of main memory."""
    adapters = trained(shape, training.rank, training.targets)
    gradients = GRADIENT_BYTES * adapters
    activations = _activations(shape, training)
    workspace = max(_head(shape, training), _layer_again(shape, training), _scoring(shape, training) - activations)
    fixed, slack = (CUDA, GPU_SLACK) if training.gpu else (PROCESS, CPU_SLACK)
    if training.varied and training.width == 2 and not training.gpu:
        fixed += KERNELS
    parts = {
        "weights": _weights(shape, training),
        "adapters": ADAPTER_BYTES * adapters,
        "optimizer": OPTIMIZER_BYTES * adapters,
        "gradients": gradients,
        "activations": activations,
        "workspace": workspace,
        "process": fixed + slack * (gradients + activations + workspace),
    }
    return {name: math.ceil(size) for name, size in parts.items()}


def layer_bytes(shape: Shape, quantization: str, width: int) -> float:
    """Bytes of one layer's matrices."""
    # int8 keeps a scale in fp32 for each row; rows are as many as a layer's outputs.
    numbers, scales = shape.in_matrices / shape.layers, 4 * sum(outputs for _, outputs in shape.matrices.values())
    return {"nf4": NF4_BITS / 8 * numbers, "int8": numbers + scales}.get(quantization, width * numbers)


def waiting_bytes(shape: Shape, training: Training) -> int:
    """Bytes of main memory for the layers that wait there."""
    waiting = shape.layers - (shape.layers if training.resident is None else training.resident)
    return math.ceil(waiting * layer_bytes(shape, training.quantization, training.width))


def _weights(shape: Shape, training: Training) -> float:
    layer = layer_bytes(shape, training.quantization, training.width)
    rest = training.width * shape.elsewhere
    if training.resident is None or training.resident >= shape.layers:
        return shape.layers * layer + rest
    # One layer more passes through; the scales of those in NF4 stay on the GPU.
    scales = (NF4_BITS - 4) / 8 * shape.in_matrices / shape.layers if training.quantization == "nf4" else 0.0
    return (training.resident + 1) * layer + (shape.layers - training.resident - 1) * scales + rest


def _activations(shape: Shape, training: Training) -> float:
    """What all layers keep for the backward pass: with checkpointing no more than their inputs."""
    layer = training.width * shape.hidden if training.checkpointing else _layer(shape, training)
    return float(shape.layers * layer * training.tokens)


def _layer(shape: Shape, training: Training) -> int:
    """Bytes a token that one layer keeps."""
    width, inner = training.width, shape.heads * shape.head_dim
    # Two norms in fp32; queries, keys, values and their result; gate, its activation, up.
    kept = 2 * 4 * shape.hidden + 4 * width * inner + 3 * width * shape.intermediate
    # An adapter keeps its own copy of what it reads, cast or dropped out of; else those with one source share it.
    shared = training.precision == "fp32" and not training.dropout
    read = {SOURCES[name] if shared else name: shape.matrices[name][0] for name in training.targets}
    return kept + sum(read.values()) * (width + training.dropout)  # dropout keeps a byte: which numbers stay


def _layer_again(shape: Shape, training: Training) -> float:
    """One layer made again from its input, and its largest matrix in 16 bits where it is quantized."""
    matrix = training.width * max(inputs * outputs for inputs, outputs in shape.matrices.values())
    again = _layer(shape, training) * training.tokens if training.checkpointing else 0
    return float(again + (matrix if training.quantization != "none" else 0))


def _scoring(shape: Shape, training: Training) -> float:
    """The logits of a part of a held-out row: these are scored when nothing is kept for a backward pass."""
    return float(min(training.tokens, SCORE_ROWS) * shape.vocabulary * (training.width + SCORE_BYTES))


def _head(shape: Shape, training: Training) -> float:
    """The logits, a part at a time, and what the hidden states need in fp32."""
    width = training.width
    if training.head == "chunked":
        weights = 0 if width == 4 else 4 * shape.vocabulary * shape.hidden
        return float(weights + 4 * CHUNK_ROWS * shape.vocabulary + 12 * training.tokens * shape.hidden)
    columns, rows = min(shape.vocabulary, HEAD_COLUMNS), min(training.tokens, HEAD_ROWS)
    # The tile is made in full width; of main memory, what a small vocabulary does not touch takes nothing.
    tile = width * rows * (HEAD_COLUMNS if training.gpu else columns)
    if not training.gpu:
        # Two moments: the fold's temporaries, then tile and weights in fp32 to be multiplied.
        cast = 0 if width == 4 else 4 * columns * (rows + shape.hidden)
        tile += max(HEAD_TEMPORARIES * rows * columns, cast)
    return float(tile + 4 * training.tokens * shape.hidden)


def certain(parts: Mapping[str, int], *, gpu: bool) -> int:
    """Bytes that a training cannot do without: on a GPU without CUDA's and the allocator's, which are assumed."""
    return sum(parts.values()) - (parts["process"] if gpu else 0)


def parts_line(parts: Mapping[str, int]) -> str:
    """The larger parts of an estimate in GB, for a sentence."""
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)


def gb(size: float) -> str:
    """Bytes in GB."""
    return f"{size / 1e9:.1f} GB"


def gguf_bytes(shape: Shape, kind: str) -> int:
    """A GGUF file's size, rounded up: quantization by name, tokenizer and all."""
    rows_fill_blocks = not any(inputs % 256 for inputs, _ in shape.matrices.values())
    bits = GGUF_BITS[kind][0 if rows_fill_blocks else 1]
    return math.ceil(1.01 * (shape.parameters * bits / 8 + TOKEN_BYTES * shape.vocabulary))


def trained(shape: Shape, rank: int, targets: Sequence[str]) -> int:
    """How many numbers a LoRA adapter of this rank has on the named matrices."""
    return shape.layers * sum(rank * sum(shape.matrices[name]) for name in targets)


@dataclass(frozen=True)
class Plan:
    """What a recipe makes and does, beside what decides its memory."""

    fetched: bool  # the base comes from the hub, into its cache
    made: bool  # the base is written into the build folder
    adapters: int  # trained numbers
    tokens: int  # that are trained on, all epochs together
    scored: int  # of held-out rows, all evaluations together
    checkpointing: bool
    quantizations: Sequence[str]
    served: str
    with_base: bool  # the untuned base is converted and asked too
    prompts: int
    answer: int  # tokens of an answer, at most


def disk(shape: Shape, plan: Plan) -> dict[str, int]:
    """Bytes by stage while it runs; "hub" is the hub's cache, "publish" Ollama's disk."""
    whole = 2 * shape.parameters
    f16, served = gguf_bytes(shape, "F16"), gguf_bytes(shape, plan.served)
    # The base's F16 goes when its quantization is there.
    beside = f16 + served if plan.with_base else 0
    return {
        "hub": whole if plan.fetched else 0,
        "base": whole if plan.made else 0,
        "train": (ADAPTER_BYTES + 2 * (ADAPTER_BYTES + OPTIMIZER_BYTES)) * plan.adapters,  # with two checkpoints
        "merge": whole,
        "convert": f16 + beside + sum(gguf_bytes(shape, kind) for kind in plan.quantizations),
        "publish": 3 * served,  # what is sent, its copy while it is checked, and what stays
    }


def seconds(shape: Shape, plan: Plan, training_rate: float | None, cores: int) -> dict[str, float | None]:
    """Seconds by stage, roughly; None where it cannot be told. The rate is in floating-point operations a second."""
    # Forward, backward to the inputs alone, and forward again; held-out rows are scored forward alone.
    work = (6 if plan.checkpointing else 4) * plan.tokens + 2 * plan.scored
    models = 2 if plan.with_base else 1
    slow = sum("_K" in kind for kind in plan.quantizations) + plan.with_base
    answers = models * plan.prompts * plan.answer * gguf_bytes(shape, plan.served)
    return {
        "train": START + work * shape.parameters / training_rate if training_rate else None,
        "merge": START + 2 * shape.parameters / MERGE_RATE,
        "convert": START
        + models * gguf_bytes(shape, "F16") / CONVERT_RATE
        + slow * shape.parameters / (QUANTIZE_RATE * cores),
        "evaluate": answers / (READ_RATE * cores),
    }


def gpu_rate(name: str) -> float | None:
    """Floating-point operations a second that a training gets from a GPU, by its name; None for one not known."""
    found = [peak for card, peak in PEAKS.items() if re.search(rf"\b{card}\b", name)]
    return GPU_SHARE * found[0] if found else None
