"""Whether a recipe fits this machine, its memory and its disks, and the plan of its training.

In: a recipe, a build folder, what host.py finds. Out: a forecast of bytes and seconds, a HostError that names a setting
that fits, or the `TrainingPlan` for the train stage. A forecast needs no fetched base, and torch only to measure the
CPU; where the base's shape is unknown before it is fetched, nothing is refused. Runs no stage.
"""

import contextlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json
from tutor.artifacts.layout import BuildFolder
from tutor.artifacts.manifest import read_manifest
from tutor.errors import ArtifactError, HostError, RecipeError, TutorError
from tutor.formats.models.base_source import hub_snapshot, source_files
from tutor.formats.models.gguf import read_gguf
from tutor.formats.models.model_folder import read_facts
from tutor.machine import device, distributed, host, run_cost
from tutor.machine.device import DeviceMemory, PrecisionChoice
from tutor.machine.host import MIB
from tutor.machine.matmul_rate import find_rates
from tutor.machine.memory import estimate
from tutor.machine.memory import plan as memory_plan
from tutor.machine.memory.estimate import StepWorkload, gb, parts_line
from tutor.machine.memory.plan import MemoryRequest, TrainingPlan
from tutor.machine.memory.row_lengths import RowLengths, count_rows, find_row_lengths, largest_batch
from tutor.machine.memory.shapes import SHAPES, Shape, read_shape, shape_of, shape_of_gguf
from tutor.recipe.settings import Recipe, TrainSettings
from tutor.recipe.trackers import refuse_missing_trackers
from tutor.recipe.values import HUB, PACKAGE

log = logging.getLogger(__name__)

LONG_TRAINING = 24 * 3600.0
"""Seconds of training on a CPU above which a warning is logged."""

WEIGHT_STAGES = ("base", "train", "merge", "convert")
"""Stages that write model weights: their disk space is estimated."""

TIMED_STAGES = (*WEIGHT_STAGES, "evaluate")
"""Stages whose duration is estimated."""


@dataclass(frozen=True)
class MemoryForecast:
    """Forecast of a training's memory and the memory of this machine, in bytes."""

    step: StepWorkload
    request: MemoryRequest
    parts: Mapping[str, int]
    memory: DeviceMemory
    change: Mapping[str, str | int] | None  # settings that make all parts, or at least the certain ones, fit
    rows: RowLengths | None = None
    choice: PrecisionChoice | None = None

    @property
    def gpu(self) -> bool:
        """Whether the memory is a GPU's."""
        return self.memory.gpu

    @property
    def need(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())

    @property
    def certain(self) -> int:
        """Bytes of the parts that are not assumptions."""
        return estimate.certain_bytes(self.parts, gpu=self.gpu)

    @property
    def hint(self) -> str:
        """Settings to change where it does not fit."""
        if not self.change:
            return "no setting makes it fit: take a smaller base"
        return "set " + ", ".join(f"train.{name} = {json.dumps(value)}" for name, value in self.change.items())


def refuse_stages(recipe: Recipe, build: Path, stages: Collection[str]) -> bool:
    """Raise HostError when the named stages, which are to run, cannot: memory for training, disk for all of them.

    Returns whether the base's shape is known; of a hub model it may not be before it is fetched. Raises RecipeError
    for settings that the base contradicts.
    """
    gpu = next(iter(host.gpus()), None) if "train" in stages else None
    if "train" in stages:
        refuse_missing_trackers(recipe.train.report_to)
        device.refuse_unusable_gpu(gpu)
    shape = find_shape(recipe, build)
    if shape is None:
        log.info("%s is not known before it is fetched: memory and disk cannot be estimated", recipe.base.source)
        return False
    refuse_lengths(recipe, shape)
    if "train" in stages:
        refuse_training(recipe, build, shape, gpu)
    sizes = run_cost.disk_sizes(recipe, shape, [name for name in stages if name in WEIGHT_STAGES])
    for place, free, need in run_cost.short_disks(run_cost.folder_sizes(recipe, build, sizes)):
        raise HostError(
            f"the stages will write {gb(need)} ({parts_line(sizes)}) to the disk of {place}, which has {gb(free)} free",
            "free disk space, or give another --build (HF_HOME for downloads from the hub)",
        )
    return True


def refuse_lengths(recipe: Recipe, shape: Shape) -> None:
    """Raise RecipeError for a length beyond the base's positions: Ollama would cut the context without a message."""
    lengths = {"generate.context": recipe.generate.context, "train.max_length": recipe.train.max_length}
    for name, tokens in lengths.items():
        if shape.positions and tokens > shape.positions:
            raise RecipeError(
                f"{recipe.path}: {name} is {tokens}, and the base {recipe.base.source} has {shape.positions} positions",
                f"set {name} to {shape.positions} or less",
            )


