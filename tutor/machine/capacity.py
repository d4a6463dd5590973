"""Whether a recipe fits this machine: its memory and its disks, before anything is fetched.

In: a recipe, a build folder, what host.py finds. Out: the estimate by part, or a HostError that names a setting that
fits. Needs no torch; where the base's shape is not known before it is fetched, it says so and refuses nothing.
"""

import contextlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tutor.artifacts.layout import BuildFolder
from tutor.errors import HostError, TutorError
from tutor.formats.models.base_source import HUB, PACKAGE, hub_cache, hub_snapshot, input_files
from tutor.formats.models.gguf import Gguf, read_gguf
from tutor.formats.models.model_folder import read_json
from tutor.machine import host
from tutor.machine.memory import estimate
from tutor.machine.memory import plan as memory
from tutor.machine.memory import row_lengths as lengths
from tutor.machine.memory.estimate import Plan, Shape, Training, gb, parts_line
from tutor.machine.memory.fitting import MIB, fitting
from tutor.machine.memory.row_lengths import Rows
from tutor.recipe.settings import Recipe, TrainSettings

log = logging.getLogger(__name__)

LONG = 24 * 3600.0  # seconds of training on a CPU that are worth a warning
CAPABILITY, NATIVE_BF16 = (7, 5), (8, 0)
"""Of a GPU: what the pinned wheels of CUDA 13 need, and what computes in bf16 itself."""
WEIGHT_STAGES = ("base", "train", "merge", "convert")
"""Stages that write model weights: their disk space is estimated."""


@dataclass(frozen=True)
class Fit:
    """What a training takes and what there is for it, in bytes."""

    training: Training
    wanted: memory.Wanted
    parts: Mapping[str, int]
    device: str
    total: int
    free: int
    change: Mapping[str, str | int] | None  # settings with which it fits into `total`, at least what is certain
    rows: Rows | None = None

    @property
    def gpu(self) -> bool:
        """Whether it is a GPU's memory."""
        return self.training.gpu

    @property
    def need(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def certain(self) -> int:
        """What it cannot do without."""
        return estimate.certain(self.parts, gpu=self.gpu)

    @property
    def hint(self) -> str:
        """What to do where it does not fit."""
        if not self.change:
            return "no setting makes it fit: take a smaller base"
        return "set " + ", ".join(f"train.{name} = {json.dumps(value)}" for name, value in self.change.items())


def refuse(recipe: Recipe, build: Path, stages: Collection[str]) -> bool:
    """Raise HostError when the named stages, which are to run, cannot: memory for training, disk for all.

    Whether that could be told: not of a base that is known to the hub alone, before it is fetched.
    """
    shape = find_shape(recipe, build)
    if shape is None:
        log.info("%s is not known before it is fetched: memory and disk cannot be estimated", recipe.base.source)
        return False
    if "train" in stages:
        refuse_training(recipe, build, shape, next(iter(host.gpus()), None))
    sizes = disk_sizes(recipe, shape, [name for name in stages if name in WEIGHT_STAGES])
    for place, free, need in short_disks(folders(recipe, build, sizes)):
        raise HostError(
            f"the stages will write {gb(need)} ({parts_line(sizes)}) to the disk of {place}, which has {gb(free)} free",
            "make room, or give another --build (HF_HOME for what the hub sends)",
        )
    return True


def refuse_training(recipe: Recipe, build: Path, shape: Shape, gpu: host.Gpu | None) -> None:
    """Raise HostError for a training that fails on this GPU, or without one on this CPU."""
    refuse_gpu(recipe.train, gpu)
    found = fit(recipe, build, shape, gpu)
    memory.refuse_limits(shape, found.wanted, found.training, found.free)
    refuse_memory(found)
    takes = seconds(recipe, shape, found, gpu)["train"]
    if gpu is None and takes and takes > LONG:
        log.warning("no NVIDIA GPU answers: training on this CPU takes about %.0f hours", takes / 3600)


def seconds(recipe: Recipe, shape: Shape, fit: Fit, gpu: host.Gpu | None) -> dict[str, float | None]:
    """Seconds by stage on this machine, roughly; None where it cannot be told."""
    cores = host.processor().cores
    rate = estimate.gpu_rate(gpu.name) if gpu else cores * estimate.CPU_RATES[fit.training.precision]
    plan = plan_of(recipe, shape, fit.rows, checkpointing=fit.training.checkpointing)
    return estimate.seconds(shape, plan, rate if fit.rows else None, cores)


def refuse_gpu(settings: TrainSettings, gpu: host.Gpu | None) -> None:
    """Raise HostError for a precision or a GPU that the training would fail on."""
    if gpu is None:
        if settings.precision == "fp16":
            raise HostError("fp16 needs a GPU", "set train.precision to auto, bf16 or fp32")
        return
    found = f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}"
    if gpu.capability < CAPABILITY:
        raise HostError(f"{found}; the pinned CUDA needs 7.5", "hide it with CUDA_VISIBLE_DEVICES= to use the CPU")
    if settings.precision == "bf16" and gpu.capability < NATIVE_BF16:
        raise HostError(f"{found}, which has no native bf16", "set train.precision to auto")


