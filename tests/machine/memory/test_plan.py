"""What a training takes of a card, by the specification's 8B, and what is decided from it; layers that wait in RAM."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import base_stage, recipe, tensors

torch = pytest.importorskip("torch")
from support.training import ROWS, FirstGradient, apart, moved, settings
from transformers import PrinterCallback

from tutor.engines.hf.loading import load_base
from tutor.errors import ArtifactError, HostError, RecipeError
from tutor.formats.models.model_folder import load_tokenizer
from tutor.machine import capacity
from tutor.machine.device import DeviceMemory, training_memory
from tutor.machine.memory import estimate, shapes
from tutor.machine.memory import plan as memory_plan
from tutor.machine.memory.batching import MAX_TOKENS, MicroBatches, split_step
from tutor.machine.memory.plan import MemoryRequest, TrainingPlan
from tutor.machine.memory.row_lengths import RowLengths
from tutor.stages.train.audit import encode_rows
from tutor.stages.train.held_out_loss import mean_loss
from tutor.stages.train.kernels import layer_streaming as offload
from tutor.stages.train.kernels.fast_dropout import replace_dropout
from tutor.stages.train.trainer import load_trainer, lora_config, training_arguments

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]

GB = 10**9
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
EIGHT = shapes.SHAPES["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
WANTED = MemoryRequest("auto", "auto", "bf16", tokens=1024, rank=8, targets=ATTENTION)


def device(free: float, total: float = 0, *, gpu: bool = True) -> DeviceMemory:
    """A device with this memory in GB; all of it available where no total is given."""
    return DeviceMemory(int(free * GB), int((total or free) * GB), "a device", gpu)


def plan(wanted: MemoryRequest, free: float, total: float = 0) -> TrainingPlan:
    batches = MicroBatches(1, 1, wanted.tokens, packed=wanted.packed)
    return memory_plan.plan(EIGHT, wanted, batches, device(free, total, gpu=wanted.on_gpu))


def chosen(free: float, total: float = 0, *, on_gpu: bool = True, longest: int = 480, **set_to: Any) -> int:
    """Tokens of the largest pass of the specification's 8B, ten rows a step."""
    asked = settings(**{"batch_size": 1, "accumulation": 10, "max_length": 512, **set_to})
    rows = RowLengths([longest] * 250, 250 * longest, exact=True)
    most = memory_plan.choose_tokens(EIGHT, asked, "bf16", rows, device(free, total, gpu=on_gpu), 1)
    return split_step(asked.model_copy(update={"pass_tokens": most}), rows.lengths).tokens


# --- the tokens of a pass ---------------------------------------------------------------------------------------------


def test_a_pass_is_as_large_as_a_gpu_has_room_for() -> None:
    assert chosen(80) == 5 * 480 <= MAX_TOKENS < 10 * 480
    assert [chosen(free) for free in (7.1, 7.7, 9)] == sorted(chosen(free) for free in (7.1, 7.7, 9))
    assert chosen(7.1) < chosen(9)
    assert chosen(1) == 480  # nothing fits: a row a pass, and the plan says what is lacking


def test_a_limit_on_the_gpu_makes_passes_smaller_before_layers_wait_in_ram() -> None:
    fewer = chosen(80, max_memory={"gpu": "7.1GB"})
    assert fewer == chosen(7.1)
    assert plan(replace(WANTED, quantization="nf4", tokens=fewer, longest=480, gpu=int(7.1 * GB)), 80).resident == 32


def test_what_must_be_given_up_is_never_more_than_tokens() -> None:
    """16 bits where they fit, and no activations twice, come before fewer passes."""
    single = replace(WANTED, tokens=512, longest=480)
    free = next(tenth / 10 for tenth in range(100, 600) if plan(single, tenth / 10).quantization == "none")
    assert chosen(free, quantization="auto") < chosen(80)
    pair = replace(WANTED, quantization="nf4", tokens=960, longest=480)
    free = next(free for free in range(7, 40) if not plan(pair, free).checkpointing)
    assert plan(replace(pair, tokens=chosen(free)), free).checkpointing is False


def test_main_memory_that_others_use_does_not_change_the_passes() -> None:
    assert chosen(1, 24, on_gpu=False) == chosen(20, 24, on_gpu=False)


def test_a_number_in_the_recipe_is_the_number() -> None:
    assert chosen(1, pass_tokens=970) == 960


# --- the estimates ---------------------------------------------------------------------------------------------------


