"""stages/train/monitor.py: evaluations, the best adapter, early stop, reports; none of it changes the training."""

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from support.models.training import ROWS, history, settings
from transformers import PrinterCallback, TrainerCallback

from tutor.artifacts.stage_folder import log_folder
from tutor.engines.hf.loading import load_base
from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import load_tokenizer
from tutor.machine.memory.batching import split_step
from tutor.prompt.encoding import RowEncoder
from tutor.stages.train import monitor
from tutor.stages.train.audit import encode_rows
from tutor.stages.train.monitor import DIVERGENCE_STEPS, MAX_SKIPPED_STEPS, Monitor, MonitorSettings
from tutor.stages.train.trainer import lora_config, make_trainer, training_arguments

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing"),
]


def monitor_settings(**changes: Any) -> MonitorSettings:
    plain = {
        "rows": 12, "tokens": 480, "evaluations": 0, "patience": 0, "report_every": 1, "loss_before": 8.0,
        "skips_overflow": False,
    }  # fmt: skip
    return MonitorSettings(**{**plain, **changes})


# --- decisions -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 40))
def test_evaluation_steps_are_even_and_include_the_last_step(steps: int, evaluations: int) -> None:
    found = sorted(monitor.evaluation_steps(steps, evaluations))
    assert found[-1] == steps
    assert found[0] >= 1
    assert len(found) == min(steps, evaluations)
    gaps = {after - before for before, after in zip([0, *found], found, strict=False)}
    assert max(gaps) - min(gaps) <= 1


def test_evaluation_steps_of_zero_evaluations_are_empty() -> None:
    assert monitor.evaluation_steps(10, 0) == frozenset()
    assert monitor.best_evaluation(history([1.0])) is None
    assert monitor.evaluations_since_best(history([1.0])) == 0


def test_best_evaluation_of_equal_losses_is_the_first() -> None:
    found = history([9.0] * 8, at2=3.0, at4=2.0, at6=2.0, at8=2.5)
    assert monitor.best_evaluation(found) == (4, 2.0)
    assert monitor.evaluations_since_best(found) == 2
    assert monitor.evaluations_since_best(found[:4]) == 0


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_nan_or_infinite_loss_raises_error(loss: float) -> None:
    with pytest.raises(ArtifactError, match=rf"the loss is {loss} at step 3; lower train.learning_rate") as caught:
        monitor.raise_on_failure(history([2.0, 2.0, loss]), 2.0)
    assert caught.value.code == 5


def test_high_loss_for_20_steps_is_divergence_a_shorter_is_not() -> None:
    monitor.raise_on_failure(history([2.0, *[9.0] * (DIVERGENCE_STEPS - 1)]), 2.0)
    monitor.raise_on_failure(history([*[9.0] * (DIVERGENCE_STEPS - 1), 2.9, *[9.0] * (DIVERGENCE_STEPS - 1)]), 2.0)
    monitor.raise_on_failure(history([2.9] * 500), 2.0)
    with pytest.raises(
        ArtifactError, match=r"diverged: the loss has been above 3\.00 for 20 steps to step 21"
    ) as caught:
        monitor.raise_on_failure(history([2.0, *[9.0] * DIVERGENCE_STEPS]), 2.0)
    assert "learning_rate" in str(caught.value)
    assert caught.value.code == 5


def test_skipped_fp16_steps_raise_error_only_if_30_in_a_row() -> None:
    monitor.raise_on_failure(history([2.0, *[None] * (MAX_SKIPPED_STEPS - 1)]), 2.0)
    monitor.raise_on_failure(history([*[9.0] * (DIVERGENCE_STEPS - 1), None, *[9.0] * (DIVERGENCE_STEPS - 1)]), 2.0)
    with pytest.raises(ArtifactError, match="no gradient was a number in the 30 steps to step 31"):
        monitor.raise_on_failure(history([2.0, *[None] * MAX_SKIPPED_STEPS]), 2.0)


# --- reports ---------------------------------------------------------------------------------------------------------