def refuse_training(recipe: Recipe, build: Path, shape: Shape, gpu: host.Gpu | None) -> None:
    """Raise HostError for a training that fails on this GPU, or without one on this CPU."""
    device.refuse_gpu(recipe.train.precision, shape, gpu)
    forecast = forecast_memory(recipe, build, shape, gpu)
    memory_plan.refuse_limits(shape, forecast.request, forecast.step, forecast.memory.available)
    refuse_memory(forecast)
    expected = forecast_seconds(recipe, shape, forecast, gpu)["train"]
    if gpu is None and expected and expected > LONG_TRAINING:
        log.warning("no NVIDIA GPU answers: training on this CPU takes about %.0f hours", expected / 3600)


def forecast_seconds(
    recipe: Recipe, shape: Shape, forecast: MemoryForecast, gpu: host.Gpu | None
) -> dict[str, float | None]:
    """Rough seconds by stage on this machine; None where no rate is known."""
    cores = host.processor().cores
    rates = forecast.choice.rates if forecast.choice else None
    on_cpu = run_cost.cpu_rate(shape, forecast.step.precision, rates, cores) if rates else None
    rate = run_cost.gpu_rate(gpu.name) if gpu else on_cpu
    work = run_cost.run_workload(recipe, shape, forecast.rows, checkpointing=forecast.step.checkpointing)
    return run_cost.estimate_seconds(shape, work, rate if forecast.rows else None, cores)


def refuse_memory(forecast: MemoryForecast) -> None:
    """Raise HostError for a training that cannot fit; log a warning for one that may not.

    Main memory that other programs hold causes only a warning: they may end, and the kernel can reclaim memory.
    """
    kind = "GPU memory" if forecast.gpu else "memory"
    takes = f"this training takes about {gb(forecast.need)} of {kind} ({parts_line(forecast.parts)})"
    name, total, available = forecast.memory.device, forecast.memory.total, forecast.memory.available
    if forecast.certain > total:
        raise HostError(f"{takes}; {name} has {gb(total)}", forecast.hint)
    users = (", ".join(host.gpu_users()) if forecast.gpu and forecast.need > available else "") or "other programs"
    if forecast.certain > available and forecast.gpu:
        raise HostError(f"{takes}; of {name} {gb(available)} are free, the rest is held by {users}", "end them")
    if forecast.need > total:
        log.warning("%s; %s has %s: it may not fit; if it does not, %s", takes, name, gb(total), forecast.hint)
    elif forecast.need > available:
        log.warning("%s; %s are free, the rest is held by %s", takes, gb(available), users)


def forecast_memory(recipe: Recipe, build: Path, shape: Shape, gpu: host.Gpu | None) -> MemoryForecast:
    """Forecast of a recipe's training on a GPU or, without one, on the CPU, from what is known of its rows."""
    memory = device.reported_memory(gpu)
    rows = find_row_lengths(recipe, build, BuildFolder(build, recipe.name).stage("base"))
    rates = None if gpu else find_rates(shape, host.processor())
    choice = device.decide_precision(recipe.train.precision, shape, gpu.capability if gpu else None, rates)
    choice = fit_precision(choice, shape, recipe.train, rows, memory)
    request = request_of(shape, recipe.train, choice.precision, rows, memory)
    step = memory_plan.decide(shape, request, memory.available)
    allowed = {*TrainSettings.model_fields, "max_memory.gpu"}
    if (main := host.memory()) is None or main.total < estimate.layer_bytes(shape, "nf4", 2) * shape.layers:
        allowed.remove("max_memory.gpu")
    change = memory_plan.suggest_settings(
        shape, step, memory.total // MIB * MIB, allowed, lambda parts: sum(parts.values())
    )
    if change is None:
        allowed -= {"max_memory.gpu"}  # its limit is for all parts

        def certain(parts: Mapping[str, int]) -> int:
            return estimate.certain_bytes(parts, gpu=step.gpu)

        change = memory_plan.suggest_settings(shape, step, memory.total, allowed, certain)
    return MemoryForecast(step, request, estimate.memory(shape, step), memory, change, rows, choice)


def fit_precision(
    choice: PrecisionChoice, shape: Shape, settings: TrainSettings, rows: RowLengths | None, memory: DeviceMemory
) -> PrecisionChoice:
    """The choice, or bf16 where fp32 is only the faster one and main memory has too little for it, but not for bf16."""

    def fits(precision: str) -> bool:
        request = request_of(shape, settings, precision, rows, memory)
        parts = estimate.memory(shape, memory_plan.decide(shape, request, memory.available))
        return estimate.certain_bytes(parts, gpu=memory.gpu) <= memory.total

    if (choice.precision, choice.reason) != ("fp32", "rates") or fits("fp32") or not fits("bf16"):
        return choice
    return replace(choice, precision="bf16", reason="memory")