def test_a_shape_counts_what_the_files_hold(tiny: Path) -> None:
    shape = shapes.read_shape(tiny)
    assert shape.parameters == sum(weight.numel() for weight in tensors(tiny).values())
    assert shape == shapes.SHAPES["tiny"]
    assert estimate.trainable_parameters(shape, 8, ATTENTION) == 7168


def test_a_folder_without_a_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": "wide"}')
    with pytest.raises(ArtifactError, match=r"config\.json: num_attention_heads is None"):
        shapes.read_shape(tmp_path)


@pytest.mark.parametrize(
    ("text", "count"), [("6GiB", 6 * 2**30), ("6GB", 6 * GB), ("500 MB", 500_000_000), ("1.5MiB", 1_572_864)]
)
def test_amounts_are_read_as_written(text: str, count: int) -> None:
    assert memory_plan.parse_bytes(text) == count


@pytest.mark.parametrize("targets", [ATTENTION, (*ATTENTION, *MLP)], ids=["attention", "all layers"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(targets: tuple[str, ...], checkpointing: Any, tiny: Path) -> None:
    chosen = settings(target_modules=list(targets))
    model = load_base(tiny, "none", "bf16")
    from peft import get_peft_model

    model = get_peft_model(model, lora_config(chosen))
    for weight in model.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    replace_dropout(model)
    model.train()
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(saved: Any) -> Any:
        if saved.untyped_storage().data_ptr() not in own:
            kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    # As the trainer computes; the copies of the adapters that autocast makes are no activations.
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        hidden = model.get_base_model().model(input_ids=torch.arange(256)[None] % 100, use_cache=False)
    found = sum(saved.untyped_storage().nbytes() for saved in kept.values())
    assert hidden.last_hidden_state.shape == (1, 256, 64)
    wanted = replace(WANTED, tokens=256, targets=targets, on_gpu=False)
    training = wanted.workload("none", checkpointing=checkpointing)
    expected = estimate.memory(shapes.read_shape(tiny), training)["activations"]
    if checkpointing:
        last_norm = 4 * 256 * 64  # its input in fp32: with the head's part, and once for all layers
        assert found == pytest.approx(expected + last_norm, rel=0.05)
    else:
        assert found == pytest.approx(expected, rel=0.15)


# --- the decisions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "quantization", "checkpointing"),
    [
        (80, "none", False),
        (24, "none", False),
        (18, "none", True),
        (17, "nf4", False),
        (12, "nf4", True),
        (8, "nf4", True),
    ],
)
def test_auto_takes_16_bits_where_they_fit_and_keeps_activations_where_they_fit(
    free: int, quantization: str, checkpointing: Any
) -> None:
    found = plan(WANTED, free)
    assert (found.quantization, found.checkpointing, found.resident) == (quantization, checkpointing, 32)
    assert found.needed <= free * GB


def test_what_the_recipe_says_is_done() -> None:
    for quantization in ("nf4", "int8", "none"):
        for checkpointing in (True, False):
            wanted = replace(WANTED, quantization=quantization, checkpointing=checkpointing)
            found = plan(wanted, 40)
            assert (found.quantization, found.checkpointing) == (quantization, checkpointing)


def test_a_base_that_cannot_fit_is_refused_with_both_sizes() -> None:
    with pytest.raises(
        HostError,
        match=r"the base takes 5\.7 GB in nf4 and this training 6\.4 GB, and 5\.0 GB are free; .*train\.max_memory",
    ) as one:
        plan(WANTED, 5)
    assert one.value.code == 4
    with pytest.raises(HostError, match=r"16\.1 GB in none .* and 12\.0 GB are free"):
        plan(replace(WANTED, quantization="none"), 12)


def test_main_memory_that_others_hold_may_come_free_and_what_is_not_there_may_not() -> None:
    wanted = replace(WANTED, on_gpu=False)
    assert plan(wanted, 1, 64).checkpointing
    with pytest.raises(HostError, match=r"and 8\.0 GB are there"):
        plan(wanted, 1, 8)


def test_a_limit_keeps_layers_in_ram_and_the_rest_within_it() -> None:
    found = plan(replace(WANTED, gpu=memory_plan.parse_bytes("6GiB")), 24)
    assert (found.quantization, found.checkpointing) == ("nf4", True)
    assert 0 < found.resident < 32
    assert found.needed <= 6 * 2**30
    whole = plan(replace(WANTED, gpu=20 * GB), 24)
    assert whole.resident == 32


def test_a_limit_that_nothing_fits_or_too_little_ram_is_refused() -> None:
    with pytest.raises(HostError, match=r"without its layers .* take \d\.\d GB, and 2\.0 GB are there for them"):
        plan(replace(WANTED, gpu=2 * GB), 24)
    with pytest.raises(
        HostError, match=r"of 32 layers take \d\.\d GB of RAM, more than train\.max_memory\.cpu \(0\.1 GB\)"
    ):
        plan(replace(WANTED, gpu=5 * GB, cpu=100_000_000), 24)
    with pytest.raises(RecipeError, match="int8"):
        plan(replace(WANTED, gpu=5 * GB, quantization="int8"), 24)


@given(
    st.integers(1, 200), st.one_of(st.none(), st.integers(1, 200)), st.sampled_from(["auto", "nf4", "none"]),
    st.integers(16, 8192),
)  # fmt: skip
def test_no_plan_with_a_limit_goes_beyond_it(free: int, gpu: int | None, quantization: Any, tokens: int) -> None:
    wanted = replace(WANTED, quantization=quantization, tokens=tokens, gpu=gpu and gpu * GB // 2)
    try:
        found = plan(wanted, free / 2)
    except HostError:
        return
    assert 0 <= found.resident <= 32
    assert found.resident == 32 or found.checkpointing
    if gpu is not None:
        assert found.needed <= min(free, gpu) * GB // 2


def test_some_memory_is_free() -> None:
    memory = training_memory()
    assert 10**8 < memory.available <= memory.total < 10**14


@pytest.mark.parametrize(
    "changes",
    [{}, {"quantization": "auto", "gradient_checkpointing": True}, {"packing": False, "batch_size": 3, "dropout": 0.0}],
    ids=["packed", "checkpointing", "padded"],
)
def test_the_doctor_and_the_train_stage_say_the_same(changes: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """Before the base is there the doctor knows rows by their characters alone."""
    rows = [{"instruction": f"¿Qué es {'x' * number}?", "response": "Un tipo. " * (1 + number)} for number in range(12)]
    for name, part in (("train", rows[:9]), ("held_out", rows[9:])):
        path = tmp_path / "r" / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    chosen = recipe(tmp_path / "r.toml", train=changes, base={"source": "tiny"})
    before = capacity.forecast_memory(chosen, tmp_path, shapes.SHAPES["tiny"], None)
    base_stage(tiny, tmp_path / "r" / "base")
    facts = json.loads((tmp_path / "r" / "base" / "base.json").read_text())
    (tmp_path / "r" / "base" / "base.json").write_text(json.dumps({**facts, "source": "tiny"}))
    said = capacity.forecast_run(chosen, tmp_path, capacity.find_shape(chosen, tmp_path), None)["memory"]
    encoded = encode_rows(load_tokenizer(tiny), rows[:9], "", chosen.train.max_length)
    found = capacity.plan_training(chosen, {name: tmp_path / "r" / name for name in ("data", "base")})
    assert found.batches.tokens == split_step(chosen.train, [len(row.ids) for row in encoded]).tokens
    assert found.needed == said["need"]
    assert found.parts == said["parts"]
    assert f"about {said['need'] / GB:.2f} GB" in str(found)
    assert before.need == pytest.approx(said["need"], rel=0.01)


# --- layers that wait in RAM -----------------------------------------------------------------------------------------


@pytest.fixture
def rows(tiny: Path) -> list[Any]:
    return encode_rows(load_tokenizer(tiny), ROWS, "", 1024)


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
def test_layers_that_wait_in_ram_train_as_layers_that_do_not(
    quantization: str, tiny: Path, rows: list[Any], tmp_path: Path
) -> None:
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
def test_a_waiting_weight_is_copied_for_its_pass_and_every_copy_is_let_go(
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
def test_a_pass_that_fails_gives_the_waiting_weights_back(tiny: Path, rows: list[Any], tmp_path: Path) -> None:
    model = trainer_on(tiny, rows, tmp_path, "none", 0).model
    held = [weight for weight in model.parameters() if not weight.requires_grad]
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        model(input_ids=torch.tensor([rows[0].ids]))
    assert all(
        one is other for one, other in zip(held, (w for w in model.parameters() if not w.requires_grad), strict=True)
    )


@pytest.mark.pipeline
def test_streaming_says_how_many_layers_wait(tiny: Path, rows: list[Any], tmp_path: Path) -> None:
    model = trainer_on(tiny, rows, tmp_path, "none", 2).model
    assert offload.stream_layers(model, 2, torch.device("cpu")) == 0
    assert offload.stream_layers(model, 0, torch.device("cpu")) == 2