def refuse_memory(fit: Fit) -> None:
    """Raise HostError for a training that cannot fit, warn of one that may not.

    Main memory that others use is no more than a warning: they may end, and the kernel can make room.
    """
    kind = "GPU memory" if fit.gpu else "memory"
    takes = f"this training takes about {gb(fit.need)} of {kind} ({parts_line(fit.parts)})"
    if fit.certain > fit.total:
        raise HostError(f"{takes}; {fit.device} has {gb(fit.total)}", fit.hint)
    users = (", ".join(host.gpu_users()) if fit.gpu and fit.need > fit.free else "") or "other programs"
    if fit.certain > fit.free and fit.gpu:
        raise HostError(f"{takes}; of {fit.device} {gb(fit.free)} are free, the rest is held by {users}", "end them")
    if fit.need > fit.total:
        log.warning("%s; %s has %s: it may not fit; if it does not, %s", takes, fit.device, gb(fit.total), fit.hint)
    elif fit.need > fit.free:
        log.warning("%s; %s are free, the rest is held by %s", takes, gb(fit.free), users)


def fit(recipe: Recipe, build: Path, shape: Shape, gpu: host.Gpu | None) -> Fit:
    """What a recipe's training takes here, on a GPU or, without one, on the CPU."""
    total, free, device = room(gpu)
    rows = lengths.rows_of(recipe, build, BuildFolder(build, recipe.name).stage("base"))
    cpu = host.processor()
    most = memory.choose_pass_tokens(
        shape, recipe.train, precision_of(recipe.train, gpu, cpu), lambda tried: lengths.pass_tokens(tried, rows),
        (free, total), on_gpu=gpu is not None,
    )  # fmt: skip
    wanted = wanted_of(recipe.train.model_copy(update={"pass_tokens": most}), rows, gpu, cpu)
    training = memory.decide(shape, wanted, free)
    parts = estimate.memory(shape, training)
    known = {*TrainSettings.model_fields, "max_memory.gpu"}
    if (main := host.memory()) is None or main.total < estimate.layer_bytes(shape, "nf4", 2) * shape.layers:
        known.remove("max_memory.gpu")
    change = fitting(shape, training, total // MIB * MIB, known, lambda parts: sum(parts.values()))
    if change is None:
        certain = known - {"max_memory.gpu"}  # its limit is for all parts
        change = fitting(shape, training, total, certain, lambda parts: estimate.certain(parts, gpu=training.gpu))
    return Fit(training, wanted, parts, device, total, free, change, rows)


def room(gpu: host.Gpu | None) -> tuple[int, int, str]:
    """Bytes in all and bytes free of the memory that trains, and whose it is; without limits where nobody says."""
    if gpu is not None:
        return gpu.total, gpu.free, gpu.name
    main = host.memory()
    total, free = (main.total, main.available) if main else (1 << 62, 1 << 62)
    return total, free, "this container" if main and main.limit else "this machine"


def wanted_of(settings: TrainSettings, rows: Rows | None, gpu: host.Gpu | None, cpu: host.Processor) -> memory.Wanted:
    """What a recipe's settings mean for memory here, with what they leave open still open."""
    precision = precision_of(settings, gpu, cpu)
    tokens, longest = lengths.pass_tokens(settings, rows)
    return memory.wanted(settings, precision, tokens, longest, on_gpu=gpu is not None)


def precision_of(settings: TrainSettings, gpu: host.Gpu | None, cpu: host.Processor) -> str:
    """What a recipe's training computes in here: bf16, fp16 or fp32."""
    if settings.precision != "auto":
        return settings.precision
    native = gpu.capability >= NATIVE_BF16 if gpu else cpu.multiplies_bf16
    return "bf16" if native else "fp16" if gpu else "fp32"


def plan_of(recipe: Recipe, shape: Shape, rows: Rows | None, *, checkpointing: bool) -> Plan:
    """What a recipe makes: files, tokens, answers."""
    source, train = recipe.base.source, recipe.train
    evaluations = 2 + train.epochs * train.evaluations_per_epoch  # before and after the training too
    return Plan(
        fetched=source.startswith("hub:"),
        made=source == "tiny" or source.startswith("package:"),
        adapters=estimate.trained(
            shape, train.rank, [name for name in train.target_modules if name in estimate.SOURCES]
        ),
        tokens=train.epochs * rows.tokens if rows else 0,
        scored=evaluations * rows.scored if rows else 0,
        checkpointing=checkpointing,
        quantizations=recipe.convert.quantizations,
        served=recipe.ollama.quantization,
        with_base=recipe.convert.base,
        prompts=recipe.data.prompts or _count(recipe.resolve(recipe.data.eval)),
        answer=recipe.generate.max_new_tokens,
    )


def find_shape(recipe: Recipe, build: Path) -> Shape | None:
    """The base's shape: of the base stage, the folder, the package's GGUF, the hub's cache, or as known by name."""
    source = recipe.base.source
    with contextlib.suppress(TutorError, OSError, ValueError, ImportError):
        base = BuildFolder(build, recipe.name).stage("base")
        if (base / "base.json").exists() and (facts := read_json(base / "base.json")).get("source") == source:
            return estimate.shape_of(read_json(base / str(facts["model"]) / "config.json"))
        if source.startswith("path:"):
            return estimate.shape_of(read_json(recipe.resolve(source.removeprefix("path:")) / "config.json"))
        if PACKAGE.fullmatch(source):
            return shape_of_gguf(read_gguf(input_files(recipe)["gguf"]))
        snapshot = hub_snapshot(source)
        if snapshot is not None and (snapshot / "config.json").exists():
            return estimate.shape_of(read_json(snapshot / "config.json"))
    found = HUB.fullmatch(source)
    return estimate.SHAPES.get(found["repo"] if found else source)


def shape_of_gguf(gguf: Gguf) -> Shape:
    """The shape in a GGUF's metadata. Raises ValueError naming what is missing."""
    said = gguf.fields.get
    names = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
    }
    config = {name: said(f"llama.{key}") for name, key in names.items()}
    embedding = gguf.tensors.get("token_embd.weight")
    config["vocab_size"] = embedding.shape[-1] if embedding else None
    return estimate.shape_of({**config, "tie_word_embeddings": "output.weight" not in gguf.tensors})


