"""The train stage: QLoRA on the train split. In: data/ and base/. Out: adapter/ (LoRA, metrics.jsonl, training.svg).

TRL's SFTTrainer trains on ids and labels that the prompt contract made; before the first step every row is read back
as the trainer will feed it, and a row that breaks the contract stops the run. Does not merge and does not answer.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from tutor.artifacts.stage_folder import log_folder
from tutor.errors import RecipeError
from tutor.formats.models.model_folder import load_tokenizer, read_facts
from tutor.machine import distributed
from tutor.machine.device import choose_precision, room
from tutor.machine.memory import plan as memory
from tutor.machine.memory.batching import Passes, passes_of
from tutor.machine.memory.estimate import parts_line
from tutor.prompt import Encoded
from tutor.stages.train import checkpoint
from tutor.stages.train.audit import audit_labels, encode_rows
from tutor.stages.train.checkpoint_callback import less_memory, saving
from tutor.stages.train.held_out_loss import mean_loss, perplexity
from tutor.stages.train.loop import fit, write
from tutor.stages.train.monitor import Course
from tutor.stages.train.trainer import count_parameters, load_trainer, lora_config, training_arguments

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe, TrainSettings

log = logging.getLogger(__name__)


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Train an adapter into `out`; held-out loss before and after, counts, the base's identity.

    Goes on from the newest whole checkpoint of the same training beside `out`, where a run before was ended. Several
    processes train together; the first decides, and writes.
    """
    settings = recipe.train
    facts, model_folder = read_facts(inputs["base"])
    tokenizer = load_tokenizer(model_folder)
    train, held_out = (
        encode_rows(tokenizer, read_rows(inputs["data"] / f"{name}.jsonl"), recipe.system, settings.max_length)
        for name in ("train", "held_out")
    )
    precision = distributed.broadcast_result(choose_precision, settings.precision)
    settings = settings.model_copy(
        update={"pass_tokens": distributed.broadcast_result(choose_passes, settings, precision, model_folder, train)}
    )
    passes = plan_passes(settings, train, distributed.world_size())
    plan = distributed.broadcast_result(make_plan, settings, precision, model_folder, passes)
    training = checkpoint.Training(
        out,
        checkpoint.identity(
            settings.model_dump() | {"quantization": plan.quantization}, {"train": train, "held_out": held_out},
            seed=recipe.seed, base=facts.weights,
            precision=precision, device="cuda" if torch.cuda.is_available() else "cpu",
            processes=distributed.world_size(),
        ),
    )  # fmt: skip
    saved = distributed.broadcast_result(checkpoint.resume, training)
    set_seed(recipe.seed)
    again = plan.checkpointing
    arguments = training_arguments(settings, precision, recipe.seed, training.folder, passes, checkpointing=again)
    trainer = load_trainer(model_folder, tokenizer, train, lora_config(settings), arguments, plan)
    audited = audit_labels(trainer, train, tokenizer)
    trainable, total = count_parameters(trainer.model)
    log.info(
        "%d rows audited: EOS supervised, BOS as served, prompts are prefixes; %s of %s parameters train (%.3f %%): "
        "rank %d on %s",
        audited, f"{trainable:,}", f"{total:,}", 100 * trainable / total,
        settings.rank, ", ".join(settings.target_modules),
    )  # fmt: skip
    before = mean_loss(trainer.model, held_out)
    log.info("held-out loss before training: %.4f (perplexity %.2f)", before, perplexity(before))
    course = _course(settings, train, before, precision)
    session = saving(trainer, training, saved, settings.save_minutes, less_memory(passes))
    fitted = fit(trainer, course, held_out, log_folder(out), session, resume=saved[0] if saved else None)
    size = write(trainer, course, fitted, facts.source, out)
    return {
        "base_source": facts.source,
        "base_weights": facts.weights,
        "precision": precision,
        "quantization": plan.quantization,
        "gradient_checkpointing": plan.checkpointing,
        "rows": len(train),
        "rows_per_pass": passes.rows,
        "steps": trainer.state.global_step,
        "kept_step": fitted.step,
        "tokens_per_epoch": course.tokens,
        "trainable_parameters": trainable,
        "adapter_bytes": size,
        "held_out": _held_out(held_out, before, fitted.loss),
        "samples_per_second": round(fitted.epochs * course.rows / fitted.seconds, 3),
        "tokens_per_second": round(fitted.epochs * course.tokens / fitted.seconds, 1),
    }


def _course(settings: "TrainSettings", rows: Sequence[Encoded], loss_before: float, precision: str) -> Course:
    """What the monitor has to know of this training."""
    return Course(
        rows=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        evaluations=settings.epochs * settings.evaluations_per_epoch,
        patience=settings.patience,
        report_every=settings.logging_steps,
        start=loss_before,
        skips=precision == "fp16",
    )


def _held_out(rows: Sequence[Encoded], before: float, after: float) -> dict[str, Any]:
    """The held-out rows' part of the results; losses in nats a token."""
    return {
        "rows": len(rows),
        "tokens": sum(sum(row.mask) for row in rows),
        "loss_before": before,
        "loss_after": after,
        "perplexity_before": perplexity(before),
        "perplexity_after": perplexity(after),
    }


def plan_passes(settings: "TrainSettings", rows: Sequence[Encoded], count: int = 1) -> Passes:
    """How the rows of an optimizer step go through the model: packed, or padded as the specification has it.

    Raises RecipeError when `count` processes cannot share a step's rows equally.
    """
    step_rows = settings.batch_size * settings.accumulation
    if step_rows % count:
        raise RecipeError(
            f"{count} processes cannot share the {step_rows} rows of a step "
            "(train.batch_size x train.accumulation) equally",
            "start as many as divide them, or change train.accumulation",
        )
    return passes_of(settings, [len(row.ids) for row in rows], count)


def choose_passes(settings: "TrainSettings", precision: str, model_folder: Path, rows: Sequence[Encoded]) -> int:
    """Tokens of a packed pass at most, on this machine."""

    def sizes(tried: "TrainSettings") -> tuple[int, int]:
        return plan_passes(tried, rows, distributed.world_size()).tokens, longest

    shape, longest = memory.read_shape(model_folder), max(len(row.ids) for row in rows)
    cuda = torch.cuda.is_available()
    return memory.choose_pass_tokens(shape, settings, precision, sizes, room(), on_gpu=cuda)


def make_plan(settings: "TrainSettings", precision: str, model_folder: Path, passes: Passes) -> memory.Plan:
    """How training fits this machine, as `tutor doctor` says it. Raises HostError when it does not."""
    cuda = torch.cuda.is_available()
    if settings.max_memory.gpu and not cuda:
        log.warning("train.max_memory has no effect without a GPU: all of the base is in RAM")
    wanted = memory.wanted(settings, precision, passes.tokens, passes.tokens, on_gpu=cuda)
    shape, (free, total) = memory.read_shape(model_folder), room()
    plan = memory.plan(shape, wanted, free, total)
    log.info(
        "base in %s, computing in %s, gradient checkpointing %s%s, %s: about %.2f GB (%s) of the %.2f GB that are free",
        "16 bits" if plan.quantization == "none" and precision != "fp32" else plan.quantization.replace("none", "fp32"),
        precision, "on" if plan.checkpointing else "off",
        "" if plan.resident == shape.layers else f", {shape.layers - plan.resident} of {shape.layers} layers in RAM",
        passes, plan.needed / 1e9, parts_line(plan.parts), free / 1e9,
    )  # fmt: skip
    return plan


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a split, as the data stage wrote them."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
