"""The train stage: QLoRA on the train split. In: data/ and base/. Out: adapter/ (LoRA, metrics.jsonl, training.svg).

TRL's SFTTrainer trains on ids and labels that the prompt contract made; before the first step every row is read back
as the trainer will feed it, and a row that breaks the contract stops the run. Does not merge and does not answer.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from peft import LoraConfig
from transformers import set_seed
from trl import SFTConfig

from tutor.artifacts.stage_folder import log_folder
from tutor.engines.hf.engine import load_base
from tutor.errors import DataError, RecipeError
from tutor.formats.models.model_folder import load_tokenizer, read_facts
from tutor.machine import distributed
from tutor.machine.device import choose_precision, room
from tutor.machine.memory import plan as memory
from tutor.machine.memory.batching import Passes, passes_of
from tutor.machine.memory.estimate import parts_line
from tutor.prompt import Encoded, Tokenizer, audit, encode
from tutor.stages.train import checkpoint
from tutor.stages.train.checkpoint_callback import less_memory, saving
from tutor.stages.train.held_out_loss import mean_loss, perplexity
from tutor.stages.train.kernels.fast_dropout import quicken_dropout
from tutor.stages.train.kernels.layer_streaming import stream_layers
from tutor.stages.train.kernels.packed_attention import attend_within_rows, rows_of, with_lengths
from tutor.stages.train.loop import fit, write
from tutor.stages.train.monitor import Course
from tutor.stages.train.trainer import IGNORED, Trainer

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
    course = Course(
        rows=len(train),
        tokens=sum(len(row.ids) for row in train),
        evaluations=settings.epochs * settings.evaluations_per_epoch,
        patience=settings.patience,
        report_every=settings.logging_steps,
        start=before,
        skips=precision == "fp16",
    )
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
        "held_out": {
            "rows": len(held_out),
            "tokens": sum(sum(row.mask) for row in held_out),
            "loss_before": before,
            "loss_after": fitted.loss,
            "perplexity_before": perplexity(before),
            "perplexity_after": perplexity(fitted.loss),
        },
        "samples_per_second": round(fitted.epochs * course.rows / fitted.seconds, 3),
        "tokens_per_second": round(fitted.epochs * course.tokens / fitted.seconds, 1),
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


def load_trainer(
    model_folder: Path,
    tokenizer: Any,
    rows: Sequence[Encoded],
    lora: LoraConfig,
    arguments: SFTConfig,
    plan: memory.Plan,
) -> Trainer:
    """The trainer on the base as planned, which may leave layers in RAM."""
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"
    streams, sharded = plan.resident < memory.read_shape(model_folder).layers, distributed.is_sharded()
    if streams and distributed.world_size() > 1:
        raise RecipeError("train.max_memory leaves layers in RAM of a single process", "remove it, or the launcher")
    if sharded and plan.quantization == "int8":
        raise RecipeError("FSDP cannot shard int8 weights", "set train.quantization to nf4 or none")
    model = load_base(model_folder, plan.quantization, precision, sharded=sharded, in_ram=streams or sharded)
    trainer = make_trainer(model, tokenizer, rows, lora, arguments)
    if not distributed.is_main_process():
        torch.manual_seed(arguments.seed + distributed.rank())  # dropout of its own; the adapter is the first's
    if streams:
        stream_layers(trainer.model, plan.resident, arguments.device)
    return trainer


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a split, as the data stage wrote them."""
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def encode_rows(tokenizer: Tokenizer, rows: Sequence[Mapping[str, str]], system: str, max_length: int) -> list[Encoded]:
    """Ids and masks of all rows, none cut. Raises DataError naming the rows that are longer than `max_length`."""
    encoded = [encode(tokenizer, row["instruction"], row["response"], system) for row in rows]
    long = [
        f"{len(row.ids)} tokens: {source['instruction'][:60]!r}"
        for row, source in zip(encoded, rows, strict=True)
        if len(row.ids) > max_length
    ]
    if long:
        raise DataError(
            f"{len(long)} of {len(rows)} rows are longer than train.max_length ({max_length} tokens)",
            "raise it, or shorten them: a cut row would never show the model its end",
            problems=tuple(long[:20]),
        )
    return encoded


