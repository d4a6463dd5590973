"""stages/train/trainer.py: what is trainable, and gradients of accumulated rows."""

from pathlib import Path
from typing import Any

import pytest
from support.models.tiny_models import tensors
from support.tolerances import backward_error

torch = pytest.importorskip("torch")
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from support.models.training import ROWS, FirstGradient, apart, gradients, moved

from tutor.prompt.encoding import Encoded, RowEncoder
from tutor.stages.train.audit import encode_rows
from tutor.stages.train.trainer import count_parameters

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]


# --- the gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "precision"), [("nf4", "bf16"), ("nf4", "fp32"), ("int8", "bf16"), ("none", "bf16")]
)
def test_only_adapters_are_trainable_and_they_are_fp32(
    quantization: str, precision: str, trainer_of: Any, rows: list[Encoded]
) -> None:
    model = trainer_of(rows, quantization, precision).model
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 4 * 2
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert all(".lora_" in name for name in trained)
    layers = [module for name, module in model.named_modules() if name.endswith("_proj.base_layer")]
    kinds = {"nf4": Linear4bit, "int8": Linear8bitLt, "none": torch.nn.Linear}
    assert {type(layer) for layer in layers} == {kinds[quantization]}
    if quantization == "nf4":
        states = [layer.weight.quant_state for layer in layers]
        assert {(state.quant_type, state.nested) for state in states} == {("nf4", True)}


def test_count_parameters_unpacks_4_bit_weights(trainer_of: Any, rows: list[Encoded], tiny: Path) -> None:
    plain = sum(weight.numel() for weight in tensors(tiny).values())
    adapter = 8 * 2 * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64)
    for quantization in ("nf4", "int8", "none"):
        assert count_parameters(trainer_of(rows, quantization).model) == (adapter, plain + adapter)


def test_rows_are_loaded_without_workers_and_shared_memory(trainer_of: Any, rows: list[Encoded]) -> None:
    """A worker passes rows through /dev/shm, of which a container has 64 MB."""
    assert trainer_of(rows).get_train_dataloader().num_workers == 0


@pytest.mark.slow
def test_accumulated_gradient_equals_that_of_one_batch(trainer_of: Any, tokenizer: Any, rows: list[Encoded]) -> None:
    long = {"instruction": "¿Y todo junto?", "response": " ".join(row["response"] for row in ROWS[:6])}
    mixed = [*rows[:3], *encode_rows(RowEncoder(tokenizer), [long], 1024)]
    first = []
    for batch, accumulation, packing in ((1, 4, False), (4, 1, False), (1, 4, True)):
        trainer = trainer_of(mixed, batch_size=batch, accumulation=accumulation, packing=packing, dropout=0.0)
        trainer.args.max_grad_norm = 0.0  # no clipping
        torch.manual_seed(2)
        moved(trainer.model)
        wanted = gradients(trainer.model, mixed)
        trainer.model.zero_grad()
        callback = FirstGradient()
        trainer.add_callback(callback)
        trainer.train()
        bound = backward_error(trainer.model.get_base_model().config, sum(len(row.ids) for row in mixed))
        assert apart(callback.gradients, wanted) < bound
        first.append(callback.gradients)
    assert max(apart(other, first[0]) for other in first[1:]) < bound
