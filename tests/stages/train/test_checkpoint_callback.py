"""stages/train/checkpoint_callback.py: an interrupted and resumed training makes the uninterrupted one's files."""

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.processes.command import ROOT, Forked, forked
from support.shared import copied, shared

torch = pytest.importorskip("torch")
from support.processes.interrupted import Folders, Terminated, checkpoints, fail, made, send, stage

from tutor.artifacts.manifest import require_stage
from tutor.artifacts.stage_folder import log_folder
from tutor.machine.matmul_rate import MatmulRates
from tutor.stages.train import checkpoint_callback
from tutor.stages.train.checkpoint import TrainingRun
from tutor.stages.train.checkpoint_callback import LAUNCHER_SECONDS, saving

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.usefixtures("one_thread", "sigterm"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]


def test_uninterrupted_run_logs_every_step_once(files: dict[str, Any]) -> None:
    assert [line["step"] for line in files["metrics"]] == sorted({1, *range(2, 19, 2), *range(3, 19, 3)})
    assert set(files["files"]) == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "metrics.jsonl",
        "training.svg",
    }


@pytest.mark.parametrize(
    ("step", "kept"),
    [(4, []), (6, [5]), (12, [10, 5]), (18, [15, 10])],
    ids=["before any checkpoint", "in the first epoch", "where an epoch ends", "before the last is saved"],
)
def test_interrupted_run_makes_the_uninterrupted_files(
    step: int, kept: list[int], inputs: Folders, tmp_path: Path, files: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(ZeroDivisionError):
        stage(inputs, folder, {step: fail(ZeroDivisionError())})
    assert not folder.exists()
    assert not folder.with_name("adapter.partial").exists()
    assert checkpoints(folder) == [f"checkpoint-{number}" for number in kept]
    lines = stage(inputs, folder)
    assert [line.partition(",")[0] for line in lines if line.startswith("resuming")] == [
        f"resuming after step {number} of 18" for number in kept[:1]
    ]
    assert made(folder) == files
    assert checkpoints(folder) == []


@pytest.mark.parametrize("changes", [{"quantization": "none"}, {"precision": "bf16"}, {"batch_size": 1, "epochs": 1}])
def test_resume_with_each_base_and_precision_makes_equal_files(
    changes: dict[str, Any], inputs: Folders, tmp_path: Path
) -> None:
    stage(inputs, tmp_path / "files" / "adapter", **changes)
    folder = tmp_path / "adapter"
    with pytest.raises(ZeroDivisionError):
        stage(inputs, folder, {6: fail(ZeroDivisionError())}, **changes)
    assert "resuming after step 5" in " ".join(stage(inputs, folder, **changes))
    assert made(folder) == made(tmp_path / "files" / "adapter")


def test_resume_keeps_the_precision_when_the_rates_change(
    inputs: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU's capability decides")
    folder = tmp_path / "adapter"
    rates = iter([MatmulRates(9e11, 2e11), MatmulRates(2e11, 9e11)])
    monkeypatch.setattr("tutor.machine.device.find_rates", lambda *_: next(rates))
    with pytest.raises(ZeroDivisionError):
        stage(inputs, folder, {6: fail(ZeroDivisionError())})
    assert "resuming after step 5" in " ".join(stage(inputs, folder))
    results = require_stage(folder, "train").results
    assert (results["precision"], results["precision_reason"]) == ("bf16", "checkpoint")


def test_finished_unsealed_training_is_not_trained_again(
    inputs: Folders, tmp_path: Path, files: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(ZeroDivisionError):
        stage(inputs, folder, after=fail(ZeroDivisionError()))
    assert checkpoints(folder) == ["checkpoint-18", "checkpoint-15"]
    lines = stage(inputs, folder)
    assert not [line for line in lines if line.startswith("step ")]
    assert made(folder) == files


def test_repeated_resumes_make_the_uninterrupted_files(inputs: Folders, tmp_path: Path, files: dict[str, Any]) -> None:
    folder = tmp_path / "adapter"
    for step in (6, 12, 16):
        with pytest.raises(ZeroDivisionError):
            stage(inputs, folder, {step: fail(ZeroDivisionError())})
    stage(inputs, folder)
    assert made(folder) == files


def test_saving_every_few_minutes_does_not_change_the_files(
    inputs: Folders, tmp_path: Path, files: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    lines = stage(inputs, folder, save_steps=500, save_minutes=1e-9)
    assert [line for line in lines if line.startswith("checkpoint of")] == [
        f"checkpoint of step {step} saved" for step in range(1, 19)
    ]
    assert made(folder) == files
    never = stage(inputs, tmp_path / "never", save_steps=500, save_minutes=0)
    assert [line for line in never if line.startswith("checkpoint of")] == ["checkpoint of step 18 saved"]


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGTERM, Terminated), (signal.SIGHUP, Terminated), (signal.SIGINT, KeyboardInterrupt)],
)
def test_signal_ends_step_saves_and_run_resumes_there(
    number: signal.Signals, raised: type[BaseException], inputs: Folders, tmp_path: Path, files: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(raised):
        stage(inputs, folder, {6: send(number)})
    assert checkpoints(folder) == ["checkpoint-6", "checkpoint-5"]
    assert not folder.with_name("adapter.partial").exists()
    assert "resuming after step 6 of 18" in " ".join(stage(inputs, folder))
    assert made(folder) == files


def test_signal_during_a_save_ends_with_that_checkpoint(inputs: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(Terminated):
        stage(inputs, folder, {"checkpoint of step 10 saved": send(signal.SIGTERM)})
    assert checkpoints(folder) == ["checkpoint-10", "checkpoint-5"]


@pytest.mark.parametrize("step", [6, 18])
def test_second_signal_ends_training_at_once(step: int, inputs: Folders, tmp_path: Path, files: dict[str, Any]) -> None:
    def twice() -> None:
        send(signal.SIGTERM)()
        send(signal.SIGINT)()

    folder = tmp_path / "adapter"
    with pytest.raises(KeyboardInterrupt):
        stage(inputs, folder, {step: twice})
    assert checkpoints(folder) == ({6: ["checkpoint-5"], 18: ["checkpoint-15", "checkpoint-10"]}[step])
    stage(inputs, folder)
    assert made(folder) == files


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_hangup_as_second_signal_keeps_the_checkpoint(first: signal.Signals, inputs: Folders, tmp_path: Path) -> None:
    """A closed terminal sends SIGHUP twice, the end of a login session SIGTERM and then SIGHUP."""

    def twice() -> None:
        send(first)()
        send(signal.SIGHUP)()

    folder = tmp_path / "adapter"
    with pytest.raises(Terminated):
        stage(inputs, folder, {6: twice})
    assert checkpoints(folder) == ["checkpoint-6", "checkpoint-5"]


@pytest.mark.parametrize("seconds", [0, LAUNCHER_SECONDS])
def test_signal_that_a_launcher_repeats_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """At a terminal Ctrl-C goes to all ranks and to the launcher, which sends it to the ranks again."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(checkpoint_callback, "time", SimpleNamespace(monotonic=lambda: clock.now))
    state = SimpleNamespace(global_step=5, max_steps=18)
    trainer = SimpleNamespace(model=torch.nn.Linear(1, 1), add_callback=lambda _: None, state=state)
    reached = []

    def ctrl_c_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        clock.now += seconds
        signal.raise_signal(signal.SIGINT)
        reached.append("the end of the step")

    with pytest.raises(KeyboardInterrupt), saving(trainer, TrainingRun(tmp_path, {}), None, 0, ""):
        ctrl_c_twice()
    assert bool(reached) == (seconds == 0)


def test_signal_in_last_step_ends_and_trains_nothing_twice(
    inputs: Folders, tmp_path: Path, files: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(Terminated):
        stage(inputs, folder, {18: send(signal.SIGTERM)})
    assert checkpoints(folder)[0] == "checkpoint-18"
    assert not [line for line in stage(inputs, folder) if line.startswith("step ")]
    assert made(folder) == files


def test_ignored_signal_stays_ignored(inputs: Folders, tmp_path: Path, files: dict[str, Any]) -> None:
    ignored = (signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    try:
        stage(inputs, tmp_path / "adapter", {6: send(signal.SIGINT), 7: send(signal.SIGHUP)})
        assert {signal.getsignal(number) for number in ignored} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert made(tmp_path / "adapter") == files


# --- as a command ----------------------------------------------------------------------------------------------------

RECIPE = """
seed = 7
[data]
train = "{root}/data/tutor.jsonl"
eval = "{root}/data/eval.jsonl"
rows = 24
[base]
source = "tiny"
[train]
epochs = 5
batch_size = 2
accumulation = 2
max_length = 2048
logging_steps = 1
"""


def command(name: str, folder: Path, scratch: Path) -> Forked:
    until = ["--until", "train"] if name == "run" else []
    return forked(name, "--recipe", folder / "r.toml", "--build", folder / "build", *until, scratch=scratch)


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe and the build folder of an uninterrupted run."""

    def make(folder: Path) -> None:
        (folder / "r.toml").write_text(RECIPE.format(root=ROOT), "utf-8")
        done = command("run", folder, folder / "output").finish()
        assert done.returncode == 0, done.stderr

    return shared(tmp_path_factory, "user", make)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_command_resumes_after_a_signal(number: signal.Signals, code: int, user: Path, tmp_path: Path) -> None:
    folder = copied(user, tmp_path / "user")
    build = folder / "build" / "r"
    wanted = (build / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(build / "adapter")
    shutil.rmtree(log_folder(build / "adapter"))
    if number == signal.SIGKILL:  # it cannot save: the run resumes from a checkpoint by steps
        with (folder / "r.toml").open("a") as text:
            text.write("save_steps = 3\n")
    process = command("train", folder, tmp_path / "ended")
    metrics = build / "adapter.log" / "metrics.jsonl"
    process.wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 8)
    process.send_signal(number)
    done = process.finish()
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Error" not in done.stderr
    if number != signal.SIGKILL:
        assert f"{number.name}: ending this step and saving a checkpoint; a second one ends at once" in done.stderr
        assert "run the same command again to resume" in done.stderr
        assert not (build / "adapter.partial").exists()
    assert not (build / "adapter").exists()
    again = command("train", folder, tmp_path / "again").finish()
    assert again.returncode == 0, again.stderr
    assert "resuming after step" in again.stderr
    assert (build / "adapter" / "adapter_model.safetensors").read_bytes() == wanted
    assert sorted(path.name for path in build.iterdir() if path.name.startswith("adapter")) == [
        "adapter",
        "adapter.log",
    ]
