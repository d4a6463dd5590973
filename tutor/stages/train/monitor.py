"""Watching a training: held-out losses on the way, the best adapter kept, figures for people, a stop when it fails.

In: the trainer's own history, a function that scores the held-out rows. Out: `adapter.log/` beside the stage's folder
(metrics.jsonl with speed and memory, TensorBoard's files), the log's lines, and after training the history itself.
Everything that decides something comes from the history, which checkpoints carry: a resumed run decides the same.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import open_weights
from tutor.machine.distributed import full_tensor, is_main_process, shard_like
from tutor.stages.train.held_out_loss import perplexity
from tutor.stages.train.metrics import Pace, clock, gpu_utilization, open_board, resources, sentence, show

log = logging.getLogger(__name__)

BEST = "best.safetensors"
"""The best adapter so far, among the checkpoints: what is resumed finds it there."""
LONG = 20
"""Steps: so many in a row above the bound are a divergence, and no hard rows."""
SKIPPED = 30
"""Steps: fp16's loss scaler halves its 65536 at each overflow, so that after 16 the gradients themselves are wrong."""
History = Sequence[Mapping[str, Any]]
"""The trainer's log_history: an entry a step, with `held_out_loss` where it was measured."""


@dataclass(frozen=True)
class Course:
    """What a training is watched by."""

    rows: int  # in an epoch
    tokens: int  # in an epoch
    evaluations: int  # in all epochs
    patience: int  # evaluations without a better one; 0: no end
    report_every: int  # steps
    start: float  # held-out loss before training, in nats
    skips: bool  # fp16's loss scaler leaves out steps whose gradients overflow


