"""Disk and time that a run takes: bytes and seconds by stage, and the check that a disk has them.

In: a model's shape, a recipe, plain numbers. Out: plain numbers, or a HostError that names the disk. The only rules for
the size of a GGUF file, of a checkpoint and of free disk space: `tutor doctor`, preflight and the stages use them.
Decides nothing about memory; needs no torch.
"""

import contextlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tutor.artifacts.layout import BuildFolder
from tutor.engines.answer_limit import answer_limit
from tutor.errors import HostError
from tutor.formats.models.base_source import hub_cache, hub_snapshot
from tutor.formats.models.served_quantization import possible_quantizations
from tutor.machine import host
from tutor.machine.matmul_rate import MatmulRates
from tutor.machine.memory.estimate import ADAPTER_BYTES, OPTIMIZER_BYTES, gb, trainable_parameters
from tutor.machine.memory.row_lengths import RowLengths
from tutor.machine.memory.shapes import Shape
from tutor.recipe.quantizations import F16
from tutor.recipe.settings import Recipe

GGUF_BITS = {
    "F16": (16.0, 16.0),
    "BF16": (16.0, 16.0),
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
"""Mean bits per parameter of each GGUF type: for the 8B's matrices, and for the demo's 135M, whose rows do not fill
blocks. Rounded up from `llama-quantize --dry-run` of the pinned llama.cpp."""

TOKEN_BYTES = 60
"""Bytes per vocabulary entry of the tokenizer in a GGUF file."""

CHECKPOINT_EXTRA = 2 << 20
"""Bytes of a checkpoint beside the adapter and the optimizer's moments."""

CPU_OVERHEAD = 4.0e-9
"""Seconds of a training on one core beside matrix products, per operation and divided by the model's hidden size: the
demo in fp32 and in bf16 on two cores (docs/facts.md, 13)."""

PEAK_RATES = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "T4": 65e12, "4090": 165e12}
"""Dense 16-bit operations per second of GPUs, from their data sheets."""

GPU_SHARE = 0.2
"""Share of the peak rate that a training reaches: an assumption."""

STARTUP_SECONDS = 15.0
"""Seconds to import torch and transformers."""

MERGE_RATE = 200e6
"""Bytes per second of the merge stage: the 8B on two cores (docs/facts.md, 9)."""

CONVERT_RATE = 480e6
"""Bytes per second of the conversion to F16: the 8B on two cores (docs/facts.md, 9)."""

QUANTIZE_RATE = 4.5e6
"""Parameters per second and thread of a K-quant (docs/facts.md, 9). The other types take a tenth of the time."""

TOGETHER_BYTES = 4e9
"""Maximum size of tutor and base in 16 bits that are converted by one process: a second start takes seconds, which only
a small model notices."""

READ_RATE = 3.2e9
"""Bytes of model weights per second and core that llama.cpp reads during generation: the demo on two cores."""


@dataclass(frozen=True)
class RunWorkload:
    """Files, tokens and answers that a run of a recipe produces."""

    fetched: bool  # the base is downloaded from the hub into its cache
    made: bool  # the base stage writes the base into the build folder
    adapters: int  # trainable parameters
    tokens: int  # trained on in all epochs together
    scored: int  # tokens of held-out rows in all evaluations together
    checkpointing: bool
    quantizations: Sequence[str]
    served: Sequence[str]  # quantizations that may be served: all of them before the ladder stage has chosen
    with_base: bool  # the untuned base is converted and evaluated too
    prompts: int
    answer: int  # maximum tokens of an answer


