"""The train stage: QLoRA on the train split. In: data/ and base/. Out: adapter/ (LoRA safetensors, metrics.jsonl).

TRL's SFTTrainer trains on ids and labels that the prompt contract made; before the first step every row is read back
as the trainer will feed it, and a row that breaks the contract stops the run. Does not merge and does not answer.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from tutor.engines.hf import choose_precision, load_base, score
from tutor.errors import ArtifactError, DataError
from tutor.modelfolder import load_tokenizer, read_facts
from tutor.stages import checkpoint
from tutor.stages.saving import less_memory, saving
from tutor.template import Encoded, Tokenizer, audit, encode

if TYPE_CHECKING:
    from tutor.recipe import Recipe, TrainSettings

log = logging.getLogger(__name__)

IGNORED = -100
"""The label of an id without loss, by PyTorch's cross entropy."""


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Train an adapter into `out`; held-out loss before and after, counts, the base's identity.

    Goes on from the newest whole checkpoint of the same training beside `out`, where a run before was ended.
    """
    settings = recipe.train
    facts, model_folder = read_facts(inputs["base"])
    tokenizer = load_tokenizer(model_folder)
    train = encode_rows(tokenizer, read_rows(inputs["data"] / "train.jsonl"), recipe.system, settings.max_length)
    held_out = encode_rows(tokenizer, read_rows(inputs["data"] / "held_out.jsonl"), recipe.system, settings.max_length)
    precision = choose_precision(settings.precision)
    training = checkpoint.Training(
        out,
        checkpoint.identity(
            settings.model_dump(), {"train": train, "held_out": held_out}, seed=recipe.seed, base=facts.weights,
            precision=precision, device="cuda" if torch.cuda.is_available() else "cpu",
        ),
    )  # fmt: skip
    saved = checkpoint.resume(training)
    set_seed(recipe.seed)
    model = load_base(model_folder, settings.quantization, precision)
    arguments = training_arguments(settings, precision, recipe.seed, training.folder)
    trainer = make_trainer(model, tokenizer, train, lora_config(settings), arguments)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Metrics(out / "metrics.jsonl", saved[1].seconds if saved else 0.0))
    audited = audit_labels(trainer, train, tokenizer)
    trainable, total = count_parameters(trainer.model)
    log.info(
        "%d rows audited: EOS supervised, BOS as served, prompts are prefixes; %s of %s parameters train (%.2f %%)",
        audited, f"{trainable:,}", f"{total:,}", 100 * trainable / total,
    )  # fmt: skip
    before = mean_loss(trainer.model, held_out)
    log.info("held-out loss before training: %.4f (perplexity %.2f)", before, math.exp(before))
    refuse_packed(trainer.model)
    hint = less_memory(settings.batch_size, settings.accumulation)
    with saving(trainer, training, saved, settings.save_minutes, hint) as saver:
        trainer.train(resume_from_checkpoint=str(saved[0]) if saved else None)
        seconds = saver.seconds
    if trainer.state.global_step != trainer.state.max_steps:
        raise ArtifactError(f"training ended at step {trainer.state.global_step} of {trainer.state.max_steps}")
    after = mean_loss(trainer.model, held_out)
    log.info("held-out loss after training: %.4f (perplexity %.2f)", after, math.exp(after))
    save_adapter(trainer.model, facts.source, out)
    tokens = sum(len(row.ids) for row in train)
    return {
        "base_source": facts.source,
        "base_weights": facts.weights,
        "precision": precision,
        "quantization": settings.quantization,
        "rows": len(train),
        "steps": trainer.state.global_step,
        "tokens_per_epoch": tokens,
        "trainable_parameters": trainable,
        "held_out": {
            "rows": len(held_out),
            "tokens": sum(sum(row.mask) for row in held_out),
            "loss_before": before,
            "loss_after": after,
            "perplexity_before": math.exp(before),
            "perplexity_after": math.exp(after),
        },
        "samples_per_second": round(len(train) * settings.epochs / seconds, 3),
        "tokens_per_second": round(tokens * settings.epochs / seconds, 1),
    }


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


def training_arguments(settings: "TrainSettings", precision: str, seed: int, checkpoints: Path) -> SFTConfig:
    """TRL's arguments for the recipe's numbers; what it would do by itself to the rows (cut, pack, report) is off."""
    cuda = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=settings.save_steps,
        max_length=None,
        packing=False,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not cuda,
        gradient_checkpointing=cuda,
        dataloader_pin_memory=cuda,
        optim="adamw_torch",
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
) -> SFTTrainer:
    """TRL's trainer over rows that are already ids and labels, with fp32 adapters whatever the base computes in."""
    dataset = datasets.Dataset.from_list([{"input_ids": row.ids, "labels": labels(row)} for row in rows])
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=lora
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # TRL casts them to bf16 over a 4-bit base: small updates would round away, and fp16 cannot unscale them.
            parameter.data = parameter.data.float()
    trainer.model.train()  # it is loaded in eval mode, which 4-bit layers must not see (`scoring`)
    return trainer


