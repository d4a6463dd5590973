"""Trackers of transformers (stages/train/metrics.py): a fake trackio gets the losses, and is named when it fails."""

import contextlib
import importlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from tutor.errors import ServiceError
from tutor.pipeline.registry import BY_NAME
from tutor.prompt.encoding import Encoded
from tutor.recipe.settings import Recipe
from tutor.stages.train.loop import fit
from tutor.stages.train.monitor import MonitorSettings

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]

FAKE = """
import contextvars, json, pathlib, sys, types

__version__ = "99"
config, logged = {}, pathlib.Path(__file__).with_name("logged.jsonl")
names = ("current_space_id", "current_run", "current_project")
context_vars = types.SimpleNamespace(**{name: contextvars.ContextVar(name, default=None) for name in names})

def init(**settings):
    if STAGE == "init":
        sys.exit("no API key\\nis configured")
    note({"init": settings["name"]})

def log(values):
    if STAGE == "log" and values["train/global_step"] == 2:
        raise ConnectionError("the server is gone")
    note(values)

def finish():
    note({"finish": True})

def note(values):
    with logged.open("a") as file:
        file.write(json.dumps(values) + "\\n")
"""


@pytest.fixture
def trained(
    trainer_of: Callable[..., Any], rows: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Function that trains three steps with a trackio that fails at a stage, and returns what it got."""

    def train(stage: str) -> list[dict[str, Any]]:
        (tmp_path / "trackio.py").write_text(f"STAGE = {stage!r}\n{FAKE}", "utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        trainer = trainer_of(rows)
        trainer.args.run_name = "mine"
        settings = MonitorSettings(
            rows=12, tokens=480, evaluations=1, patience=0, report_every=1, loss_before=8.0, skips_overflow=False,
            trackers=("trackio",),
        )  # fmt: skip
        fit(trainer, settings, rows[:1], tmp_path / "log", contextlib.nullcontext())
        return [json.loads(line) for line in (tmp_path / "logged.jsonl").read_text().splitlines()]

    yield train
    sys.modules.pop("trackio", None)


def test_tracker_gets_every_loss_and_the_held_out_one(trained: Callable[[str], list[dict[str, Any]]]) -> None:
    first, *steps, _, last = trained("")
    assert (first, last) == ({"init": "mine"}, {"finish": True})
    assert [step["train/global_step"] for step in steps] == [1, 2, 3]
    assert all(isinstance(step["train/loss"], float) for step in steps)
    assert [step.get("train/held_out_loss") is not None for step in steps] == [False, False, True]


def test_tracker_that_cannot_begin_is_named(trained: Callable[[str], list[dict[str, Any]]]) -> None:
    with pytest.raises(
        ServiceError, match=r"trackio cannot record this training: no API key is configured; .*report_to"
    ):
        trained("init")


def test_tracker_that_fails_later_does_not_end_the_training(
    trained: Callable[[str], list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(trained("log")) == 2  # init and the first step
    assert [record.message for record in caplog.records if "trackio" in record.message] == [
        "trackio failed and gets no more reports: the server is gone"
    ]


def test_trackers_do_not_make_a_training_stale() -> None:
    recipe = Recipe()
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"report_to": ["wandb"]})})
    assert BY_NAME["train"].recipe_fields(other) == BY_NAME["train"].recipe_fields(recipe)
