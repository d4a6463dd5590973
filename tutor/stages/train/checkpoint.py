"""Find the checkpoint to resume from, and seal new ones. In: folders that the trainer saved. Out: the newest usable.

A checkpoint is intact when it has a `manifest.json` (written last, after everything else was synced) and every file
matches it. A checkpoint is usable when it is intact and has the same rows, base, settings, code and versions as this
training. Damaged checkpoints are moved to a quarantine folder. Does not unpickle, so that the trainer unpickles only
files that passed these checks, and does not need torch.
"""

import contextlib
import datetime
import hashlib
import logging
import platform
import re
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import remove, sync, write_json
from tutor.artifacts.hashing import json_sha256
from tutor.artifacts.manifest import MANIFEST, Manifest, find_damage, read_manifest
from tutor.artifacts.provenance import Provenance
from tutor.artifacts.stage_folder import checkpoint_folder, seal_outputs
from tutor.errors import ArtifactError, HostError
from tutor.machine import distributed
from tutor.machine.run_cost import short_disks

if TYPE_CHECKING:
    from tutor.prompt.encoding import Encoded

log = logging.getLogger(__name__)

CHANGEABLE = frozenset(
    {"logging_steps", "save_steps", "save_minutes", "packing", "pass_tokens", "batch_size", "accumulation"}
)
"""Settings that may change between a checkpoint and its resumption; the product of the last two may not."""

FOLDER_NAME = re.compile(r"checkpoint-([1-9][0-9]{0,17})")
"""The trainer's name of a checkpoint's folder; the group is the step."""

REQUIRED = frozenset({"adapter_model.safetensors", "scheduler.pt", "trainer_state.json"})
"""Files that every checkpoint must hold, besides the optimizer's state and each process's random state.

When one is missing, the trainer resumes without an error and makes another model (docs/facts.md, 6)."""

KEPT_CHECKPOINTS = 2
"""Number of intact checkpoints that are kept: the newest, and one to fall back to."""

QUARANTINE = "quarantine"
"""Folder for damaged checkpoints, beside the others."""

STAGE_FILES = "stage/written"
"""Folder in a checkpoint with the files that the stage had written by then (metrics.jsonl).

Two levels deep: the trainer loads a folder with an adapter directly below a checkpoint as another adapter."""

MAX_LISTED = 5
"""Maximum number of differences or files that an error lists."""


@dataclass(frozen=True)
class TrainingRun:
    """A training that can be resumed: its output folder, and the fields that determine its result."""

    out: Path
    fields: dict[str, Any]
    sources: dict[str, str] = field(default_factory=dict)  # the files behind the field "code"

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints."""
        return checkpoint_folder(self.out)


@dataclass(frozen=True)
class Progress:
    """The state of a training that the trainer does not save itself."""

    step: int
    steps: int
    seconds: float  # training time of all runs
    loss: float  # sum since the step `logged`
    logged: int
    batch_size: int
    accumulation: int


Checkpoint = tuple[Path, Progress]
"""A checkpoint's folder and its progress."""


def training_fields(
    settings: Mapping[str, Any], rows: Mapping[str, Sequence["Encoded"]], code: Provenance, **machine: str | int
) -> dict[str, Any]:
    """Return the fields that must be equal in a checkpoint and in the training that resumes from it."""
    kept = {f"train.{name}": value for name, value in settings.items() if name not in CHANGEABLE}
    batch = {"batch_size x accumulation": settings["batch_size"] * settings["accumulation"]}
    return {
        **kept,
        **batch,
        **{f"rows.{name}": rows_sha256(held) for name, held in rows.items()},
        **machine,
        **code.fields,
    }


def rows_sha256(rows: Sequence["Encoded"]) -> str:
    """Return the sha256 of the ids and masks of all rows, in their order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(array("q", [len(row.ids), *row.ids, *row.mask]).tobytes())
    return total.hexdigest()


def resume(training: TrainingRun) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None to start from the beginning; restore the stage's files in `out`.

    Moves damaged checkpoints away. Raises ArtifactError when the newest intact one belongs to another training.
    """
    found = newest_checkpoint(training)
    if found is None:
        return None
    path, progress = found
    if (path / STAGE_FILES).is_dir():
        shutil.copytree(path / STAGE_FILES, training.out, dirs_exist_ok=True)
    log.info("resuming after step %d of %d, from %s", progress.step, progress.steps, path)
    return found


def newest_checkpoint(training: TrainingRun) -> Checkpoint | None:
    """Return the newest intact checkpoint, and move damaged ones away.

    Raises ArtifactError when the checkpoint belongs to another training.
    """
    damaged = 0
    for path in by_step(training.folder):
        if problem := first_damage(path):
            damaged += 1
            log.warning("%s; kept as %s", problem, _quarantine(path))
            continue
        manifest = read_manifest(path)
        assert manifest is not None
        if changed := manifest.changes(training.fields, training.sources):
            more = f", and {len(changed) - MAX_LISTED} more" if len(changed) > MAX_LISTED else ""
            raise ArtifactError(
                f"{path} (of {manifest.results['steps']} steps) is of another training: "
                + "; ".join(changed[:MAX_LISTED]) + more,
                "undo that to resume from it, or remove it and start from the beginning: tutor clean train",
            )  # fmt: skip
        return path, Progress(**manifest.results)
    if damaged:
        log.warning("no intact checkpoint is left: training starts from the beginning")
    return None


