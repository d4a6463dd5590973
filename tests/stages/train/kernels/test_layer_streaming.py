"""stages/train/kernels/layer_streaming.py: layers stay in RAM and are copied to the device for each micro-batch."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from support.models.families import family_folder
from support.models.training import ROWS, FirstGradient, apart, moved, settings
from transformers import PrinterCallback

from tutor.engines.hf.loading import load_base
from tutor.formats.models.model_folder import load_tokenizer
from tutor.machine.memory.batching import split_step
from tutor.machine.memory.plan import TrainingPlan
from tutor.prompt.encoding import RowEncoder
from tutor.stages.train import trainer as trainer_module
from tutor.stages.train.audit import encode_rows
from tutor.stages.train.held_out_loss import mean_loss
from tutor.stages.train.kernels import layer_streaming
from tutor.stages.train.trainer import load_trainer, lora_config, training_arguments

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]


@pytest.fixture
def rows(tiny: Path) -> list[Any]:
    return encode_rows(RowEncoder(load_tokenizer(tiny)), ROWS, 1024)


def trainer_on(tiny: Path, rows: list[Any], folder: Path, quantization: str, resident: int) -> Any:
    chosen = settings(dropout=0.0)
    torch.manual_seed(1)
    batches = split_step(chosen, [len(row.ids) for row in rows])
    plan = TrainingPlan(
        "fp32", quantization, checkpointing=True, layers=2, resident=resident, batches=batches, parts={}, available=0
    )
    arguments = training_arguments(chosen, "fp32", 1, folder / "checkpoints", batches, checkpointing=True)
    trainer = load_trainer(tiny, load_tokenizer(tiny), rows, lora_config(chosen), arguments, plan)
    trainer.remove_callback(PrinterCallback)
    torch.manual_seed(2)
    moved(trainer.model)
    return trainer


@pytest.mark.pipeline
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_streamed_layers_train_like_resident_layers(
    quantization: str, tiny: Path, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "fuse_layers", lambda *_, **__: 0)  # on the CPU resident layers are fused
    found = []
    for resident in (2, 1, 0):
        trainer = trainer_on(tiny, rows, tmp_path, quantization, resident)
        before = mean_loss(trainer.model, rows)
        callback = FirstGradient()
        trainer.add_callback(callback)
        trainer.train()
        found.append((before, callback.gradients))
    assert len({before for before, _ in found}) == 1
    assert len(found[0][1]) == 16
    assert apart(found[1][1], found[0][1]) == apart(found[2][1], found[0][1]) == 0.0


@pytest.mark.pipeline
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_streamed_weight_is_copied_and_its_copies_are_freed(
    quantization: str, tiny: Path, rows: list[Any], tmp_path: Path
) -> None:
    model = trainer_on(tiny, rows, tmp_path, quantization, 1).model
    layers = model.get_base_model().model.layers
    layer = layers[1].mlp.up_proj
    waiting, copies = layer.weight, []
    layer.register_forward_pre_hook(lambda module, _: copies.append(weakref.ref(module.weight)))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.tensor([rows[0].ids])
    model(input_ids=ids, labels=ids).loss.backward()
    gc.collect()
    assert len(copies) == 2  # forward, and again in the backward pass
    assert all(copy() is None for copy in copies)
    assert layer.weight is waiting
    assert waiting.data.device.type == "cpu"
    assert not waiting.requires_grad
    resident = layers[0].mlp.up_proj
    assert not resident._forward_pre_hooks


@pytest.mark.pipeline
def test_failed_forward_restores_streamed_weights(tiny: Path, rows: list[Any], tmp_path: Path) -> None:
    model = trainer_on(tiny, rows, tmp_path, "none", 0).model
    held = [weight for weight in model.parameters() if not weight.requires_grad]
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        model(input_ids=torch.tensor([rows[0].ids]))
    assert all(
        one is other for one, other in zip(held, (w for w in model.parameters() if not w.requires_grad), strict=True)
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3_text"])
def test_everything_but_waiting_layers_is_moved(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    base = load_base(family_folder(tmp_path_factory, name), "none", "fp32")
    waiting = base.get_decoder().layers[-1]
    layer_streaming._move(base, {waiting}, torch.device("meta"))
    tensors = [*base.named_parameters(), *base.named_buffers()]
    stays = {name for name, tensor in tensors if tensor.device.type == "cpu"}
    assert stays == {
        f"model.layers.{len(base.get_decoder().layers) - 1}.{name}" for name, _ in waiting.named_parameters()
    }


@pytest.mark.pipeline
def test_streaming_logs_the_number_of_waiting_layers(tiny: Path, rows: list[Any], tmp_path: Path) -> None:
    model = trainer_on(tiny, rows, tmp_path, "none", 2).model
    assert layer_streaming.stream_layers(model, 2, torch.device("cpu")) == 0
    assert layer_streaming.stream_layers(model, 0, torch.device("cpu")) == 2