def run_workload(recipe: Recipe, shape: Shape, rows: RowLengths | None, *, checkpointing: bool) -> RunWorkload:
    """The workload of a recipe; without `rows` its tokens are 0."""
    source, train = recipe.base.source, recipe.train
    evaluations = 2 + train.epochs * train.evaluations_per_epoch  # before and after the training too
    return RunWorkload(
        fetched=source.startswith("hub:"),
        made=source == "tiny" or source.startswith("package:"),
        adapters=trainable_parameters(shape, train.rank, train.target_modules, dora=train.variant == "dora"),
        tokens=train.epochs * rows.tokens if rows else 0,
        scored=evaluations * rows.scored if rows else 0,
        checkpointing=checkpointing,
        quantizations=recipe.convert.quantizations,
        served=possible_quantizations(recipe.ollama.quantization, recipe.convert.quantizations),
        with_base=recipe.convert.base,
        prompts=_prompts(recipe),
        answer=_answer_tokens(recipe, rows),
    )


def _answer_tokens(recipe: Recipe, rows: RowLengths | None) -> int:
    """Maximum tokens of an answer; before the answers are counted, an upper bound: the longest row."""
    if recipe.generate.max_new_tokens != "auto":
        return recipe.generate.max_new_tokens
    longest = (rows.answer or rows.longest) if rows else recipe.train.max_length
    return answer_limit(min(longest, recipe.train.max_length))


def _prompts(recipe: Recipe) -> int:
    """Number of prompts; without data.eval, of the held-out rows."""
    data = recipe.data
    if data.eval:
        return data.prompts or _count_lines(recipe.resolve(data.eval))
    held_out = round(data.held_out * (data.rows or _count_lines(recipe.resolve(data.train))))
    return min(filter(None, (data.prompts, held_out)), default=0)


