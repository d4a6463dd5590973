"""Training that is ended goes on as if it had not been: by a signal, a kill, memory, a full disk."""

import contextlib
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import pytest
from support.command import ROOT, Forked, forked
from support.observed import noting
from support.shared import copied, shared
from support.tiny_models import recipe
from support.training import settings

torch = pytest.importorskip("torch")

from tutor.artifacts.disk import write_json
from tutor.artifacts.hashing import file_sha256
from tutor.artifacts.manifest import find_damage, read_manifest, require_stage
from tutor.artifacts.stage_folder import checkpoint_folder, log_folder, writing
from tutor.errors import ArtifactError, HostError
from tutor.machine.capacity import plan_training
from tutor.machine.memory.batching import MicroBatches
from tutor.stages.train import checkpoint
from tutor.stages.train import stage as train
from tutor.stages.train import trainer as cpu_head
from tutor.stages.train.checkpoint_callback import memory_hint

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]

Folders = dict[str, Path]
Actions = dict[int | str, Callable[[], object]]
SETTINGS = {"epochs": 3, "batch_size": 2, "accumulation": 1, "save_steps": 5, "logging_steps": 2, "dropout": 0.1}
"""18 steps, checkpoints at 5, 10, 15 and 18; losses are logged as sums of two steps, which no checkpoint ends at."""


class Terminated(BaseException):
    """What SIGTERM becomes: as the command line's SystemExit, and unlike it no test's success."""


@pytest.fixture(autouse=True)
def sigterm() -> Iterator[None]:
    """SIGTERM as `tutor` has it: an exception."""

    def raise_it(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, raise_it)
    yield
    assert signal.getsignal(signal.SIGTERM) is raise_it
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGTERM, before)


class At(logging.Handler):
    """Does something when a step is logged, after it was computed and before it is saved, or when a line is said."""

    def __init__(self, actions: Actions) -> None:
        super().__init__()
        self.actions = actions
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())
        for key in (getattr(record, "done", -1), record.getMessage()):
            if action := self.actions.pop(key, None):
                action()


def stage(inputs: Folders, folder: Path, at: Actions | None = None, after: Any = None, **changes: Any) -> list[str]:
    """Run the stage as the pipeline does; what it said."""
    wanted = recipe(Path("r.toml"), train=settings(**{**SETTINGS, **changes}).model_dump())
    handler, logger = At(at or {}), logging.getLogger("tutor")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with writing(folder, "train", {}) as (out, results):
            results.update(train.run(wanted, inputs, out, plan_training(wanted, inputs)))
            if after:
                after()
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert not handler.actions
    return handler.said


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
    """All that a stage left, but for how long it took."""
    manifest = require_stage(folder, "train")
    assert find_damage(folder, content=True) == []
    results = {name: value for name, value in manifest.results.items() if "per_second" not in name}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = {name: entry["sha256"] for name, entry in manifest.outputs.items()}
    return {"results": results, "metrics": metrics, "files": files}


@contextlib.contextmanager
def noted() -> Iterator[list[dict[str, Any]]]:
    """The rows of each pass that is trained inside."""
    notes: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_head.Trainer, "compute_loss", noting(cpu_head.Trainer.compute_loss, notes.append))
        yield notes


def by_step(notes: list[dict[str, Any]]) -> dict[int, list[Any]]:
    """The rows of each step, in the order of its passes."""
    found: dict[int, list[Any]] = {}
    for note in notes:
        found.setdefault(note["step"], []).extend(note["rows"])
    return found


@pytest.fixture(scope="module")
def unbroken(inputs: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[int, list[Any]]]:
    """What a run that nothing ends makes, and the rows of its steps."""
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    with noted() as notes:
        stage(inputs, folder)
    assert checkpoints(folder) == []  # nothing is left of them
    return made(folder), by_step(notes)


@pytest.fixture(scope="module")
def whole(unbroken: tuple[dict[str, Any], dict[int, list[Any]]]) -> dict[str, Any]:
    """What a run that nothing ends makes."""
    return unbroken[0]


