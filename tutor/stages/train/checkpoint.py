"""Which checkpoint is safe to resume from. In: folders that a trainer saved. Out: the newest that is whole and ours.

A checkpoint is whole when its `manifest.json` is there (written last, after all else was synced) and every file is what
it says, and ours when it is of the same rows, base, settings, code and versions. What is damaged is set aside and kept.
Nothing is unpickled here, and by the trainer only what passed. Needs no torch.
"""

import datetime
import hashlib
import logging
import platform
import re
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import remove, sync, write_json
from tutor.artifacts.hashing import json_sha256
from tutor.artifacts.manifest import MANIFEST, Manifest, changed_fields, find_damage, read_manifest
from tutor.artifacts.provenance import provenance
from tutor.artifacts.stage_folder import checkpoint_folder, seal_outputs
from tutor.errors import ArtifactError, HostError
from tutor.machine import distributed
from tutor.machine.run_cost import short_disks

if TYPE_CHECKING:
    from tutor.prompt import Encoded

log = logging.getLogger(__name__)

SOURCES = (
    "stages/train/stage.py",
    "stages/train/audit.py",
    "stages/train/checkpoint.py",
    "stages/train/checkpoint_callback.py",
    "stages/train/loop.py",
    "stages/train/monitor.py",
    "stages/train/metrics.py",
    "stages/train/plot.py",
    "stages/train/kernels/packed_attention.py",
    "stages/train/trainer.py",
    "stages/train/kernels/chunked_loss.py",
    "machine/device.py",
    "engines/hf/engine.py",
    "engines/hf/loading.py",
    "engines/hf/score.py",
    "stages/train/kernels/fast_dropout.py",
    "machine/memory/plan.py",
    "stages/train/kernels/layer_streaming.py",
    "machine/distributed.py",
    "stages/train/held_out_loss.py",
    "machine/memory/estimate.py",
    "machine/memory/row_lengths.py",
    "machine/memory/shapes.py",
    "formats/models/model_folder.py",
    "machine/memory/batching.py",
    "prompt.py",
)
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "matplotlib")
"""The train stage's files of tutor/ and its libraries: another of them makes another adapter."""

FREE = frozenset(
    {"logging_steps", "save_steps", "save_minutes", "packing", "pass_tokens", "batch_size", "accumulation"}
)
"""Settings of training that may change before it is resumed; of the last two only the product counts."""

NAME = re.compile(r"checkpoint-([1-9][0-9]{0,17})")
REQUIRED = frozenset({"adapter_model.safetensors", "scheduler.pt", "trainer_state.json"})
"""Beside the optimizer's and each process's random state. Without one of them the trainer resumes all the same, and
makes another model without a word (docs/facts.md, 6)."""

KEEP = 2
"""Whole checkpoints that stay: the newest, and the one to fall back to."""

QUARANTINE = "quarantine"
STAGE = "stage/written"
"""In a checkpoint: what the stage had written by then (metrics.jsonl), so that it goes on there. Two folders deep:
the trainer takes a folder with an adapter in it, right below a checkpoint, for one more adapter to load."""

SHOWN = 5


@dataclass(frozen=True)
class Training:
    """A training that can be resumed: the folder it writes, and all that decides what comes out."""

    out: Path
    fields: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where its checkpoints are."""
        return checkpoint_folder(self.out)


@dataclass(frozen=True)
class Progress:
    """How far a training is, beyond what the trainer saves itself."""

    step: int
    steps: int
    seconds: float  # of training, in all runs
    loss: float  # summed since the step `logged`
    logged: int
    batch_size: int
    accumulation: int


Saved = tuple[Path, Progress]
"""A checkpoint, and how far it is."""


def identity(
    settings: Mapping[str, Any], rows: Mapping[str, Sequence["Encoded"]], **machine: str | int
) -> dict[str, Any]:
    """What a checkpoint must agree on with the training that resumes from it, flat: it goes into the manifest."""
    kept = {f"train.{name}": value for name, value in settings.items() if name not in FREE}
    batch = {"batch_size x accumulation": settings["batch_size"] * settings["accumulation"]}
    return {
        **kept,
        **batch,
        **{f"rows.{name}": rows_sha256(held) for name, held in rows.items()},
        **machine,
        **provenance(SOURCES, PACKAGES),
    }


def rows_sha256(rows: Sequence["Encoded"]) -> str:
    """sha256 over the ids and masks of all rows, in their order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(array("q", [len(row.ids), *row.ids, *row.mask]).tobytes())
    return total.hexdigest()


def resume(training: Training) -> Saved | None:
    """The newest whole checkpoint and how far it is, with the stage's files of then back in `out`; None: start anew.

    Sets damaged ones aside. Raises ArtifactError when the newest whole one is of another training.
    """
    found = newest(training)
    if found is None:
        return None
    path, progress = found
    if (path / STAGE).is_dir():
        shutil.copytree(path / STAGE, training.out, dirs_exist_ok=True)
    log.info("resuming after step %d of %d, from %s", progress.step, progress.steps, path)
    return found


