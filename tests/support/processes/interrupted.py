"""Run the train stage with an action at a step: a signal, an error, a full disk.

In: stage folders, actions by step or log line. Out: the stage's files and log lines, the rows of each step.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from support.models.tiny_models import recipe
from support.models.training import settings
from support.processes.observed import noting

torch = pytest.importorskip("torch")
from tutor.artifacts.manifest import find_damage, require_stage
from tutor.artifacts.stage_folder import checkpoint_folder, writing
from tutor.machine.capacity import plan_training
from tutor.stages.train import checkpoint, trainer
from tutor.stages.train import stage as train

Folders = dict[str, Path]


Actions = dict[int | str, Callable[[], object]]


SETTINGS = {"epochs": 3, "batch_size": 2, "accumulation": 1, "save_steps": 5, "logging_steps": 2, "dropout": 0.1}
"""Settings of 18 steps with checkpoints at 5, 10, 15 and 18. A logged loss is the sum of two steps; no checkpoint
except the last is at the end of such a sum."""


class Terminated(BaseException):
    """Raised for SIGTERM, like SystemExit by the command line; unlike SystemExit, it fails a test that ignores it."""


class ActionHandler(logging.Handler):
    """Runs actions when a step is logged (after it was computed, before it is saved) or when a line is logged."""

    def __init__(self, actions: Actions) -> None:
        super().__init__()
        self.actions = actions
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        for key in (getattr(record, "done", -1), record.getMessage()):
            if action := self.actions.pop(key, None):
                action()


def stage(inputs: Folders, folder: Path, at: Actions | None = None, after: Any = None, **changes: Any) -> list[str]:
    """Run the stage as the pipeline does; return its log lines."""
    wanted = recipe(Path("r.toml"), train=settings(**{**SETTINGS, **changes}).model_dump())
    handler, logger = ActionHandler(at or {}), logging.getLogger("tutor")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with writing(folder, "train", {}) as (out, results):
            plan = plan_training(wanted, inputs, checkpoint.saved_precision(checkpoint_folder(folder)))
            results.update(train.run(wanted, inputs, out, plan))
            if after:
                after()
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert not handler.actions
    return handler.lines


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail(error: BaseException) -> Callable[[], NoReturn]:
    def action() -> NoReturn:
        raise error

    return action


def checkpoints(folder: Path) -> list[str]:
    place = checkpoint_folder(folder)
    return [path.name for path in checkpoint.by_step(place)] if place.exists() else []


def made(folder: Path) -> dict[str, Any]:
    """Return the results, metrics and hashes of a stage folder, without times and the reason of the precision."""
    manifest = require_stage(folder, "train")
    assert find_damage(folder, content=True) == []
    measured = ("per_second", "precision_reason", "matmul_gflops")
    results = {name: value for name, value in manifest.results.items() if not name.endswith(measured)}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = {name: entry["sha256"] for name, entry in manifest.outputs.items()}
    return {"results": results, "metrics": metrics, "files": files}


@contextlib.contextmanager
def noted() -> Iterator[list[dict[str, Any]]]:
    """Record the rows of each micro-batch that is trained inside."""
    notes: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "compute_loss", noting(trainer.Trainer.compute_loss, notes.append))
        yield notes


def by_step(notes: list[dict[str, Any]]) -> dict[int, list[Any]]:
    """Return the rows of each step, in the order of its micro-batches."""
    found: dict[int, list[Any]] = {}
    for note in notes:
        found.setdefault(note["step"], []).extend(note["rows"])
    return found