def evaluation_steps(steps: int, evaluations: int) -> frozenset[int]:
    """At which steps the held-out rows are scored: evenly, the last one always."""
    return frozenset(max(1, -(-number * steps // evaluations)) for number in range(1, evaluations + 1))


def best_of(history: History) -> tuple[int, float] | None:
    """Step and held-out loss of the first best evaluation."""
    scored = [(entry["held_out_loss"], entry["step"]) for entry in history if "held_out_loss" in entry]
    return (min(scored)[1], min(scored)[0]) if scored else None


def waited(history: History) -> int:
    """Evaluations since the best one."""
    best = best_of(history)
    return sum("held_out_loss" in entry and entry["step"] > best[0] for entry in history) if best else 0


def refuse_failing(history: History, start: float) -> None:
    """Raise ArtifactError when the newest loss is no number, or training has been failing for long.

    A loss of None is a step that fp16's loss scaler left out: no fault unless all are.
    """
    losses = [entry["loss"] for entry in history if "loss" in entry]
    step = history[-1]["step"]
    if losses[-1] is not None and not math.isfinite(losses[-1]):
        raise ArtifactError(f"the loss is {losses[-1]} at step {step}", "lower train.learning_rate")
    if len(losses) >= SKIPPED and all(loss is None for loss in losses[-SKIPPED:]):
        raise ArtifactError(
            f"no gradient was a number in the {SKIPPED} steps to step {step}",
            "set train.precision to bf16 or fp32, or lower train.learning_rate",
        )
    bound = max(1.5 * start, start + 1)
    if len(losses) >= LONG and all(loss is not None and loss > bound for loss in losses[-LONG:]):
        raise ArtifactError(
            f"training diverged: the loss has been above {bound:.2f} for {LONG} steps to step {step}, and began at "
            f"{start:.2f}",
            "lower train.learning_rate, or raise train.warmup",
        )


def reports(history: History, steps: int, course: Course) -> list[dict[str, Any]]:
    """What is reported: the first step, every `report_every`, the last, and each evaluation; losses as means between.

    The same history gives the same lines: no clock has a say.
    """
    evaluated = evaluation_steps(steps, course.evaluations)
    lines: list[dict[str, Any]] = []
    window: list[float] = []
    for entry in history:
        if "loss" not in entry:
            continue
        window += [] if entry["loss"] is None else [entry["loss"]]
        step = entry["step"]
        if step not in (1, steps, *evaluated) and step % course.report_every:
            continue
        loss = math.fsum(window) / len(window) if window else None
        line = {
            "step": step,
            "epoch": round(entry["epoch"], 3),
            "loss": loss,
            "perplexity": None if loss is None else perplexity(loss),
            "learning_rate": entry["learning_rate"],
            "grad_norm": entry["grad_norm"],
        }
        if "held_out_loss" in entry:
            line |= {
                "held_out_loss": entry["held_out_loss"],
                "held_out_perplexity": perplexity(entry["held_out_loss"]),
            }
        lines.append(line)
        window = []
    return lines


class Monitor(TrainerCallback):  # type: ignore[misc]
    """Follows one training. Its trainer has to log every step; `close` ends what it opened."""

    def __init__(self, folder: Path, course: Course, score: Callable[[], float]) -> None:
        self.stopped = False  # by patience
        self._folder = folder
        self._course = course
        self._score = score
        self.pace = Pace()
        self._evaluations: frozenset[int] = frozenset()
        self._busy: list[int] = []  # the GPU's share of each step, in percent
        self._board: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the log anew, or after the step that training resumes from."""
        del control
        self._evaluations = evaluation_steps(state.max_steps, self._course.evaluations)
        self.pace.begin(state.global_step, state.epoch or 0.0)
        if not is_main_process():
            return
        path = self._folder / "metrics.jsonl"
        kept = []
        if state.global_step:
            lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        else:
            shutil.rmtree(self._folder, ignore_errors=True)
            (Path(args.output_dir) / BEST).unlink(missing_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(kept), "utf-8")
        self._board = open_board(self._folder / "tensorboard", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note how busy the GPU is."""
        del args, state, control
        if (busy := gpu_utilization()) is not None:
            self._busy.append(busy)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **given: Any
    ) -> None:
        """Check, evaluate where it is due, report. Raises ArtifactError when training fails."""
        if "loss" not in (logs or {}):
            return
        entry = state.log_history[-1]
        if not math.isfinite(entry.get("grad_norm", 0.0)):
            entry["grad_norm"] = None  # JSON has no word for it
            entry["loss"] = None if self._course.skips else entry["loss"]
        refuse_failing(state.log_history, self._course.start)
        if state.global_step in self._evaluations:
            self._evaluate(entry, state, Path(args.output_dir) / BEST, given["model"])
            patience = self._course.patience
            if patience and waited(state.log_history) >= patience and state.global_step < state.max_steps:
                log.info("no better held-out loss in %d evaluations: training ends", patience)
                self.stopped = control.should_training_stop = True
        if is_main_process():
            self._report(state)

    def _evaluate(self, entry: dict[str, Any], state: Any, path: Path, model: Any) -> None:
        with self.pace.paused():
            entry["held_out_loss"] = self._score()
            if best_of(state.log_history) == (entry["step"], entry["held_out_loss"]):
                if is_main_process():
                    path.parent.mkdir(parents=True, exist_ok=True)
                save_trained(model, path, entry["step"], entry["held_out_loss"])

    def _report(self, state: Any) -> None:
        counted = {"done": state.global_step, "total": state.max_steps}
        left = len([step for step in self._evaluations if step > state.global_step])
        eta = self.pace.left(state.global_step, state.max_steps, left)
        newest = reports(state.log_history, state.max_steps, self._course)[-1:]
        if not newest or newest[0]["step"] != state.global_step:
            loss = state.log_history[-1]["loss"]
            said = "skipped" if loss is None else f"loss {loss:.4f}"
            text = f"{said}, {clock(eta)} left"
            log.info("step %d/%d: %s", *counted.values(), text, extra={**counted, "live": True})
            return
        speed = self.pace.since_report(state.global_step, state.epoch, self._course.rows, self._course.tokens)
        line = {**newest[0], **speed, "seconds_left": round(eta), **resources(self._busy)}
        self._busy.clear()
        with (self._folder / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        show(self._board, line)
        log.info("step %d/%d: %s", *counted.values(), sentence(line), extra=counted)

    def close(self) -> None:
        """Write out what TensorBoard's writer still holds."""
        if self._board is not None:
            self._board.close()


def save_trained(model: Any, path: Path, step: int, loss: float) -> None:
    """Write the weights that train, whole or not at all, with the step that they are of and their held-out loss."""
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    tensors = {name: full_tensor(weight.detach()).cpu() for name, weight in trainable.items()}
    if is_main_process():
        save_file(tensors, path, metadata={"step": str(step), "held_out_loss": repr(loss)})


def restore_best(model: Any, checkpoints: Path, history: History) -> int | None:
    """Put the best adapter back where it is better than the last one; the step that the adapter now is of.

    None when no evaluation was made. The file itself says how good it is: after a crash it may be of a step that the
    resumed run has not seen as its best.
    """
    scored = [entry for entry in history if "held_out_loss" in entry]
    if not scored:
        return None
    last, step = scored[-1]["held_out_loss"], int(scored[-1]["step"])
    if not (checkpoints / BEST).is_file():
        log.warning("the best adapter so far is gone from %s: the last one is kept", checkpoints)
        return step
    with open_weights(checkpoints / BEST) as file:
        said = file.metadata()
        if float(said["held_out_loss"]) >= last:
            return step
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.requires_grad:
                    weight.copy_(shard_like(file.get_tensor(name), weight))
    log.info(
        "the adapter of step %s is kept: held-out loss %.4f, and %.4f at the end",
        said["step"], float(said["held_out_loss"]), last,
    )  # fmt: skip
    return int(said["step"])