def newest(training: Training) -> Saved | None:
    """The newest whole checkpoint; damaged ones are set aside. Raises ArtifactError when it is of another training."""
    aside = 0
    for path in by_step(training.folder):
        if problem := damage(path):
            aside += 1
            log.warning("%s; kept as %s", problem, _set_aside(path))
            continue
        manifest = read_manifest(path)
        assert manifest is not None
        if changed := changed_fields(manifest.fields, training.fields):
            more = f", and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            raise ArtifactError(
                f"{path} (of {manifest.results['steps']} steps) is of another training: "
                + "; ".join(changed[:SHOWN]) + more,
                "undo that to go on from it, or drop it and start anew: tutor clean train",
            )  # fmt: skip
        return path, Progress(**manifest.results)
    if aside:
        log.warning("no whole checkpoint is left: training starts anew")
    return None


def by_step(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first: by their step, whatever the clock said."""
    if not folder.is_dir():
        return []
    steps = {path: int(match[1]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads every byte of it."""
    try:
        return next(_faults(path), None)
    except ArtifactError as error:
        return error.message
    except (ValueError, RecursionError):  # JSON that Python reads and UTF-8 cannot hold
        return f"{path / MANIFEST} is damaged"


def _faults(path: Path) -> Iterator[str]:
    """What is wrong, each only of use when nothing was before it."""
    if not path.is_dir():
        yield f"{path} is no folder"
    manifest = read_manifest(path)
    if manifest is None:
        yield f"{path} was not saved to its end"
        return
    if manifest.key != _key(manifest.fields, manifest.outputs, manifest.results):
        yield f"{path / MANIFEST} is damaged"
    if path.name != f"checkpoint-{manifest.results['step']}":
        yield f"{path} is of step {manifest.results['step']}"
    if strange := sorted(_files(path) - {*manifest.outputs, MANIFEST}):
        yield f"{path} holds files that were not saved with it: {', '.join(strange[:SHOWN])}"
    yield from find_damage(path, content=True)


def _files(path: Path) -> set[str]:
    """The files below, but for hidden ones, which file managers and network disks leave."""
    found = (file.relative_to(path) for file in path.rglob("*") if not file.is_dir())
    return {file.as_posix() for file in found if not file.name.startswith(".")}


def _key(fields: Mapping[str, Any], outputs: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Over all that matters in a manifest, so that one flipped bit of it is seen."""
    return json_sha256({"fields": fields, "outputs": outputs, "results": results})


def _set_aside(path: Path) -> Path:
    """Move a checkpoint to where no run looks for one; its new name."""
    place = path.parent / QUARANTINE
    place.mkdir(exist_ok=True)
    taken = {entry.name for entry in place.iterdir()}
    names = (f"{path.name}{end}" for end in ("", *(f".{number}" for number in range(2, len(taken) + 3))))
    target = place / next(name for name in names if name not in taken)
    path.rename(target)
    return target


def required(count: int, *, sharded: bool = False) -> frozenset[str]:
    """What a checkpoint of so many processes has to hold."""
    states = {f"rng_state_{number}.pth" for number in range(count)} if count > 1 else {"rng_state.pth"}
    return REQUIRED | states | {"optimizer.bin" if sharded else "optimizer.pt"}


def seal(training: Training, progress: Progress) -> Path:
    """Make the folder that the trainer has just written a checkpoint, durable before it counts, and drop old ones.

    Raises ArtifactError when the trainer saved less than it needs to resume.
    """
    path = training.folder / f"checkpoint-{progress.step}"
    if missing := sorted(
        name
        for name in required(distributed.world_size(), sharded=distributed.is_sharded())
        if not (path / name).is_file()
    ):
        raise ArtifactError(f"the trainer saved {path} without {', '.join(missing)}", "a library's doing: report it")
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    shutil.copytree(training.out, path / STAGE)
    outputs = seal_outputs(path)
    sync(path)
    sync(training.folder)
    results = asdict(progress)
    manifest = Manifest(
        stage="checkpoint",
        key=_key(training.fields, outputs, results),
        fields=training.fields,
        outputs=outputs,
        results=results,
        started=started,
        seconds=round(progress.seconds, 3),
        host=platform.node(),
    )
    write_json(path / MANIFEST, asdict(manifest))
    for old in by_step(training.folder)[KEEP:]:
        remove(old)
    return path


def size(path: Path) -> int:
    """Bytes of a checkpoint."""
    manifest = read_manifest(path)
    return sum(entry["size"] for entry in manifest.outputs.values()) if manifest else 0


def discard_unfinished(training: Training) -> None:
    """Remove what this run began to save and could not: it frees the disk, and the one before stays."""
    for path in by_step(training.folder):
        if path.is_dir() and not (path / MANIFEST).exists():
            remove(path)


def require_room(training: Training, needed: int) -> None:
    """Raise HostError when the disk has no room for a checkpoint of `needed` bytes."""
    for _, free, _ in short_disks([(training.out, needed)]):
        raise HostError(
            f"no room for a checkpoint: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free "
            f"in {training.folder.parent}",
            "free some and run again: it goes on from the last checkpoint",
        )