def test_report_lines_have_first_last_nth_and_evaluated_steps() -> None:
    found = history([8.0, 6.0, 4.0, 2.0, 1.0, None, 3.0, 5.0], at3=1.5, at6=1.0, at8=1.2)
    lines = monitor.report_lines(found, 8, monitor_settings(evaluations=3, report_every=4))
    assert [line["step"] for line in lines] == [1, 3, 4, 6, 8]
    assert [line["loss"] for line in lines] == [8.0, 5.0, 2.0, 1.0, 4.0]  # means since the previous report
    assert [line.get("held_out_loss") for line in lines] == [None, 1.5, None, 1.0, 1.2]
    assert lines[1]["held_out_perplexity"] == pytest.approx(math.exp(1.5))
    assert lines[0]["perplexity"] == pytest.approx(math.exp(8))
    json.dumps(monitor.report_lines(history([None, 900.0]), 2, monitor_settings()), allow_nan=False)


# --- in a trainer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(tiny)


@pytest.fixture
def trainer_of(tiny: Path, tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Function that makes a trainer of twelve rows, two per step, two epochs: twelve steps."""

    def make(**changes: Any) -> Any:
        chosen = settings(epochs=2, batch_size=2, accumulation=1, dropout=0.1, **changes)
        torch.manual_seed(1)
        rows = encode_rows(RowEncoder(tokenizer), ROWS, 1024)
        arguments = training_arguments(
            chosen, "fp32", 1, tmp_path / "checkpoints", split_step(chosen, [len(row.ids) for row in rows])
        )
        trainer = make_trainer(load_base(tiny, "none", "fp32"), tokenizer, rows, lora_config(chosen), arguments)
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make


class Copies(TrainerCallback):  # type: ignore[misc]
    """Records the adapter after each step."""

    def __init__(self) -> None:
        self.taken: dict[int, dict[str, Any]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.taken[state.global_step] = adapter(kwargs["model"])


def adapter(model: Any) -> dict[str, Any]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def watched(trainer: Any, folder: Path, scores: Sequence[float] = (), **changes: Any) -> tuple[Monitor, Copies]:
    """Train with a monitor that gets the given held-out losses."""
    losses: Iterator[float] = iter(scores)
    monitoring = Monitor(folder, monitor_settings(evaluations=len(scores), **changes), lambda: next(losses))
    copies = Copies()
    trainer.add_callback(copies)
    trainer.add_callback(monitoring)
    torch.manual_seed(2)
    try:
        trainer.train()
    finally:
        monitoring.close()
    return monitoring, copies


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("step", [0, 2])
def test_log_continues_after_a_cut_line_and_keeps_other_files(tmp_path: Path, step: int) -> None:
    """A kill can cut the last line; a user can keep notes beside the logs."""
    log = tmp_path / "adapter.log"
    (log / "tensorboard").mkdir(parents=True)
    (log / "tensorboard" / "events.out.tfevents.1").touch()
    (log / "notes.txt").write_text("mine", "utf-8")
    (log / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"step": 3}\n{"step": 2, "lo', "utf-8")
    state = SimpleNamespace(global_step=step, epoch=1.0, max_steps=4)
    watching = Monitor(log, monitor_settings(), lambda: 0.0)
    watching.on_train_begin(SimpleNamespace(output_dir=tmp_path), state, None)
    watching.close()
    assert lines_of(log) == ([{"step": 1}] if step else [])
    assert (log / "notes.txt").read_text("utf-8") == "mine"
    assert (log / "tensorboard" / "events.out.tfevents.1").exists() == bool(step)


@pytest.mark.pipeline
def test_best_adapter_is_restored_when_last_is_worse(trainer_of: Any, tmp_path: Path) -> None:
    trainer = trainer_of()
    monitoring, copies = watched(trainer, tmp_path / "log", [3.0, 1.0, 1.0, 2.0])
    assert not monitoring.stopped
    last = adapter(trainer.model)
    kept = monitor.restore_best(trainer.model, tmp_path / "checkpoints", trainer.state.log_history)
    assert kept == 6
    assert same(adapter(trainer.model), copies.taken[6])
    assert not same(adapter(trainer.model), last)


@pytest.mark.pipeline
def test_last_adapter_is_kept_when_it_is_the_best(trainer_of: Any, tmp_path: Path) -> None:
    trainer = trainer_of()
    _, copies = watched(trainer, tmp_path / "log", [3.0, 1.0])
    assert monitor.restore_best(trainer.model, tmp_path / "checkpoints", trainer.state.log_history) == 12
    assert same(adapter(trainer.model), copies.taken[12])


@pytest.mark.pipeline
def test_missing_best_adapter_is_logged_and_last_is_kept(
    trainer_of: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of()
    watched(trainer, tmp_path / "log", [1.0, 3.0])
    (tmp_path / "checkpoints" / monitor.BEST).unlink()
    before = adapter(trainer.model)
    assert monitor.restore_best(trainer.model, tmp_path / "checkpoints", trainer.state.log_history) == 12
    assert same(adapter(trainer.model), before)
    assert "is missing" in caplog.text


@pytest.mark.pipeline
def test_patience_stops_training_without_improvement(trainer_of: Any, tmp_path: Path) -> None:
    trainer = trainer_of()
    monitoring, _ = watched(trainer, tmp_path / "log", [3.0, 1.0, 1.5, 1.2, 0.1, 0.0], patience=2)
    assert monitoring.stopped
    assert trainer.state.global_step == 8
    assert monitor.restore_best(trainer.model, tmp_path / "checkpoints", trainer.state.log_history) == 4


@pytest.mark.pipeline
def test_zero_patience_trains_all_epochs(trainer_of: Any, tmp_path: Path) -> None:
    trainer = trainer_of()
    monitoring, _ = watched(trainer, tmp_path / "log", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (monitoring.stopped, trainer.state.global_step) == (False, 12)


@pytest.mark.pipeline
def test_evaluations_do_not_change_the_training(trainer_of: Any, tmp_path: Path, tokenizer: Any) -> None:
    from tutor.stages.train.held_out_loss import mean_loss

    rows = encode_rows(RowEncoder(tokenizer), ROWS[:2], 1024)
    adapters = []
    for evaluations in (0, 6):
        trainer = trainer_of()
        monitoring = Monitor(
            tmp_path / "log", monitor_settings(evaluations=evaluations), lambda it=trainer: mean_loss(it.model, rows)
        )
        trainer.add_callback(monitoring)
        torch.manual_seed(2)
        trainer.train()
        monitoring.close()
        adapters.append(adapter(trainer.model))
    assert same(*adapters)


@pytest.mark.pipeline
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_training_with_nan_or_infinite_loss_stops_at_once(loss: float, trainer_of: Any, tmp_path: Path) -> None:
    trainer = trainer_of()
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[0].fill_(loss)
    with pytest.raises(ArtifactError, match=r"the loss is (nan|inf) at step 1; lower train.learning_rate"):
        watched(trainer, tmp_path / "log")
    assert lines_of(tmp_path / "log") == []


@pytest.mark.pipeline
def test_diverging_training_stops_and_keeps_its_log(trainer_of: Any, tmp_path: Path) -> None:
    trainer = trainer_of()
    trainer.args.num_train_epochs = 10
    with pytest.raises(ArtifactError, match=r"training diverged: .* to step 20, and began at 1\.00") as caught:
        watched(trainer, tmp_path / "log", loss_before=1.0)
    assert caught.value.code == 5
    assert [line["step"] for line in lines_of(tmp_path / "log")] == list(range(1, 20))


@pytest.mark.pipeline
def test_every_report_has_speed_and_memory(trainer_of: Any, tmp_path: Path) -> None:
    watched(trainer_of(), tmp_path / "log", [2.0, 1.0], report_every=5)
    lines = lines_of(tmp_path / "log")
    assert [line["step"] for line in lines] == [1, 5, 6, 10, 12]
    for line in lines:
        for name in ("steps_per_second", "samples_per_second", "tokens_per_second", "memory_gb", "grad_norm"):
            assert line[name] > 0, name
    assert lines[-1]["seconds_left"] == 0
    assert ("gpu_memory_gb" in lines[0]) == torch.cuda.is_available()


@pytest.mark.pipeline
def test_tensorboard_receives_the_numbers_of_the_log(trainer_of: Any, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    watched(trainer_of(), tmp_path / "log", [2.0, 1.0])
    events = reader.EventAccumulator(str(tmp_path / "log" / "tensorboard"))
    events.Reload()
    lines = lines_of(tmp_path / "log")
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines]
    assert [(event.step, event.value) for event in events.Scalars("held_out/loss")] == [(6, 2.0), (12, 1.0)]


@pytest.mark.pipeline
def test_missing_tensorboard_is_one_log_line(
    trainer_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.INFO, "tutor"):
        watched(trainer_of(), tmp_path / "log")
    assert len(lines_of(tmp_path / "log")) == 12
    assert sum("TensorBoard" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.pipeline
def test_log_of_other_training_is_replaced_of_resumed_continued(trainer_of: Any, tmp_path: Path) -> None:
    for _ in range(2):
        trainer = trainer_of(save_steps=4)
        watched(trainer, tmp_path / "log")
        assert [line["step"] for line in lines_of(tmp_path / "log")] == list(range(1, 13))
    wanted = adapter(trainer.model)
    resumed = trainer_of(save_steps=4)
    monitoring = Monitor(tmp_path / "log", monitor_settings(), lambda: 1.0)
    resumed.add_callback(monitoring)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-8"))
    monitoring.close()
    assert [line["step"] for line in lines_of(tmp_path / "log")] == list(range(1, 13))
    assert same(adapter(resumed.model), wanted)
    assert monitor.report_lines(resumed.state.log_history, 12, monitor_settings()) == monitor.report_lines(
        trainer.state.log_history, 12, monitor_settings()
    )


@pytest.mark.pipeline
def test_resumed_training_restores_earlier_best_adapter(trainer_of: Any, tmp_path: Path) -> None:
    trainer = trainer_of(save_steps=4)
    _, copies = watched(trainer, tmp_path / "log", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    resumed = trainer_of(save_steps=4)
    later = iter([5.0, 6.0])
    monitoring = Monitor(tmp_path / "log", monitor_settings(evaluations=6), lambda: next(later))
    resumed.add_callback(monitoring)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-8"))
    monitoring.close()
    assert monitor.restore_best(resumed.model, tmp_path / "checkpoints", resumed.state.log_history) == 2
    assert same(adapter(resumed.model), copies.taken[2])


@pytest.mark.pipeline
def test_skipped_fp16_steps_are_none_and_training_continues(tiny: Path, tokenizer: Any, tmp_path: Path) -> None:
    chosen = settings(epochs=2, batch_size=2, accumulation=1)
    rows = encode_rows(RowEncoder(tokenizer), ROWS, 1024)
    batches = split_step(chosen, [len(row.ids) for row in rows])
    arguments = training_arguments(chosen, "fp16", 1, tmp_path / "checkpoints", batches)
    trainer = make_trainer(load_base(tiny, "none", "fp16"), tokenizer, rows, lora_config(chosen), arguments)
    trainer.remove_callback(PrinterCallback)
    # accelerate makes a scaler only on a GPU. The first scales overflow FP16, like 65536 with a large model.
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    before = adapter(trainer.model)
    _, copies = watched(trainer, tmp_path / "log", skips_overflow=True)
    text = (tmp_path / "log" / "metrics.jsonl").read_text()
    lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in text.splitlines()
    ]
    skipped = {line["step"] for line in lines if line["loss"] is None}
    assert 1 in skipped
    assert len(skipped) < 8
    taken = {0: before, **copies.taken}
    for step in range(1, 13):
        if lines[step - 1]["learning_rate"] > 0:  # warm-up begins at 0
            assert same(taken[step], taken[step - 1]) == (step in skipped), step
        assert (lines[step - 1]["grad_norm"] is None) == (step in skipped)
    assert {weight.dtype for weight in before.values()} == {torch.float32}


def test_log_folder_is_equal_for_partial_and_final_stage_folder(tmp_path: Path) -> None:
    assert log_folder(tmp_path / "adapter.partial") == log_folder(tmp_path / "adapter") == tmp_path / "adapter.log"
