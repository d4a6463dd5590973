"""Faults during a training: memory and disk that run out, planted pickles, changed rows; and the resume afterwards.

Covers stages/train/checkpoint_callback.py, with test_checkpoint_callback.py.
"""

import itertools
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from support.processes.interrupted import Folders, by_step, checkpoints, fail, made, noted, stage
from support.processes.small_disk import small_disk

from tutor.artifacts.disk import write_json
from tutor.artifacts.hashing import file_sha256
from tutor.artifacts.manifest import read_manifest
from tutor.artifacts.stage_folder import checkpoint_folder
from tutor.errors import ArtifactError, HostError
from tutor.machine.memory.batching import MicroBatches
from tutor.machine.watchdog import Watchdog
from tutor.stages.train import checkpoint, loop, monitor
from tutor.stages.train.checkpoint_callback import gpu_fault, memory_hint

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.usefixtures("one_thread", "sigterm"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]


# --- memory and disk -------------------------------------------------------------------------------------------------


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
    uninterrupted: tuple[dict[str, Any], dict[int, list[Any]]],
) -> None:
    files, rows = uninterrupted
    folder = tmp_path / "adapter"
    expected = r"out of memory in step \d+ of 18; set train.pass_tokens = \d+: the same rows a step"
    with pytest.raises(HostError, match=expected) as caught:
        stage(inputs, folder, {6: happens})
    (fewer,) = re.findall(r"pass_tokens = (\d+)", caught.value.hint)
    assert caught.value.code == 4
    assert checkpoints(folder) == ["checkpoint-5"]
    with noted() as notes:
        assert "resuming after step 5 of 18" in " ".join(stage(inputs, folder, pass_tokens=int(fewer)))
    assert len(notes) == 2 * len(by_step(notes))  # half as many rows per micro-batch
    # Sums and dropout depend on the micro-batches, so the bytes differ; the rows and their order do not.
    assert by_step(notes) == {step: rows[step] for step in range(6, 19)}
    found = made(folder)
    assert [line["step"] for line in found["metrics"]] == [line["step"] for line in files["metrics"]]
    ours, theirs = found["results"]["held_out"], files["results"]["held_out"]
    assert ours["loss_after"] == pytest.approx(theirs["loss_after"], rel=0.05)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be",
            "uncorrectable ECC error encoun",
        ),
        ("CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure'", "unspecified launch failure"),
        ("CUDA error: the launch timed out and was terminated", "the launch timed out"),
        ("CUDA error: unknown error", "unknown error"),
        ("CUDA error: device-side assert triggered", None),
        ("shape mismatch", None),
    ],
)
def test_failed_gpu_is_host_error_and_other_errors_are_bugs(message: str, reason: str | None) -> None:
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=5, max_steps=18))
    fault = gpu_fault(RuntimeError(message), trainer)
    if reason is None:
        assert fault is None
    else:
        assert fault is not None
        assert fault.code == 4
        assert fault.message.startswith(f"the GPU failed in step 6 of 18: {reason}")
        assert "\n" not in fault.message


def test_failed_gpu_keeps_the_last_checkpoint(inputs: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(HostError, match=r"the GPU failed in step \d+ of 18: unknown error; see nvidia-smi and dmesg"):
        stage(inputs, folder, {6: fail(RuntimeError("CUDA error: unknown error"))})
    assert checkpoints(folder) == ["checkpoint-5"]


def test_out_of_memory_with_one_row_does_not_suggest_less(inputs: Folders, tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"out of memory in step \d+ of 18; free what other programs"):
        stage(inputs, tmp_path / "adapter", {6: exhaust_memory}, batch_size=1, accumulation=2, packing=False)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        (MicroBatches(5, 2, 2447, packed=True), "set train.pass_tokens = 1223: the same rows a step"),
        (
            MicroBatches(4, 3, 2000, packed=False),
            "set train.batch_size = 2 and train.accumulation = 6: the same rows a step",
        ),
        (
            MicroBatches(2, 3, 2000, packed=False, world_size=2),
            "set train.batch_size = 1 and train.accumulation = 12: the same rows a step",
        ),
        (
            MicroBatches(5, 2, 2610, packed=False),
            "set train.batch_size = 1 and train.accumulation = 10: the same rows a ",
        ),
        (MicroBatches(1, 10, 522, packed=False), "free what other programs hold of it"),
    ],
)
def test_memory_hint_keeps_batch_in_smaller_micro_batches(batches: MicroBatches, expected: str) -> None:
    assert memory_hint(batches).startswith(expected)