def _count_lines(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        if path.is_file():
            return sum(bool(line.strip()) for line in path.read_text("utf-8").split("\n"))
    return 0


def gguf_bytes(shape: Shape, kind: str) -> int:
    """Upper estimate of the size of a GGUF file of this quantization, tokenizer included."""
    rows_fill_blocks = not any(inputs % 256 for inputs, _ in shape.matrices.values())
    bits = GGUF_BITS[kind][0 if rows_fill_blocks else 1]
    return math.ceil(1.01 * (shape.parameters * bits / 8 + TOKEN_BYTES * shape.vocabulary))


def converted_together(shape: Shape) -> bool:
    """Whether tutor and base are in 16 bits at the same time; otherwise the base's file is gone before the tutor's."""
    return 2 * gguf_bytes(shape, F16) <= TOGETHER_BYTES


def convert_bytes(shape: Shape, tutor: Iterable[str], base: Iterable[str] | None, *, keep_base: bool) -> int:
    """Bytes of the GGUF files at their peak: both models' 16-bit files, and the quantizations of each.

    `base` is None for the tutor alone; `keep_base`: the base's 16-bit file is one to compare with.
    """
    f16, size = gguf_bytes(shape, F16), partial(gguf_bytes, shape)
    alone = f16 + sum(map(size, tutor))
    if base is None:
        return alone
    return alone + sum(map(size, base)) + (f16 if keep_base or converted_together(shape) else 0)


def checkpoint_bytes(adapters: int) -> int:
    """Bytes of a training checkpoint with this number of trainable parameters."""
    return (ADAPTER_BYTES + OPTIMIZER_BYTES) * adapters + CHECKPOINT_EXTRA


def disk_bytes(shape: Shape, work: RunWorkload) -> dict[str, int]:
    """Bytes by stage while it runs; "hub" is the hub's cache, "publish" Ollama's disk."""
    weights = 2 * shape.parameters
    served = max(gguf_bytes(shape, kind) for kind in work.served)
    base = [kind for kind in work.served if kind != F16] if work.with_base else None
    return {
        "hub": weights if work.fetched else 0,
        "base": weights if work.made else 0,
        "train": (ADAPTER_BYTES + 2 * (ADAPTER_BYTES + OPTIMIZER_BYTES)) * work.adapters,  # with two checkpoints
        "merge": weights,
        "convert": convert_bytes(shape, work.quantizations, base, keep_base=[*work.served] == [F16]),
        # The upload and two copies of it while the server checks it; the base's are there beside the stored tutor.
        "publish": (4 if work.with_base else 3) * served,
    }


def estimate_seconds(
    shape: Shape, work: RunWorkload, training_rate: float | None, cores: int
) -> dict[str, float | None]:
    """Rough seconds by stage; None where no rate is known. `training_rate` is in floating-point operations a second."""
    # Forward, backward to the inputs only, and forward again; held-out rows are scored forward only.
    operations = (6 if work.checkpointing else 4) * work.tokens + 2 * work.scored
    models = 2 if work.with_base else 1
    slow = sum("_K" in kind for kind in (*work.quantizations, *(work.served if work.with_base else ())))
    answers = models * work.prompts * work.answer * max(gguf_bytes(shape, kind) for kind in work.served)
    return {
        "train": STARTUP_SECONDS + operations * shape.parameters / training_rate if training_rate else None,
        "merge": STARTUP_SECONDS + 2 * shape.parameters / MERGE_RATE,
        "convert": STARTUP_SECONDS
        + models * gguf_bytes(shape, "F16") / CONVERT_RATE
        + slow * shape.parameters / (QUANTIZE_RATE * cores),
        "evaluate": answers / (READ_RATE * cores),
    }


def cpu_rate(shape: Shape, precision: str, rates: MatmulRates, cores: int) -> float:
    """Floating-point operations per second of a training on a CPU with these rates of matrix products.

    Norms, activations and copies are added as a time of their own: a wider model has fewer of them per operation.
    """
    products = rates.fp32 if precision == "fp32" else rates.bf16
    return 1 / (1 / products + CPU_OVERHEAD / (shape.hidden * cores))


def gpu_rate(name: str) -> float | None:
    """Floating-point operations per second of a training on the named GPU; None for an unknown GPU."""
    found = [peak for card, peak in PEAK_RATES.items() if re.search(rf"\b{card}\b", name)]
    return GPU_SHARE * found[0] if found else None


def disk_sizes(recipe: Recipe, shape: Shape, stages: Collection[str]) -> dict[str, int]:
    """Bytes that each of the named stages will write, and "hub" for what is still to be downloaded; none that are 0."""
    sizes = disk_bytes(shape, run_workload(recipe, shape, None, checkpointing=False))
    if sizes["hub"] and (snapshot := hub_snapshot(recipe.base.source)):
        with contextlib.suppress(OSError):
            cached = sum(path.stat().st_size for path in snapshot.glob("*.safetensors") if path.exists())
            sizes["hub"] = max(0, sizes["hub"] - cached)
    wanted = {*stages, *(["hub"] if "base" in stages else [])}
    return {name: size for name, size in sizes.items() if name in wanted and size}


def folder_sizes(recipe: Recipe, build: Path, sizes: Mapping[str, int]) -> list[tuple[Path, int]]:
    """The sizes by stage as sizes by the folder that is written to."""
    in_build = sum(size for name, size in sizes.items() if name != "hub")
    hub = [(hub_cache(), sizes["hub"])] if "hub" in sizes else []
    return [(BuildFolder(build, recipe.name).path, in_build), *hub]


def short_disks(needs: Iterable[tuple[Path, int]]) -> list[tuple[Path, int, int]]:
    """Disks with too little free space: place, bytes free, bytes needed; folders on one disk are added up."""
    disks: dict[int, tuple[Path, int, int]] = {}
    for folder, size in needs:
        device, place, free = host.free_disk(folder)
        first, _, before = disks.get(device, (place, free, 0))
        disks[device] = (first, free, before + size)
    return [(place, free, need) for place, free, need in disks.values() if need > free]


def require_disk(folder: Path, need: float, work: str, hint: str = "free disk space") -> None:
    """Raise HostError when the disk of `folder` has less than `need` bytes free for `work`, such as "merging"."""
    for _, free, _ in short_disks([(folder, math.ceil(need))]):
        raise HostError(f"{folder} has {gb(free)} free, {work} needs {gb(need)}", hint)