def request_of(
    shape: Shape, settings: TrainSettings, precision: str, rows: RowLengths | None, memory: DeviceMemory
) -> MemoryRequest:
    """The memory request of a recipe's settings with the micro-batch that is chosen for this memory."""
    tokens = memory_plan.choose_tokens(shape, settings, precision, rows, memory, 1)
    largest, longest = largest_batch(settings.model_copy(update={"pass_tokens": tokens}), rows)
    return memory_plan.memory_request(shape, settings, precision, largest, longest, on_gpu=memory.gpu)


def plan_training(recipe: Recipe, inputs: Mapping[str, Path], saved_precision: str | None = None) -> TrainingPlan:
    """The plan of a training on this process's device, from the folders of the stages `base` and `data`; needs torch.

    It can be exact only now: the rows are counted with the base's tokenizer. `saved_precision` is that of a checkpoint
    from a CPU, which "auto" keeps there: another measurement must not end a training. Raises HostError when it cannot
    fit.
    """
    settings = recipe.train
    memory = device.training_memory()
    shape = read_shape(read_facts(inputs["base"])[1])
    refuse_lengths(recipe, shape)
    if saved_precision and settings.precision == "auto" and not memory.gpu:
        choice = PrecisionChoice(saved_precision, "checkpoint")
    else:
        choice = device.choose_precision(settings.precision, shape)
    rows = count_rows(recipe, inputs["data"], inputs["base"])
    choice = fit_precision(choice, shape, settings, rows, memory)
    if settings.max_memory.gpu and not memory.gpu:
        log.warning("train.max_memory has no effect without a GPU: all of the base is in RAM")
    if not memory.gpu or choice.reason == "range":
        log.info("%s", choice)
    plan = memory_plan.plan_training(shape, settings, choice.precision, rows, memory, distributed.world_size())
    return replace(plan, choice=choice)


def forecast_run(recipe: Recipe, build: Path, shape: Shape | None, gpu: host.Gpu | None) -> dict[str, Any]:
    """Memory by part, disk and seconds by stage that a recipe takes here; nulls where they cannot be estimated."""
    result: dict[str, Any] = {"path": str(recipe.path), "base": recipe.base.source, "parameters": None}
    if shape is None:
        return {**result, "memory": None, "disk": None, "seconds": None, "measured": [], "precision": None}
    forecast = forecast_memory(recipe, build, shape, gpu)
    measured = measured_seconds(recipe, build)
    roughly = forecast_seconds(recipe, shape, forecast, gpu)
    memory = forecast.memory
    return {
        **result,
        "parameters": shape.parameters,
        "memory": {
            "device": memory.device,
            "gpu": memory.gpu,
            "total": memory.total,
            "free": memory.available,
            "need": forecast.need,
            "parts": dict(forecast.parts),
            "pass_tokens": forecast.step.tokens,
            "fits": forecast.certain <= memory.total,
            "tight": forecast.certain <= memory.total < forecast.need,
            "settings": forecast.change,
        },
        "disk": run_cost.disk_sizes(recipe, shape, [*WEIGHT_STAGES, "publish"]),
        "seconds": {
            name: measured.get(name, roughly.get(name)) for name in TIMED_STAGES if name in {**roughly, **measured}
        },
        "measured": list(measured),
        "precision": _precision_record(forecast.choice) if forecast.choice else None,
    }


def _precision_record(choice: PrecisionChoice) -> dict[str, Any]:
    """The precision of a forecast, with the rates of the CPU that its times come from."""
    return {**choice.record, "measured": choice.rates.measured if choice.rates else None}


def measured_seconds(recipe: Recipe, build: Path) -> dict[str, float]:
    """Seconds that the existing stages took, from their manifests."""
    found = {}
    for name in TIMED_STAGES:
        with contextlib.suppress(ArtifactError):
            if manifest := read_manifest(BuildFolder(build, recipe.name).stage(name)):
                found[name] = manifest.seconds
    return found


def find_shape(recipe: Recipe, build: Path) -> Shape | None:
    """The base's shape: from the base stage, the folder, the package's GGUF, the hub's cache, or a known name."""
    source = recipe.base.source
    with contextlib.suppress(TutorError, OSError, ValueError, KeyError, TypeError, ImportError):
        base = BuildFolder(build, recipe.name).stage("base")
        if (base / "base.json").exists() and (facts := read_json(base / "base.json")).get("source") == source:
            return shape_of(read_json(base / str(facts["model"]) / "config.json"))
        if source.startswith("path:"):
            return shape_of(read_json(recipe.resolve(source.removeprefix("path:")) / "config.json"))
        if PACKAGE.fullmatch(source):
            return shape_of_gguf(read_gguf(source_files(recipe)["gguf"]))
        snapshot = hub_snapshot(source)
        if snapshot is not None and (snapshot / "config.json").exists():
            return shape_of(read_json(snapshot / "config.json"))
    found = HUB.fullmatch(source)
    return SHAPES.get(found["repo"] if found else source)
