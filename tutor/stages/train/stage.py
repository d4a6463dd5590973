"""The train stage: QLoRA on the train split. In: data/ and base/. Out: adapter/ (LoRA, metrics.jsonl, training.svg).

TRL's SFTTrainer trains on ids and labels that the prompt contract made. Before the first step, every row is collated as
the trainer does it, and a row that breaks the contract stops the run. Does not merge and does not generate.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from tutor.artifacts.disk import read_json
from tutor.artifacts.provenance import SourceTree
from tutor.artifacts.stage_folder import log_folder
from tutor.engines.answer_limit import LONGEST, check_answers, longest_answer
from tutor.formats.models.base_source import public_source
from tutor.formats.models.model_config import require_equal_lengths
from tutor.formats.models.model_folder import read_facts
from tutor.formats.rows.row_ids import row_encoder
from tutor.formats.rows.split_files import HELD_OUT, PROMPTS, TRAIN, read_split
from tutor.machine import distributed
from tutor.machine.memory.plan import TrainingPlan
from tutor.prompt.encoding import Encoded, RowEncoder
from tutor.stages.train import checkpoint
from tutor.stages.train.audit import audit_labels, encode_rows, refuse_control_tokens
from tutor.stages.train.checkpoint_callback import memory_hint, saving
from tutor.stages.train.held_out_loss import mean_loss, perplexity
from tutor.stages.train.loop import fit, write_outputs
from tutor.stages.train.monitor import MonitorSettings
from tutor.stages.train.trainer import count_parameters, load_trainer, lora_config, training_arguments

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe, TrainSettings

log = logging.getLogger(__name__)


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path, plan: TrainingPlan) -> dict[str, Any]:
    """Train an adapter into `out` as planned; return the held-out losses, counts, and the base's identity.

    Resumes from the newest intact checkpoint of this training when an earlier run ended early. With several processes,
    all train, and the main process decides and writes.
    """
    settings, precision, batches = recipe.train, plan.precision, plan.batches
    facts, model_folder = read_facts(inputs["base"])
    config = read_json(model_folder / "config.json")
    require_equal_lengths({"train.max_length": settings.max_length}, config, model_folder)
    encoder = row_encoder(recipe, inputs["base"])
    tokenizer = encoder.tokenizer
    train, held_out = _encode(recipe, inputs["data"], encoder)
    longest = longest_answer([*train, *held_out])
    if cut := check_answers(recipe, longest, recipe.resolve(recipe.data.train)):
        log.warning("%s", cut)
    log.info("%s", plan)
    training = _training_run(recipe, plan, {"train": train, "held_out": held_out}, facts.weights, out)
    saved = distributed.broadcast_result(checkpoint.resume, training)
    set_seed(recipe.seed)
    arguments = training_arguments(
        settings, precision, recipe.seed, training.folder, batches, checkpointing=plan.checkpointing
    )
    arguments.run_name = recipe.name
    trainer = load_trainer(model_folder, tokenizer, train, lora_config(settings), arguments, plan)
    audited = audit_labels(trainer, train, tokenizer, encoder.prompt)
    trainable, total = count_parameters(trainer.model)
    log.info(
        "%d rows audited: EOS supervised, BOS as served, prompts are prefixes; %s of %s parameters train (%.3f %%): "
        "rank %d on %s",
        audited, f"{trainable:,}", f"{total:,}", 100 * trainable / total,
        settings.rank, ", ".join(settings.target_modules),
    )  # fmt: skip
    before = mean_loss(trainer.model, held_out)
    log.info("held-out loss before training: %.4f (perplexity %.2f)", before, perplexity(before))
    monitoring = _monitoring(settings, train, before, precision)
    session = saving(trainer, training, saved, settings.save_minutes, memory_hint(batches))
    fitted = fit(trainer, monitoring, held_out, log_folder(out), session, resume=saved[0] if saved else None)
    source = public_source(facts.source, facts.weights)
    size = write_outputs(trainer, monitoring, fitted, source, out)
    return {
        "base_source": source,
        "base_weights": facts.weights,
        "precision": precision,
        **(plan.choice.record if plan.choice else {}),
        "quantization": plan.quantization,
        "gradient_checkpointing": plan.checkpointing,
        "rows": len(train),
        "rows_per_micro_batch": batches.rows,
        "steps": trainer.state.global_step,
        "kept_step": fitted.step,
        "tokens_per_epoch": monitoring.tokens,
        LONGEST: longest,
        "trainable_parameters": trainable,
        "adapter_bytes": size,
        "held_out": _held_out(held_out, before, fitted.loss),
        "samples_per_second": round(fitted.epochs * monitoring.rows / fitted.seconds, 3),
        "tokens_per_second": round(fitted.epochs * monitoring.tokens / fitted.seconds, 1),
    }


def _encode(recipe: "Recipe", data: Path, encoder: RowEncoder) -> tuple[list[Encoded], list[Encoded]]:
    """Return the training and the held-out rows as ids.

    Raises DataError for a row that is too long, and for a row or prompt that holds a control token of the base.
    """
    rows = [read_split(data, name) for name in (TRAIN, HELD_OUT, PROMPTS)]
    prompts = recipe.data.eval or recipe.data.train
    files = [recipe.resolve(name) for name in (recipe.data.train, recipe.data.train, prompts)]
    located = [(f"{file}:{row.get('line')}", row) for file, group in zip(files, rows, strict=True) for row in group]
    refuse_control_tokens(encoder, located)
    train, held_out = (encode_rows(encoder, rows[place], recipe.train.max_length, files[place]) for place in (0, 1))
    return train, held_out


def _training_run(
    recipe: "Recipe", plan: TrainingPlan, rows: Mapping[str, Sequence[Encoded]], base: str, out: Path
) -> checkpoint.TrainingRun:
    """Return the training with all fields that its checkpoints must agree on; `base` is the hash of the weights."""
    code = SourceTree().provenance(Path(__file__))
    fields = checkpoint.training_fields(
        recipe.train.model_dump(exclude={"report_to"}) | {"quantization": plan.quantization}, rows, code,
        seed=recipe.seed, base=base,
        precision=plan.precision, device="cuda" if torch.cuda.is_available() else "cpu",
        processes=distributed.world_size(),
    )  # fmt: skip
    return checkpoint.TrainingRun(out, fields, code.sources)


def _monitoring(
    settings: "TrainSettings", rows: Sequence[Encoded], loss_before: float, precision: str
) -> MonitorSettings:
    """Return the monitor's settings for this training."""
    return MonitorSettings(
        rows=len(rows),
        tokens=sum(len(row.ids) for row in rows),
        evaluations=settings.epochs * settings.evaluations_per_epoch,
        keep=settings.keep,
        patience=settings.patience,
        report_every=settings.logging_steps,
        loss_before=loss_before,
        skips_overflow=precision == "fp16",
        trackers=tuple(settings.report_to),
    )


def _held_out(rows: Sequence[Encoded], before: float, after: float) -> dict[str, Any]:
    """Return the results on the held-out rows; losses in nats per token."""
    return {
        "rows": len(rows),
        "tokens": sum(sum(row.mask) for row in rows),
        "loss_before": before,
        "loss_after": after,
        "perplexity_before": perplexity(before),
        "perplexity_after": perplexity(after),
    }
