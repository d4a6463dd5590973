"""Two other ways to train the adapter of scripts/bench_train.py: the specification's loop, and TRL's own trainer.

In: the folders of the base and data stages, a recipe's train settings. Out: seconds and loss of every step. Both get
the base, quantization, adapters, rows, order, seed and learning rate of the train stage. Prints nothing.

- plain: section 5 of the specification, literally: transformers' Trainer, micro-batches of one row.
- trl: SFTTrainer with all rows of a step in one padding-free micro-batch, and PyTorch's attention.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def train(name: str, options: Any, settings: Any, work: Path, precision: str) -> tuple[list[float], list[float]]:
    """Train by the way `name`; return the seconds since the beginning at the end of each step, and its loss."""
    from transformers import AutoTokenizer, TrainerCallback, set_seed

    from tutor.formats.models.model_folder import read_facts

    _, folder = read_facts(work / "base")
    set_seed(options.seed)
    times: list[float] = []
    losses: list[float] = []

    class Recorder(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                times.append(time.monotonic() - self.began)
                losses.append(logs["loss"])

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = labelled_rows(encoded_rows(tokenizer, work))
    model = base_model(folder, options.quantization, precision)
    make = {"plain": _plain_trainer, "trl": _trl_trainer}[name]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        trainer = make(model, tokenizer, rows, settings, arguments(options, settings, precision, scratch))
        trainer.add_callback(Recorder())
        trainer.train()
    return times, losses


def encoded_rows(tokenizer: Any, work: Path) -> Any:
    """Return the ids of the train stage, for comparable losses; they are the specification's but for one space."""
    from tutor.formats.rows.split_files import TRAIN, read_split
    from tutor.prompt.encoding import RowEncoder
    from tutor.stages.train.audit import encode_rows

    return encode_rows(RowEncoder(tokenizer), read_split(work / "data", TRAIN), 4096)


def labelled_rows(rows: Any) -> list[dict[str, list[int]]]:
    """Return ids and labels of every row; ids of the prompt have no label."""
    from tutor.stages.train.audit import label_ids

    return [{"input_ids": row.ids, "labels": label_ids(row)} for row in rows]


def base_model(folder: Path, quantization: str, precision: str) -> Any:
    """Load the base, quantized to 4 or 8 bits or not."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tutor.engines.hf.loading import DTYPES

    dtype = DTYPES[precision]
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    config = None
    if quantization == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, **four)
    elif quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    device = 0 if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": device}
    )


def lora(settings: Any) -> Any:
    """Return PEFT's configuration of the recipe's adapters.

    Not the train stage's function: it would import TRL into the process of `plain`, whose memory is measured.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


def step_rows(settings: Any) -> int:
    """Return the rows of an optimizer step."""
    return int(settings.batch_size * settings.accumulation)


def arguments(options: Any, settings: Any, precision: str, folder: str) -> dict[str, Any]:
    """Return the hyper-parameters of section 5.1, and the learning rate and schedule of `ours`: it names none."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "output_dir": folder,
        "num_train_epochs": options.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup,
        "fp16": precision == "fp16",
        "bf16": precision == "bf16",
        "use_cpu": not cuda,
        "logging_steps": 1,
        "save_steps": 500,
        "seed": options.seed,
        "data_seed": options.seed,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": cuda,
    }


def _plain_trainer(
    model: Any, _: Any, rows: Sequence[dict[str, list[int]]], settings: Any, chosen: dict[str, Any]
) -> Any:
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments

    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    micro = TrainingArguments(**chosen, per_device_train_batch_size=1, gradient_accumulation_steps=step_rows(settings))
    masked = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return Trainer(model=get_peft_model(model, lora(settings)), args=micro, train_dataset=masked)


def _trl_trainer(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, list[int]]], settings: Any, chosen: dict[str, Any]
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    # gradient_checkpointing is TRL's default, and only costs time where memory suffices.
    config = SFTConfig(
        **chosen,
        per_device_train_batch_size=step_rows(settings),
        padding_free=True,
        max_length=None,
        gradient_checkpointing=False,
    )
    data = Dataset.from_list(list(rows))
    return SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora(settings)
    )