def labels(row: Encoded) -> list[int]:
    """A row's ids where they carry loss, IGNORED elsewhere."""
    return [token if on else IGNORED for token, on in zip(row.ids, row.mask, strict=True)]


def audit_labels(trainer: SFTTrainer, rows: Sequence[Encoded], tokenizer: Any) -> int:
    """Read every row back from the trainer's own collator and hold it against the contract; how many were read.

    Raises DataError naming the first rows that break it: a library that drops, cuts or masks is caught here.
    """
    dataset = trainer.train_dataset
    if len(dataset) != len(rows):
        raise DataError(f"the trainer kept {len(dataset)} of {len(rows)} rows", "this is a library's doing: report it")
    problems = []
    for number, (item, row) in enumerate(zip(dataset, rows, strict=True), 1):
        batch = trainer.data_collator([item])
        ids = batch["input_ids"][0].tolist()
        mask = [0 if label == IGNORED else 1 for label in batch["labels"][0].tolist()]
        found = audit(Encoded(ids, mask), row.ids[: row.n_prompt], tokenizer)
        problems += [f"train row {number}: {problem}" for problem in found]
    if problems:
        raise DataError(f"{len(problems)} breaches of the prompt contract", problems=tuple(problems[:20]))
    return len(rows)


def count_parameters(model: Any) -> tuple[int, int]:
    """Trainable and all parameters; a 4-bit weight counts as the numbers it stands for."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, int(model.num_parameters())


@contextlib.contextmanager
def scoring(model: Any) -> Iterator[None]:
    """No dropout and no gradients inside, and the model afterwards exactly as it was.

    bitsandbytes 0.50 repacks a 4-bit layer for the CPU the first time it runs in eval mode, for good, and the packed
    kernel has no gradient: training after it goes on with wrong ones. So 4-bit layers never see eval mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def refuse_packed(model: Any) -> None:
    """Raise ArtifactError when a 4-bit layer is packed for inference: its gradients would be wrong without a word."""
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ArtifactError(f"{name} is packed for inference and cannot pass gradients on")


def mean_loss(model: Any, rows: Sequence[Encoded]) -> float:
    """Mean negative log-likelihood (nats) over all supervised tokens of all rows, teacher-forced, in fp32.

    Raises ArtifactError when it is no number.
    """
    with scoring(model):
        scores = score(model, [(row.ids[: row.n_prompt], row.ids[row.n_prompt :]) for row in rows])
    loss = -math.fsum(value for row in scores for value in row) / sum(len(row) for row in scores)
    if not math.isfinite(loss):
        raise ArtifactError(f"the held-out loss is {loss}", "lower train.learning_rate, or fetch the base again")
    return loss


def save_adapter(model: Any, source: str, out: Path) -> None:
    """The adapter in PEFT's format, naming its base by source and not by this machine's path."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = source
        config.target_modules = sorted(config.target_modules)  # of a set, whose order is another in every process
    # "auto" would ask the model hub for a repository named like the source.
    model.save_pretrained(out, safe_serialization=True, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)


class Metrics(TrainerCallback):  # type: ignore[misc]
    """Append what the trainer logs to a JSONL file, a step a line, and stop at a loss that is no number."""

    def __init__(self, path: Path, seconds: float = 0.0) -> None:
        self._path = path
        self._start = time.monotonic() - seconds  # that runs before this one trained

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Write one line. Raises ArtifactError when the loss is NaN or infinite."""
        del args, control
        values = {name: value for name, value in (logs or {}).items() if name in {"loss", "grad_norm", "learning_rate"}}
        if "loss" not in values:
            return
        if not math.isfinite(values["loss"]):
            raise ArtifactError(
                f"the loss is {values['loss']} at step {state.global_step}", "lower train.learning_rate"
            )
        line = {
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 3),
            # A gradient may be infinite where fp16 then skips the step; JSON has no word for it.
            **{name: value if math.isfinite(value) else None for name, value in values.items()},
            "seconds": round(time.monotonic() - self._start, 2),
        }
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        counted = {"done": state.global_step, "total": state.max_steps}
        log.info("step %d/%d: loss %.4f", state.global_step, state.max_steps, values["loss"], extra=counted)
