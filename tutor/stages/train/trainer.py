"""TRL's SFTTrainer for this stage: arguments, LoRA, the model as planned, equal steps in any number of distributed.

In: a recipe's settings, rows as ids, a memory plan. Out: a trainer that cuts, packs and reports nothing by itself.
The loss on the CPU is kernels/chunked_loss.py's, on a GPU TRL's own. Does not train and does not read files of rows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from peft import LoraConfig
from torch.utils.data import ConcatDataset, DataLoader
from trl import SFTConfig, SFTTrainer

from tutor.engines.hf.loading import DTYPES, load_base
from tutor.errors import RecipeError
from tutor.machine import distributed
from tutor.machine.distributed import DistributedStepSampler
from tutor.machine.memory.batching import MicroBatches
from tutor.machine.memory.plan import TrainingPlan
from tutor.prompt.encoding import Encoded
from tutor.stages.train.audit import label_ids
from tutor.stages.train.kernels.chunked_loss import IGNORE_INDEX, summed_loss
from tutor.stages.train.kernels.fast_dropout import replace_dropout
from tutor.stages.train.kernels.fused_layers import fuse_layers
from tutor.stages.train.kernels.layer_streaming import stream_layers
from tutor.stages.train.kernels.packed_attention import add_lengths, use_packed_attention

if TYPE_CHECKING:
    from tutor.recipe.settings import TrainSettings


class Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, without TRL's metrics (entropy, accuracy) on the CPU."""

    def get_train_dataloader(self) -> Any:
        """Return this process's micro-batches: its share of the rows of each step."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        rows, size = self.train_dataset, self.args.per_device_train_batch_size
        blank = {"input_ids": rows[0]["input_ids"][:1], "labels": [IGNORE_INDEX]}
        order = SeedableRandomSampler(rows, data_seed=self.args.data_seed)
        loader: Any = DataLoader(
            ConcatDataset([rows, [blank]]),  # type: ignore[list-item]
            batch_size=size,
            sampler=DistributedStepSampler(order, size * self.args.gradient_accumulation_steps * self.args.world_size),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        device = self.accelerator.device
        return prepare_data_loader(loader, device, num_processes=1, process_index=0, put_on_device=True)

    def compute_loss(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 - TRL's signature
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return a micro-batch's summed loss divided by `num_items_in_batch`, or by its own tokens if that is None."""
        if return_outputs or inputs["input_ids"].device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs, labels = {name: value for name, value in inputs.items() if name != "labels"}, inputs["labels"]
        base = self.accelerator.unwrap_model(model).get_base_model()
        hidden = self._hidden(model, base.base_model, inputs)
        loss = summed_loss(hidden, labels, base.get_output_embeddings().weight)
        if num_items_in_batch is None:
            return loss / (labels[:, 1:] != IGNORE_INDEX).sum()
        # `num_items_in_batch` counts the tokens of all processes, and gradients are averaged over the processes.
        return loss / num_items_in_batch * self.accelerator.num_processes

    def _hidden(self, model: Any, decoder: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the decoder's last hidden states. Several processes must call `model` to synchronize gradients."""
        if self.args.world_size == 1:
            with self.accelerator.autocast():
                return decoder(**inputs, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
        held: list[torch.Tensor] = []
        hook = decoder.register_forward_hook(lambda _, __, output: held.append(output.last_hidden_state))
        with hook:
            model(**inputs, use_cache=False, logits_to_keep=1)
        return held[0]


def load_trainer(
    model_folder: Path,
    tokenizer: Any,
    rows: Sequence[Encoded],
    lora: LoraConfig,
    arguments: SFTConfig,
    plan: TrainingPlan,
) -> Trainer:
    """Load the base as planned, with layers in RAM if the plan has any there, and return the trainer on it."""
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"
    sharded = distributed.is_sharded()
    if plan.streams and distributed.world_size() > 1:
        raise RecipeError("train.max_memory leaves layers in RAM of a single process", "remove it, or the launcher")
    if sharded and plan.quantization == "int8":
        raise RecipeError("FSDP cannot shard int8 weights", "set train.quantization to nf4 or none")
    model = load_base(model_folder, plan.quantization, precision, sharded=sharded, in_ram=plan.streams or sharded)
    trainer = make_trainer(model, tokenizer, rows, lora, arguments)
    if not distributed.is_main_process():
        torch.manual_seed(arguments.seed + distributed.rank())  # its own dropout; the adapter is rank 0's
    if plan.streams:
        stream_layers(trainer.model, plan.resident, arguments.device)
    elif arguments.use_cpu and not sharded:
        fuse_layers(trainer.model, DTYPES[precision], unpack=plan.unpacked)
    return trainer


def make_trainer(
    model: Any, tokenizer: Any, rows: Sequence[Encoded], lora: LoraConfig, arguments: SFTConfig
) -> Trainer:
    """Return TRL's trainer on rows of ids and labels, with adapters in fp32 for every precision of the base."""
    dataset = datasets.Dataset.from_list([{"input_ids": row.ids, "labels": label_ids(row)} for row in rows])
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    if arguments.padding_free:
        use_packed_attention(model)
        trainer.data_collator = add_lengths(trainer.data_collator)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # TRL casts them to bf16 on a 4-bit base: small updates would be rounded away, fp16 cannot be unscaled.
            parameter.data = parameter.data.float()
    if arguments.use_cpu:
        replace_dropout(trainer.model)
    trainer.model.train()  # it is loaded in eval mode, in which 4-bit layers must not run (held_out_loss.py)
    return trainer


def training_arguments(
    settings: "TrainSettings",
    precision: str,
    seed: int,
    checkpoints: Path,
    batches: MicroBatches,
    *,
    checkpointing: bool = False,
) -> SFTConfig:
    """Return TRL's arguments for the recipe; TRL's own changes to the rows (cutting, packing) and reports are off."""
    cuda = torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=batches.rows,
        gradient_accumulation_steps=batches.count,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        logging_steps=1,  # the monitor needs every step, and reports at the recipe's interval
        # fp16's loss scaler skips a step with NaN, which must not enter the trainer's sum of losses.
        logging_nan_inf_filter=precision == "fp16",
        save_strategy="steps",
        save_steps=settings.save_steps,
        max_length=None,
        packing=False,  # TRL's packing fills sequences to a length: other rows per step, in another order
        padding_free=batches.packed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=not cuda,
        gradient_checkpointing=checkpointing,
        dataloader_pin_memory=cuda,
        optim="adamw_torch_fused" if not cuda and distributed.world_size() == 1 else "adamw_torch",
        ddp_find_unused_parameters=False,  # every micro-batch uses every adapter
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
    )
    arguments.report_to = []  # an environment variable makes transformers add one; metrics.py adds the recipe's
    return arguments


def lora_config(settings: "TrainSettings") -> LoraConfig:
    """Return PEFT's configuration of the recipe's adapter."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        bias="none",
        use_rslora=settings.variant == "rslora",
        use_dora=settings.variant == "dora",
        task_type="CAUSAL_LM",
    )


def count_parameters(model: Any) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters; a 4-bit tensor counts its unpacked values."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, int(model.num_parameters())
