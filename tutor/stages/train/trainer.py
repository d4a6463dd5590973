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

from tutor.engines.hf.loading import load_base
from tutor.errors import RecipeError
from tutor.machine import distributed
from tutor.machine.distributed import DistributedStepSampler
from tutor.machine.memory.batching import MicroBatches
from tutor.machine.memory.plan import TrainingPlan
from tutor.prompt import Encoded
from tutor.stages.train.audit import labels
from tutor.stages.train.kernels.chunked_loss import IGNORED, summed_loss
from tutor.stages.train.kernels.fast_dropout import quicken_dropout
from tutor.stages.train.kernels.layer_streaming import stream_layers
from tutor.stages.train.kernels.packed_attention import attend_within_rows, with_lengths

if TYPE_CHECKING:
    from tutor.recipe.settings import TrainSettings


class Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer; without TRL's own measures (entropy, accuracy) on the CPU."""

    def get_train_dataloader(self) -> Any:
        """The passes of this process: its share of each step."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        rows, size = self.train_dataset, self.args.per_device_train_batch_size
        blank = {"input_ids": rows[0]["input_ids"][:1], "labels": [IGNORED]}
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
        """The summed loss of a pass, divided by the tokens with loss of all passes of the step, or by its own."""
        if return_outputs or inputs["input_ids"].device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs, labels = {name: value for name, value in inputs.items() if name != "labels"}, inputs["labels"]
        base = self.accelerator.unwrap_model(model).get_base_model()
        hidden = self._hidden(model, base.base_model, inputs)
        loss = summed_loss(hidden, labels, base.get_output_embeddings().weight)
        if num_items_in_batch is None:
            return loss / (labels[:, 1:] != IGNORED).sum()
        # Of all processes' tokens; their gradients are averaged, so that each counts as many times as there are.
        return loss / num_items_in_batch * self.accelerator.num_processes

    def _hidden(self, model: Any, decoder: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The decoder's last hidden states. Gradients meet only where several processes go through `model` itself."""
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
    """The trainer on the base as planned, which may leave layers in RAM."""
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"
    sharded = distributed.is_sharded()
    if plan.streams and distributed.world_size() > 1:
        raise RecipeError("train.max_memory leaves layers in RAM of a single process", "remove it, or the launcher")
    if sharded and plan.quantization == "int8":
        raise RecipeError("FSDP cannot shard int8 weights", "set train.quantization to nf4 or none")
    model = load_base(model_folder, plan.quantization, precision, sharded=sharded, in_ram=plan.streams or sharded)
    trainer = make_trainer(model, tokenizer, rows, lora, arguments)
    if not distributed.is_main_process():
        torch.manual_seed(arguments.seed + distributed.rank())  # dropout of its own; the adapter is the first's
    if plan.streams:
        stream_layers(trainer.model, plan.resident, arguments.device)
    return trainer


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


def training_arguments(
    settings: "TrainSettings",
    precision: str,
    seed: int,
    checkpoints: Path,
    batches: MicroBatches,
    *,
    checkpointing: bool = False,
) -> SFTConfig:
    """TRL's arguments for the recipe's numbers; what it would do by itself to the rows (cut, pack, report) is off."""
    cuda = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=batches.rows,
        gradient_accumulation_steps=batches.count,
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
        padding_free=batches.packed,
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


def count_parameters(model: Any) -> tuple[int, int]:
    """Trainable and all parameters; a 4-bit weight counts as the numbers it stands for."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, int(model.num_parameters())