def _count(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        if path.is_file():
            return sum(bool(line.strip()) for line in path.read_text("utf-8").split("\n"))
    return 0


def disk_sizes(recipe: Recipe, shape: Shape, stages: Collection[str]) -> dict[str, int]:
    """Bytes that each of the named stages will write, and "hub" what is still to be fetched; none that are empty."""
    sizes = estimate.disk(shape, plan_of(recipe, shape, None, checkpointing=False))
    if sizes["hub"] and (snapshot := hub_snapshot(recipe.base.source)):
        with contextlib.suppress(OSError):
            there = sum(path.stat().st_size for path in snapshot.glob("*.safetensors") if path.exists())
            sizes["hub"] = max(0, sizes["hub"] - there)
    wanted = {*stages, *(["hub"] if "base" in stages else [])}
    return {name: size for name, size in sizes.items() if name in wanted and size}


def folders(recipe: Recipe, build: Path, sizes: Mapping[str, int]) -> list[tuple[Path, int]]:
    """Sizes by stage as sizes by the folder that is written to."""
    in_build = sum(size for name, size in sizes.items() if name != "hub")
    return [
        (BuildFolder(build, recipe.name).path, in_build),
        *([(hub_cache(), sizes["hub"])] if "hub" in sizes else []),
    ]


def short_disks(needs: Iterable[tuple[Path, int]]) -> list[tuple[Path, int, int]]:
    """Disks without room: place, bytes free, bytes needed; folders on one disk need the sum."""
    disks: dict[int, tuple[Path, int, int]] = {}
    for folder, size in needs:
        device, place, free = host.free_disk(folder)
        first, _, before = disks.get(device, (place, free, 0))
        disks[device] = (first, free, before + size)
    return [(place, free, need) for place, free, need in disks.values() if need > free]