# --- steps that hang -------------------------------------------------------------------------------------------------


def test_only_the_steps_are_watched(inputs: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations and saves, which take long, are between the end of a step and the begin of the next."""
    events: list[str] = []
    for name in ("begin", "end"):
        monkeypatch.setattr(Watchdog, name, lambda _, name=name: events.append(name))
    evaluate = monitor.Monitor._evaluate
    monkeypatch.setattr(monitor.Monitor, "_evaluate", noted_call(evaluate, events, "evaluate"))
    monkeypatch.setattr(checkpoint, "seal", noted_call(checkpoint.seal, events, "save"))
    stage(inputs, tmp_path / "adapter")
    assert events.count("begin") == events.count("end") == 18
    assert {"evaluate", "save"} < {*events}
    for before, event in itertools.pairwise(events):
        assert (event == "end") == (before == "begin")


def noted_call(plain: Callable[..., Any], events: list[str], event: str) -> Callable[..., Any]:
    """Return a function that notes an event, and does what `plain` does."""

    def call(*given: Any) -> Any:
        events.append(event)
        return plain(*given)

    return call


def test_hanging_step_is_named_with_its_checkpoint(inputs: Folders, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    with pytest.raises(ZeroDivisionError):
        stage(inputs, folder, {6: fail(ZeroDivisionError())})
    state, place = SimpleNamespace(global_step=5, max_steps=18), str(checkpoint_folder(folder))
    hangs = loop.hanging_step(
        SimpleNamespace(state=state, args=SimpleNamespace(output_dir=place, use_cpu=False)), 612, 2
    )
    assert (hangs.code, hangs.stage) == (4, "train")
    assert str(hangs) == (
        "step 6 of 18 hangs: it has taken 612 s, steps before it 2.0 s; see nvidia-smi and dmesg (Xid, ECC), "
        "then run again: it resumes after step 5"
    )
    shutil.rmtree(place)
    hangs = loop.hanging_step(
        SimpleNamespace(state=state, args=SimpleNamespace(output_dir=place, use_cpu=True)), 612, 2
    )
    assert "the machine's memory, then run again: it resumes from the beginning" in str(hangs)


@pytest.fixture
def eight_mib(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of eight MiB."""
    with small_disk(tmp_path / "disk", "size=8m") as folder:
        yield folder


def fill(disk: Path, left: Callable[[], int]) -> Callable[[], None]:
    """Return an action that fills the disk up to `left()` free bytes."""

    def action() -> None:
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(max(0, free - left())))

    return action


@pytest.mark.parametrize(
    ("more", "expected"),
    [(-50_000, r"no room for a checkpoint: 0\.\d MB are needed, 0\.\d MB are free"), (4096, "No space left on device")],
    ids=["seen before it saves", "while it saves"],
)
def test_full_disk_is_host_error_and_keeps_last_checkpoint(
    more: int, expected: str, inputs: Folders, eight_mib: Path, files: dict[str, Any]
) -> None:
    """Files occupy full blocks: the bytes of a checkpoint and one block more are not enough for its files."""
    folder = eight_mib / "adapter"
    saved = checkpoint_folder(folder) / "checkpoint-5"
    with pytest.raises(HostError, match=expected) as caught:
        stage(inputs, folder, {10: fill(eight_mib, lambda: checkpoint.size(saved) + more)})
    assert caught.value.code == 4
    assert checkpoints(folder) == ["checkpoint-5"]
    assert not (checkpoint_folder(folder) / "quarantine").exists()
    (eight_mib / "filler").unlink()
    assert "resuming after step 5 of 18" in " ".join(stage(inputs, folder))
    assert made(folder) == files


def test_disk_too_small_for_checkpoint_fails_before_step_one(inputs: Folders, eight_mib: Path) -> None:
    fill(eight_mib, lambda: 1_500_000)()
    with pytest.raises(HostError, match="no room for a checkpoint") as caught:
        stage(inputs, eight_mib / "adapter")
    assert "run again" in str(caught.value)


# --- refused before it is loaded -------------------------------------------------------------------------------------


class Evil:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("optimizer.pt", "without our manifest"),
        *((name, "with a forged manifest") for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")),
    ],
)
def test_planted_pickle_is_not_executed(
    name: str, how: str, inputs: Folders, tmp_path: Path, files: dict[str, Any]
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
        assert made(folder) == files
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