def training_arguments(
    settings: "TrainSettings",
    precision: str,
    seed: int,
    checkpoints: Path,
    passes: Passes,
    *,
    checkpointing: bool = False,
) -> SFTConfig:
    """TRL's arguments for the recipe's numbers; what it would do by itself to the rows (cut, pack, report) is off."""
    cuda = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=passes.rows,
        gradient_accumulation_steps=passes.count,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        logging_steps=1,  # the monitor sees every step, and reports as the recipe says
        # fp16's loss scaler skips a step that is no number, and the trainer's sum of losses must survive it.
        logging_nan_inf_filter=precision == "fp16",
        save_strategy="steps",
        save_steps=settings.save_steps,
        max_length=None,
        packing=False,  # TRL's would fill passes to a length: other rows a step, in another order
        padding_free=passes.packed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not cuda,
        gradient_checkpointing=checkpointing,
        dataloader_pin_memory=cuda,
        optim="adamw_torch",
        ddp_find_unused_parameters=False,  # every adapter is part of every pass
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
    )


def lora_config(settings: "TrainSettings") -> LoraConfig:
    """PEFT's configuration of a plain LoRA."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


def make_trainer(
    model: Any, tokenizer: Any, rows: Sequence[Encoded], lora: LoraConfig, arguments: SFTConfig
) -> Trainer:
    """TRL's trainer over rows that are already ids and labels, with fp32 adapters whatever the base computes in."""
    dataset = datasets.Dataset.from_list([{"input_ids": row.ids, "labels": labels(row)} for row in rows])
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    if arguments.padding_free:
        attend_within_rows(model)
        trainer.data_collator = with_lengths(trainer.data_collator)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # TRL casts them to bf16 over a 4-bit base: small updates would round away, and fp16 cannot unscale them.
            parameter.data = parameter.data.float()
    if arguments.use_cpu:
        quicken_dropout(trainer.model)
    trainer.model.train()  # it is loaded in eval mode, which 4-bit layers must not see (stages/train/held_out_loss.py)
    return trainer


def labels(row: Encoded) -> list[int]:
    """A row's ids where they carry loss, IGNORED elsewhere."""
    return [token if on else IGNORED for token, on in zip(row.ids, row.mask, strict=True)]


def audit_labels(trainer: Trainer, rows: Sequence[Encoded], tokenizer: Any) -> int:
    """Read every row back from the trainer's own collator and hold it against the contract; how many were read.

    Raises DataError naming the first rows that break it: a library that drops, cuts or masks is caught here.
    """
    dataset = trainer.train_dataset
    if len(dataset) != len(rows):
        raise DataError(f"the trainer kept {len(dataset)} of {len(rows)} rows", "this is a library's doing: report it")
    size = trainer.args.per_device_train_batch_size
    passes = (list(dataset.select(range(at, min(at + size, len(rows))))) for at in range(0, len(rows), size))
    read = [row for items in passes for row in rows_of(trainer.data_collator(items))]
    problems = []
    for number, ((ids, marks), row) in enumerate(zip(read, rows, strict=True), 1):
        mask = [int(label != IGNORED) for label in marks]
        found = audit(Encoded(ids, mask), row.ids[: row.n_prompt], tokenizer)
        if not found and (ids, mask) != (row.ids, row.mask):
            found = ["it is another row"]
        problems += [f"train row {number}: {problem}" for problem in found]
    if problems:
        raise DataError(f"{len(problems)} breaches of the prompt contract", problems=tuple(problems[:20]))
    return len(rows)


def count_parameters(model: Any) -> tuple[int, int]:
    """Trainable and all parameters; a 4-bit weight counts as the numbers it stands for."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, int(model.num_parameters())