def saved_precision(folder: Path) -> str | None:
    """Return the precision of the newest readable checkpoint in a folder, if it is of a training on a CPU."""
    for path in by_step(folder):
        with contextlib.suppress(ArtifactError):
            manifest = read_manifest(path)
            if manifest and manifest.fields.get("device") == "cpu":
                precision = manifest.fields.get("precision")
                return precision if isinstance(precision, str) else None
    return None


def by_step(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, intact or not, in descending order of their steps."""
    if not folder.is_dir():
        return []
    steps = {path: int(match[1]) for path in folder.iterdir() if (match := FOLDER_NAME.fullmatch(path.name))}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint that was saved to its end; None without one."""
    steps = (path.name.rpartition("-")[2] for path in by_step(folder) if (path / MANIFEST).exists())
    return next(map(int, steps), None)


def first_damage(path: Path) -> str | None:
    """Return the first fault of a checkpoint, or None. Reads all of its bytes."""
    try:
        return next(_faults(path), None)
    except ArtifactError as error:
        return error.message
    except (ValueError, RecursionError):  # JSON that Python can parse and UTF-8 cannot encode
        return f"{path / MANIFEST} is damaged"


def _faults(path: Path) -> Iterator[str]:
    """Yield the faults; each check assumes that the ones before it passed."""
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
    if unknown := sorted(_files(path) - {*manifest.outputs, MANIFEST}):
        yield f"{path} holds files that were not saved with it: {', '.join(unknown[:MAX_LISTED])}"
    yield from find_damage(path, content=True)


def _files(path: Path) -> set[str]:
    """Return the files below `path`, without hidden ones, which file managers and network disks create."""
    found = (file.relative_to(path) for file in path.rglob("*") if not file.is_dir())
    return {file.as_posix() for file in found if not file.name.startswith(".")}


def _key(fields: Mapping[str, Any], outputs: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return a hash of the manifest's fields that are used, so that one flipped bit is found."""
    return json_sha256({"fields": fields, "outputs": outputs, "results": results})


def _quarantine(path: Path) -> Path:
    """Move a checkpoint to the quarantine folder; return its new path."""
    folder = path.parent / QUARANTINE
    folder.mkdir(exist_ok=True)
    taken = {entry.name for entry in folder.iterdir()}
    names = (f"{path.name}{end}" for end in ("", *(f".{number}" for number in range(2, len(taken) + 3))))
    target = folder / next(name for name in names if name not in taken)
    path.rename(target)
    return target


def required_files(count: int, *, sharded: bool = False) -> frozenset[str]:
    """Return the files that a checkpoint of `count` processes must hold."""
    states = {f"rng_state_{number}.pth" for number in range(count)} if count > 1 else {"rng_state.pth"}
    return REQUIRED | states | {"optimizer.bin" if sharded else "optimizer.pt"}


def seal(training: TrainingRun, progress: Progress) -> Path:
    """Make the folder that the trainer has just written a checkpoint, and remove old ones; return the folder.

    Syncs everything before it writes the manifest. Raises ArtifactError when a file that a resume needs is missing.
    """
    path = training.folder / f"checkpoint-{progress.step}"
    if missing := sorted(
        name
        for name in required_files(distributed.world_size(), sharded=distributed.is_sharded())
        if not (path / name).is_file()
    ):
        raise ArtifactError(f"the trainer saved {path} without {', '.join(missing)}", "a library's doing: report it")
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    shutil.copytree(training.out, path / STAGE_FILES)
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
        sources=training.sources,
    )
    write_json(path / MANIFEST, asdict(manifest))
    for old in by_step(training.folder)[KEPT_CHECKPOINTS:]:
        remove(old)
    return path


def size(path: Path) -> int:
    """Return the size of a checkpoint in bytes."""
    manifest = read_manifest(path)
    return sum(entry["size"] for entry in manifest.outputs.values()) if manifest else 0


def discard_unfinished(training: TrainingRun) -> None:
    """Remove checkpoints without a manifest, to free the disk; sealed ones stay."""
    for path in by_step(training.folder):
        if path.is_dir() and not (path / MANIFEST).exists():
            remove(path)


def require_disk_space(training: TrainingRun, needed: int) -> None:
    """Raise HostError when the disk has no room for a checkpoint of `needed` bytes."""
    for _, free, _ in short_disks([(training.out, needed)]):
        raise HostError(
            f"no room for a checkpoint: {needed / 1e6:,.1f} MB are needed, {free / 1e6:,.1f} MB are free "
            f"in {training.folder.parent}",
            "free some and run again: it resumes from the last checkpoint",
        )
