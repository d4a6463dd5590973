"""What a training takes of a card, by the specification's 8B, and what is decided from it; layers that wait in RAM."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import one_thread, tensors, tiny

torch = pytest.importorskip("torch")
from test_train import ROWS, FirstGradient, apart, moved, settings  # noqa: E402
from transformers import PrinterCallback  # noqa: E402

from tutor.engines import memory, offload  # noqa: E402
from tutor.engines.hf import free_memory, load_base  # noqa: E402
from tutor.engines.memory import Shape, Wanted  # noqa: E402
from tutor.engines.scoring import mean_loss  # noqa: E402
from tutor.errors import HostError, RecipeError  # noqa: E402
from tutor.modelfolder import load_tokenizer  # noqa: E402
from tutor.stages import train  # noqa: E402

__all__ = ["one_thread", "tiny"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered"),
]

GB = 10**9
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
EIGHT = Shape(
    layers=32,
    linears={
        "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
        "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
    },
    rest=2 * 128256 * 4096 + 65 * 4096,
)  # fmt: skip
"""DeepSeek-R1-Distill-Llama-8B."""
WANTED = Wanted("auto", "auto", "bf16", tokens=1024, rank=8, targets=ATTENTION)


def base_gb(quantization: str) -> float:
    layer, rest = memory.weight_bytes(EIGHT, quantization, "bf16")
    return (32 * layer + rest) / GB


# --- the estimates ---------------------------------------------------------------------------------------------------


def test_the_8b_has_its_known_numbers() -> None:
    assert EIGHT.parameters == 8_030_261_248
    assert EIGHT.adapter(8, ATTENTION) == 6_815_744  # 13.6 MB in FP16, 27.3 in fp32
    assert base_gb("none") == pytest.approx(16.06, abs=0.01)
    assert base_gb("int8") == pytest.approx(9.08, abs=0.01)
    assert base_gb("nf4") == pytest.approx(5.70, abs=0.01)


def test_a_shape_counts_what_the_files_hold(tiny: Path) -> None:
    shape = memory.read_shape(tiny)
    assert shape.parameters == sum(weight.numel() for weight in tensors(tiny).values())
    assert (shape.layers, shape.linears["q_proj"], shape.linears["gate_proj"]) == (2, (64, 64), (128, 64))
    assert shape.adapter(8, ATTENTION) == 7168


@pytest.mark.parametrize(
    ("text", "count"), [("6GiB", 6 * 2**30), ("6GB", 6 * GB), ("500 MB", 500_000_000), ("1.5MiB", 1_572_864)]
)
def test_amounts_are_read_as_written(text: str, count: int) -> None:
    assert memory.parse_bytes(text) == count


@pytest.mark.parametrize("targets", [ATTENTION, (*ATTENTION, *MLP)], ids=["attention", "all layers"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(targets: tuple[str, ...], checkpointing: Any, tiny: Path) -> None:
    chosen = settings(target_modules=list(targets))
    model = load_base(tiny, "none", "bf16")
    from peft import get_peft_model

    model = get_peft_model(model, train.lora_config(chosen))
    for weight in model.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(saved: Any) -> Any:
        if saved.untyped_storage().data_ptr() not in own:
            kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        hidden = model.get_base_model().model(input_ids=torch.arange(256)[None] % 100, use_cache=False)
    found = sum(saved.untyped_storage().nbytes() for saved in kept.values())
    assert hidden.last_hidden_state.shape == (1, 256, 64)
    wanted = replace(WANTED, tokens=256, targets=targets)
    estimate = memory.activation_bytes(memory.read_shape(tiny), wanted, checkpointing=checkpointing)
    if not checkpointing:
        assert found <= 1.15 * estimate  # the rotary tables, which every layer shares, weigh more on a tiny model
        assert estimate <= 1.15 * found
    else:
        assert found <= estimate


# --- the decisions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "quantization", "checkpointing"),
    [(80, "none", False), (24, "none", True), (17, "nf4", False), (12, "nf4", True), (8, "nf4", True)],
)
def test_auto_takes_16_bits_where_they_fit_and_keeps_activations_where_they_fit(
    free: int, quantization: str, checkpointing: Any
) -> None:
    plan = memory.plan(EIGHT, WANTED, free * GB)
    assert (plan.quantization, plan.checkpointing, plan.resident) == (quantization, checkpointing, 32)
    assert plan.needed <= free * GB


def test_what_the_recipe_says_is_done() -> None:
    for quantization in ("nf4", "int8", "none"):
        for checkpointing in (True, False):
            wanted = replace(WANTED, quantization=quantization, checkpointing=checkpointing)
            plan = memory.plan(EIGHT, wanted, 17 * GB)
            assert (plan.quantization, plan.checkpointing) == (quantization, checkpointing)


def test_a_base_that_cannot_fit_is_refused_with_both_sizes() -> None:
    with pytest.raises(
        HostError, match=r"the base takes 5\.7 GB in nf4, and 5\.0 GB are free; .*train\.max_memory"
    ) as one:
        memory.plan(EIGHT, WANTED, 5 * GB)
    assert one.value.code == 4
    with pytest.raises(HostError, match=r"16\.1 GB in none, and 12\.0 GB are free"):
        memory.plan(EIGHT, replace(WANTED, quantization="none"), 12 * GB)


def test_a_limit_keeps_layers_in_ram_and_the_rest_within_it() -> None:
    plan = memory.plan(EIGHT, replace(WANTED, gpu=memory.parse_bytes("6GiB")), 24 * GB)
    assert (plan.quantization, plan.checkpointing) == ("nf4", True)
    assert 0 < plan.resident < 32
    assert plan.needed <= 6 * 2**30
    whole = memory.plan(EIGHT, replace(WANTED, gpu=20 * GB), 24 * GB)
    assert whole.resident == 32


def test_a_limit_that_nothing_fits_or_too_little_ram_is_refused() -> None:
    with pytest.raises(HostError, match=r"without its layers .* take \d\.\d GB, and 2\.0 GB are there for them"):
        memory.plan(EIGHT, replace(WANTED, gpu=2 * GB), 24 * GB)
    with pytest.raises(
        HostError, match=r"of 32 layers take \d\.\d GB of RAM, more than train\.max_memory\.cpu \(0\.1 GB\)"
    ):
        memory.plan(EIGHT, replace(WANTED, gpu=5 * GB, cpu=100_000_000), 24 * GB)
    with pytest.raises(RecipeError, match="int8"):
        memory.plan(EIGHT, replace(WANTED, gpu=5 * GB, quantization="int8"), 24 * GB)


@given(
    st.integers(1, 200), st.one_of(st.none(), st.integers(1, 200)), st.sampled_from(["auto", "nf4", "none"]),
    st.integers(16, 8192),
)  # fmt: skip
def test_no_plan_with_a_limit_goes_beyond_it(free: int, gpu: int | None, quantization: Any, tokens: int) -> None:
    wanted = replace(WANTED, quantization=quantization, tokens=tokens, gpu=gpu and gpu * GB // 2)
    try:
        plan = memory.plan(EIGHT, wanted, free * GB // 2)
    except HostError:
        return
    assert 0 <= plan.resident <= 32
    assert plan.resident == 32 or plan.checkpointing
    if gpu is not None:
        assert plan.needed <= min(free, gpu) * GB // 2


def test_some_memory_is_free() -> None:
    assert 10**8 < free_memory() < 10**14


# --- layers that wait in RAM -----------------------------------------------------------------------------------------


@pytest.fixture
def rows(tiny: Path) -> list[Any]:
    return train.encode_rows(load_tokenizer(tiny), ROWS, "", 1024)


def trainer_on(tiny: Path, rows: list[Any], folder: Path, quantization: str, resident: int) -> Any:
    chosen = settings(dropout=0.0)
    torch.manual_seed(1)
    arguments = train.training_arguments(chosen, "fp32", 1, folder / "checkpoints", checkpointing=True)
    plan = memory.Plan(quantization, checkpointing=True, resident=resident, needed=0)
    trainer = train.load_trainer(tiny, load_tokenizer(tiny), rows, train.lora_config(chosen), arguments, plan)
    trainer.remove_callback(PrinterCallback)
    torch.manual_seed(2)
    moved(trainer.model)
    return trainer


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


def test_streaming_says_how_many_layers_wait(tiny: Path, rows: list[Any], tmp_path: Path) -> None:
    model = trainer_on(tiny, rows, tmp_path, "none", 2).model
    assert offload.stream_layers(model, 2, torch.device("cpu")) == 0
    assert offload.stream_layers(model, 0, torch.device("cpu")) == 2
