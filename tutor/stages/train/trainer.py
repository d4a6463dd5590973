"""TRL's trainer with PyTorch's chunked head on the CPU, and with the same steps in any number of processes.

On a GPU the head is TRL's own.

TRL's head folds tiles of 4,096 tokens x 32,768 logits, in one kernel on a GPU, but by plain tensors on the CPU, and
there also for tokens without loss. Measured on one core, 1,790 tokens of 576 numbers and a vocabulary of 49,152, bf16:
5.9 s and 2.1 GB, against 1.3 s and 0.2 GB here.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy
from torch.utils.data import ConcatDataset, DataLoader
from trl import SFTTrainer

from tutor.machine.distributed import DistributedStepSampler

IGNORED = -100
"""The label of an id without loss, by PyTorch's cross entropy."""

CHUNK = LinearCrossEntropyOptions(batch_chunk_size=128)
"""Tokens a tile of logits; between 64 and 256 the time is the same, and the memory grows."""


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


def summed_loss(hidden: torch.Tensor, labels: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood (nats) of the next labels under a Llama's head, in fp32; [rows, tokens, size] in."""
    labels = labels[:, 1:]
    kept = labels != IGNORED
    states = hidden[:, :-1][kept]
    products = exact_products() if states.dtype == head.dtype == torch.bfloat16 else contextlib.nullcontext()
    with products:
        return linear_cross_entropy(states.float(), head.float(), labels[kept], reduction="sum", options=CHUNK)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Matrices in fp32 that hold bf16 numbers, multiplied as such and summed in fp32: AMX is made for that.

    The logits are the same but for the order of the sum; gradients of the states, made at once, round to bf16 inside.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