def test_uninterrupted_run_logs_every_step_once(whole: dict[str, Any]) -> None:
    assert [line["step"] for line in whole["metrics"]] == sorted({1, *range(2, 19, 2), *range(3, 19, 3)})
    assert set(whole["files"]) == {
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
    step: int, kept: list[int], inputs: Folders, tmp_path: Path, whole: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(ZeroDivisionError):
        stage(inputs, folder, {step: fail(ZeroDivisionError())})
    assert not folder.exists()
    assert not folder.with_name("adapter.partial").exists()
    assert checkpoints(folder) == [f"checkpoint-{number}" for number in kept]
    said = stage(inputs, folder)
    assert [line.partition(",")[0] for line in said if line.startswith("resuming")] == [
        f"resuming after step {number} of 18" for number in kept[:1]
    ]
    assert made(folder) == whole
    assert checkpoints(folder) == []


@pytest.mark.parametrize("changes", [{"quantization": "none"}, {"precision": "bf16"}, {"batch_size": 1, "epochs": 1}])
def test_resume_with_each_base_and_precision_makes_equal_files(
    changes: dict[str, Any], inputs: Folders, tmp_path: Path
) -> None:
    stage(inputs, tmp_path / "whole" / "adapter", **changes)
    folder = tmp_path / "adapter"
    with pytest.raises(ZeroDivisionError):
        stage(inputs, folder, {6: fail(ZeroDivisionError())}, **changes)
    assert "resuming after step 5" in " ".join(stage(inputs, folder, **changes))
    assert made(folder) == made(tmp_path / "whole" / "adapter")


def test_finished_unsealed_training_is_not_trained_again(
    inputs: Folders, tmp_path: Path, whole: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(ZeroDivisionError):
        stage(inputs, folder, after=fail(ZeroDivisionError()))
    assert checkpoints(folder) == ["checkpoint-18", "checkpoint-15"]
    said = stage(inputs, folder)
    assert not [line for line in said if line.startswith("step ")]
    assert made(folder) == whole


def test_repeated_resumes_make_the_uninterrupted_files(inputs: Folders, tmp_path: Path, whole: dict[str, Any]) -> None:
    folder = tmp_path / "adapter"
    for step in (6, 12, 16):
        with pytest.raises(ZeroDivisionError):
            stage(inputs, folder, {step: fail(ZeroDivisionError())})
    stage(inputs, folder)
    assert made(folder) == whole


def test_saving_every_few_minutes_does_not_change_the_files(
    inputs: Folders, tmp_path: Path, whole: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    said = stage(inputs, folder, save_steps=500, save_minutes=1e-9)
    assert [line for line in said if line.startswith("checkpoint of")] == [
        f"checkpoint of step {step} saved" for step in range(1, 19)
    ]
    assert made(folder) == whole
    never = stage(inputs, tmp_path / "never", save_steps=500, save_minutes=0)
    assert [line for line in never if line.startswith("checkpoint of")] == ["checkpoint of step 18 saved"]


# Signals


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_signal_ends_step_saves_and_run_resumes_there(
    number: signal.Signals, raised: type[BaseException], inputs: Folders, tmp_path: Path, whole: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(raised):
        stage(inputs, folder, {6: send(number)})
    assert checkpoints(folder) == ["checkpoint-6", "checkpoint-5"]
    assert not folder.with_name("adapter.partial").exists()
    assert "resuming after step 6 of 18" in " ".join(stage(inputs, folder))
    assert made(folder) == whole


def test_signal_during_a_save_ends_with_that_checkpoint(inputs: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(Terminated):
        stage(inputs, folder, {"checkpoint of step 10 saved": send(signal.SIGTERM)})
    assert checkpoints(folder) == ["checkpoint-10", "checkpoint-5"]


@pytest.mark.parametrize("step", [6, 18])
def test_second_signal_ends_training_at_once(step: int, inputs: Folders, tmp_path: Path, whole: dict[str, Any]) -> None:
    def twice() -> None:
        send(signal.SIGTERM)()
        send(signal.SIGINT)()

    folder = tmp_path / "adapter"
    with pytest.raises(KeyboardInterrupt):
        stage(inputs, folder, {step: twice})
    assert checkpoints(folder) == ({6: ["checkpoint-5"], 18: ["checkpoint-15", "checkpoint-10"]}[step])
    stage(inputs, folder)
    assert made(folder) == whole


def test_signal_in_last_step_ends_and_trains_nothing_twice(
    inputs: Folders, tmp_path: Path, whole: dict[str, Any]
) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(Terminated):
        stage(inputs, folder, {18: send(signal.SIGTERM)})
    assert checkpoints(folder)[0] == "checkpoint-18"
    assert not [line for line in stage(inputs, folder) if line.startswith("step ")]
    assert made(folder) == whole


def test_ignored_signal_stays_ignored(inputs: Folders, tmp_path: Path, whole: dict[str, Any]) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stage(inputs, tmp_path / "adapter", {6: send(signal.SIGINT)})
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert made(tmp_path / "adapter") == whole


# Memory and disk


def exhaust_memory() -> None:
    torch.empty(1 << 50)


@pytest.mark.parametrize(
    "happens",
    [exhaust_memory, fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")), fail(MemoryError())],
    ids=["PyTorch's CPU allocator", "CUDA", "Python"],
)
def test_out_of_memory_keeps_checkpoint_and_its_hint_resumes(
    happens: Callable[[], object],
    inputs: Folders,
    tmp_path: Path,
    unbroken: tuple[dict[str, Any], dict[int, list[Any]]],
) -> None:
    whole, rows = unbroken
    folder = tmp_path / "adapter"
    said = r"out of memory in step \d+ of 18; set train.pass_tokens = \d+: the same rows a step"
    with pytest.raises(HostError, match=said) as caught:
        stage(inputs, folder, {6: happens})
    (fewer,) = re.findall(r"pass_tokens = (\d+)", caught.value.hint)
    assert caught.value.code == 4
    assert checkpoints(folder) == ["checkpoint-5"]
    with noted() as notes:
        assert "resuming after step 5 of 18" in " ".join(stage(inputs, folder, pass_tokens=int(fewer)))
    assert len(notes) == 2 * len(by_step(notes))  # half as many rows a pass
    # Other sums of floats, and dropout draws by the batch: not the same bytes, the same rows in the same order.
    assert by_step(notes) == {step: rows[step] for step in range(6, 19)}
    found = made(folder)
    assert [line["step"] for line in found["metrics"]] == [line["step"] for line in whole["metrics"]]
    ours, theirs = found["results"]["held_out"], whole["results"]["held_out"]
    assert ours["loss_after"] == pytest.approx(theirs["loss_after"], rel=0.05)


def test_out_of_memory_with_one_row_does_not_suggest_less(inputs: Folders, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"out of memory in step \d+ of 18; free what other programs"):
        stage(inputs, tmp_path / "adapter", {6: exhaust_memory}, batch_size=1, accumulation=2, packing=False)


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        (MicroBatches(5, 2, 2447, packed=True), "set train.pass_tokens = 1223: the same rows a step"),
        (
            MicroBatches(4, 3, 2000, packed=False),
            "set train.batch_size = 2 and train.accumulation = 6: the same rows a step",
        ),
        (
            MicroBatches(5, 2, 2610, packed=False),
            "set train.batch_size = 1 and train.accumulation = 10: the same rows a ",
        ),
        (MicroBatches(1, 10, 522, packed=False), "free what other programs hold of it"),
    ],
)
def test_memory_hint_keeps_batch_in_smaller_micro_batches(passes: MicroBatches, said: str) -> None:
    assert memory_hint(passes).startswith(said)


@pytest.fixture
def eight_mib(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of eight MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path, left: Callable[[], int]) -> Callable[[], None]:
    """Leave `left()` bytes free."""

    def action() -> None:
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(max(0, free - left())))

    return action


@pytest.mark.parametrize(
    ("more", "said"),
    [(-50_000, r"no room for a checkpoint: 0\.\d MB are needed, 0\.\d MB are free"), (4096, "No space left on device")],
    ids=["seen before it saves", "while it saves"],
)
def test_full_disk_is_host_error_and_keeps_last_checkpoint(
    more: int, said: str, inputs: Folders, eight_mib: Path, whole: dict[str, Any]
) -> None:
    """Files fill whole blocks: room for the bytes of a checkpoint and a block more is not enough for its files."""
    folder = eight_mib / "adapter"
    saved = checkpoint_folder(folder) / "checkpoint-5"
    with pytest.raises(HostError, match=said) as caught:
        stage(inputs, folder, {10: fill(eight_mib, lambda: checkpoint.size(saved) + more)})
    assert caught.value.code == 4
    assert checkpoints(folder) == ["checkpoint-5"]
    assert not (checkpoint_folder(folder) / "quarantine").exists()
    (eight_mib / "filler").unlink()
    assert "resuming after step 5 of 18" in " ".join(stage(inputs, folder))
    assert made(folder) == whole


def test_disk_too_small_for_checkpoint_fails_before_step_one(inputs: Folders, eight_mib: Path) -> None:
    fill(eight_mib, lambda: 1_500_000)()
    with pytest.raises(HostError, match="no room for a checkpoint") as caught:
        stage(inputs, eight_mib / "adapter")
    assert "run again" in str(caught.value)


# What is never loaded


class Evil:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("how", ["without our manifest", "with a forged manifest"])
def test_planted_pickle_is_not_executed(
    name: str, how: str, inputs: Folders, tmp_path: Path, whole: dict[str, Any]
) -> None:
    folder, trace = tmp_path / "adapter", tmp_path / "trace"
    with pytest.raises(ZeroDivisionError):
        stage(inputs, folder, {12: fail(ZeroDivisionError())})
    latest = checkpoint_folder(folder) / "checkpoint-10"
    (latest / name).write_bytes(pickle.dumps(Evil(trace), protocol=2))
    if how == "with a forged manifest":
        manifest = read_manifest(latest)
        assert manifest is not None
        entry = {"size": (latest / name).stat().st_size, "sha256": file_sha256(latest / name)}
        outputs = {**manifest.outputs, name: entry}
        key = checkpoint._key(manifest.fields, outputs, manifest.results)
        write_json(latest / "manifest.json", {**asdict(manifest), "outputs": outputs, "key": key})
        assert checkpoint.first_damage(latest) is None
        with pytest.raises(pickle.UnpicklingError, match="Weights only"):
            stage(inputs, folder)
    else:
        assert "resuming after step 5 of 18" in " ".join(stage(inputs, folder))
        assert made(folder) == whole
    assert not trace.exists()


def test_changed_rows_are_refused_before_model_is_loaded(inputs: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(ZeroDivisionError):
        stage(inputs, folder, {6: fail(ZeroDivisionError())})
    other = Path(shutil.copytree(inputs["data"], tmp_path / "data"))
    lines = (other / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (other / "train.jsonl").write_text("".join(reversed(lines)), "utf-8")
    with pytest.raises(
        ArtifactError, match=r"checkpoint-5 \(of 18 steps\) is of another training: rows\.train: "
    ) as one:
        stage({**inputs, "data": other}, folder)
    assert one.value.code == 5
    assert checkpoints(folder) == ["checkpoint-5"]


# As a user meets it

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
    """A recipe, and what it makes where nobody interrupts it."""

    def make(folder: Path) -> None:
        (folder / "r.toml").write_text(RECIPE.format(root=ROOT), "utf-8")
        done = command("run", folder, folder / "said").finish()
        assert done.returncode == 0, done.stderr

    return shared(tmp_path_factory, "user", make)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_command_resumes_after_a_signal(number: signal.Signals, code: int, user: Path, tmp_path: Path) -> None:
    folder = copied(user, tmp_path / "user")
    build = folder / "build" / "r"
    wanted = (build / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(build / "adapter")
    shutil.rmtree(log_folder(build / "adapter"))
    if number == signal.SIGKILL:  # nothing is saved at it: what was, by steps, has to do
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
