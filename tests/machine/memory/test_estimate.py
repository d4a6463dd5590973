"""Bytes and seconds from plain numbers, against what was measured; a setting that fits."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutor.machine import run_cost
from tutor.machine.memory import estimate
from tutor.machine.memory.estimate import StepWorkload, memory, trainable_parameters
from tutor.machine.memory.plan import suggest_settings
from tutor.machine.memory.shapes import SHAPES, Shape, shape_of
from tutor.machine.run_cost import RunWorkload, disk_bytes, gguf_bytes, seconds
from tutor.recipe.quantizations import F16, KINDS
from tutor.recipe.settings import TrainSettings

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
LARGE = SHAPES["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
DEMO = Shape(576, 30, 1536, 9, 3, 64, 49152, tied=True)
WIDE = Shape(4096, 2, 14336, 32, 8, 128, 49152, tied=False)  # two layers as wide as the 8B's
TINY = SHAPES["tiny"]
CONFIG = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SPECIFIED = StepWorkload(
    tokens=1024,
    longest=1024,
    quantization="nf4",
    precision="bf16",
    rank=8,
    targets=ATTENTION,
    dropout=True,
    checkpointing=True,
    head="tiled",
    gpu=True,
)
"""data/tutor.toml on a GPU."""


def on_cpu(tokens: int, quantization: str, precision: str, **changes: Any) -> StepWorkload:
    """As the measurements below were made: rank 16 on all matrices, no dropout, half of each row scored."""
    plain: dict[str, Any] = {"rank": 16, "targets": ALL, "dropout": False, "checkpointing": False, "gpu": False}
    row = changes.pop("row", tokens)
    made = replace(SPECIFIED, tokens=tokens, longest=row // 2, quantization=quantization, precision=precision)
    return replace(made, **{**plain, **changes})


SPECIFICATION = {"rank": 8, "targets": ATTENTION, "dropout": True}


# Shapes


def test_parameters_are_counted_to_the_last():
    assert LARGE.parameters == 8_030_261_248
    assert shape_of(CONFIG) == DEMO
    assert DEMO.parameters == 134_515_008


def test_what_a_configuration_may_leave_out_has_llamas_defaults():
    fewer = {name: value for name, value in CONFIG.items() if name not in ("head_dim", "num_key_value_heads")}
    assert shape_of({**fewer, "tie_word_embeddings": False}) == replace(DEMO, kv_heads=9, tied=False)
    assert shape_of({**CONFIG, "head_dim": None}) == DEMO


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, 0, -1, "576", 1.5, True, 1 << 40, [576]])
def test_a_size_that_cannot_be_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        shape_of({**CONFIG, name: value})


def test_the_tiny_models_shape_is_what_its_stage_makes():
    pytest.importorskip("torch")
    from tutor.stages.base.tiny_model import VOCABULARY, _model

    assert shape_of(_model(VOCABULARY, 1).config.to_dict()) == TINY


# Memory


@pytest.mark.parametrize(
    ("shape", "training", "measured"),
    [
        pytest.param(DEMO, on_cpu(512, "none", "bf16"), 948e6, id="135M"),
        pytest.param(DEMO, on_cpu(512, "none", "bf16", checkpointing=True), 540e6, id="135M, checkpointing"),
        pytest.param(DEMO, on_cpu(512, "nf4", "bf16"), 948e6, id="135M, NF4"),
        pytest.param(DEMO, on_cpu(512, "none", "fp32"), 1176e6, id="135M, fp32"),
        pytest.param(DEMO, on_cpu(512, "none", "bf16", **SPECIFICATION), 993e6, id="135M, dropout"),
        pytest.param(WIDE, on_cpu(512, "nf4", "bf16", checkpointing=True, **SPECIFICATION), 667e6, id="8B's width"),
        pytest.param(WIDE, on_cpu(512, "nf4", "bf16", **SPECIFICATION), 869e6, id="8B's width, all kept"),
    ],
)
def test_what_a_step_allocates_is_within_a_tenth_of_what_pytorch_says_it_did(shape, training, measured):
    """The profiler's peak of a second step, above what was there before it."""
    parts = memory(shape, training)
    assert parts["activations"] + parts["workspace"] + parts["gradients"] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("shape", "training", "measured"),
    [
        pytest.param(DEMO, on_cpu(256, "none", "bf16", checkpointing=True), 1853e6, id="135M, 256 tokens"),
        pytest.param(DEMO, on_cpu(512, "nf4", "bf16"), 2514e6, id="135M, NF4"),
        pytest.param(DEMO, on_cpu(1024, "nf4", "bf16"), 3613e6, id="135M, NF4, 1024 tokens"),
        pytest.param(DEMO, on_cpu(1024, "nf4", "bf16", checkpointing=True), 2762e6, id="135M, NF4, checkpointing"),
        pytest.param(DEMO, on_cpu(512, "none", "fp32"), 3174e6, id="135M, fp32"),
        pytest.param(DEMO, on_cpu(1024, "none", "bf16", row=256), 3770e6, id="135M, four rows"),
        pytest.param(TINY, on_cpu(4096, "none", "fp32", row=1024, **SPECIFICATION), 1208e6, id="tiny"),
        pytest.param(TINY, on_cpu(4096, "nf4", "fp32", row=1024, **SPECIFICATION), 1230e6, id="tiny, NF4"),
    ],
)
def test_the_whole_is_within_a_tenth_of_the_processes_measured_peak(shape, training, measured):
    assert sum(memory(shape, training).values()) == pytest.approx(measured, rel=0.1)


SMALL = Shape(384, 5, 896, 6, 2, 64, 49152, tied=True)  # scripts/bench_train.py's 26m


@pytest.mark.parametrize(
    ("shape", "tokens", "changes", "measured"),
    [
        pytest.param(SMALL, 883, {}, 182e6, id="26m"),
        pytest.param(DEMO, 850, {}, 880e6, id="135M"),
    ],
)
def test_a_packed_pass_with_the_chunked_head_is_within_a_tenth_of_what_was_measured(shape, tokens, changes, measured):
    """The specification's settings in NF4 and bf16 on a CPU, two rows of data/tutor.jsonl a pass."""
    parts = memory(shape, on_cpu(tokens, "nf4", "bf16", head="chunked", **SPECIFICATION, **changes))
    found = parts["activations"] + parts["workspace"] + parts["gradients"]
    assert found == pytest.approx(measured, rel=0.11)


def test_passes_of_many_lengths_cost_a_cpu_their_kernels_in_16_bits_alone():
    def process(**changes: Any) -> int:
        training = on_cpu(883, "nf4", changes.pop("precision", "bf16"), head="chunked", **SPECIFICATION, **changes)
        return memory(SMALL, training)["process"]

    assert process(varied=True) - process() == pytest.approx(estimate.KERNELS, abs=1)
    assert process(varied=True, precision="fp32") == process(precision="fp32")
    assert process(varied=True, gpu=True) == process(gpu=True)


def test_nf4_keeps_embedding_and_head_in_16_bits():
    """3.6 GB for 6.98 billion numbers at 4.127 bits, 2.1 GB for the rest."""
    assert memory(LARGE, SPECIFIED)["weights"] == pytest.approx(3.600e9 + 2.102e9, rel=1e-3)
    assert memory(LARGE, replace(SPECIFIED, quantization="int8"))["weights"] == pytest.approx(6.98e9 + 2.1e9, rel=0.01)
    assert memory(LARGE, replace(SPECIFIED, quantization="none"))["weights"] == pytest.approx(16.06e9, rel=1e-3)


def test_an_8b_of_the_specification_trains_on_8_gb():
    assert 6e9 < sum(memory(LARGE, SPECIFIED).values()) < 8e9


def test_a_gpu_holds_the_whole_tile_of_a_small_vocabulary_too():
    """Measured: 698 MB for 4,096 tokens in fp32, of which main memory keeps but what is touched."""
    training = on_cpu(4096, "none", "fp32", row=1024, **SPECIFICATION)
    assert memory(TINY, replace(training, gpu=True))["workspace"] > 4 * 4096 * 32768
    assert memory(TINY, training)["workspace"] < 2e8


def test_what_is_assumed_of_a_gpu_is_not_certain():
    parts = memory(LARGE, SPECIFIED)
    assert estimate.certain_bytes(parts, gpu=True) == sum(parts.values()) - parts["process"]
    assert estimate.certain_bytes(parts, gpu=False) == sum(parts.values())


def test_held_out_rows_never_take_more_than_a_part_of_their_logits():
    """256 tokens of 128,256 logits: in bf16, in fp32, and their logarithms."""
    training = replace(SPECIFIED, tokens=256)
    parts = memory(LARGE, training)
    assert parts["workspace"] + parts["activations"] == pytest.approx(256 * 128256 * 10)
    longer = memory(LARGE, replace(SPECIFIED, tokens=4096, longest=4096))
    assert longer["workspace"] < 1e9


def test_layers_in_main_memory_leave_the_gpu():
    layer = estimate.layer_bytes(LARGE, "nf4", 2)
    weights = [memory(LARGE, replace(SPECIFIED, resident=count))["weights"] for count in (None, 32, 31, 30, 0)]
    assert weights[0] == weights[1] == weights[2]  # the one that waits passes through
    assert weights[2] - weights[3] == pytest.approx(layer, rel=0.04)  # but its scales stay
    assert weights[4] == pytest.approx(2.1e9 + layer + 31 * layer / 32, rel=0.01)
    assert estimate.waiting_bytes(LARGE, replace(SPECIFIED, resident=30)) == pytest.approx(2 * layer, abs=1)
    assert estimate.waiting_bytes(LARGE, SPECIFIED) == 0


trainings = st.builds(
    StepWorkload,
    tokens=st.integers(16, 8192),
    longest=st.integers(16, 2048),
    quantization=st.sampled_from(["nf4", "int8", "none"]),
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
    rank=st.integers(1, 64),
    targets=st.sampled_from([ATTENTION, ALL, ("q_proj",)]),
    dropout=st.booleans(),
    checkpointing=st.booleans(),
    head=st.sampled_from(["tiled", "chunked"]),
    gpu=st.booleans(),
)


@settings(deadline=None)
@given(trainings, st.sampled_from([LARGE, DEMO, TINY]))
def test_more_of_anything_never_takes_less(training, shape):
    def whole(**changes: Any) -> int:
        return sum(memory(shape, replace(training, **changes)).values())

    assert all(size >= 0 for size in memory(shape, training).values())
    rounding = 8  # bytes
    assert whole(tokens=2 * training.tokens) >= whole() - rounding
    assert whole(rank=2 * training.rank) > whole()
    assert whole(longest=2 * training.longest) >= whole()
    assert whole(dropout=True) >= whole(dropout=False) - rounding
    assert memory(shape, replace(training, checkpointing=True))["activations"] <= memory(shape, training)["activations"]
    weights = [memory(shape, replace(training, quantization=kind))["weights"] for kind in ("nf4", "int8", "none")]
    assert weights == sorted(weights)


# A setting that fits


def whole_of(parts: dict[str, int]) -> int:
    return sum(parts.values())


KNOWN = {"gradient_checkpointing", "pass_tokens", "batch_size", "quantization", "max_length"}
EFFECTS = {
    "gradient_checkpointing": lambda training, _: replace(training, checkpointing=True),
    "pass_tokens": lambda training, tokens: replace(training, tokens=tokens),
    "batch_size": lambda training, rows: replace(training, tokens=rows * training.longest),
    "quantization": lambda training, kind: replace(training, quantization=kind),
    "max_length": lambda training, length: replace(training, longest=length, tokens=length),
}


@settings(deadline=None)
@given(trainings, st.integers(int(1e9), int(4e10)), st.sets(st.sampled_from(sorted(KNOWN))))
def test_what_is_proposed_fits_and_nothing_of_it_can_be_left_out(training, budget, known):
    training = replace(training, tokens=max(training.tokens, training.longest))
    found = suggest_settings(LARGE, training, budget, known, whole_of)
    if sum(memory(LARGE, training).values()) <= budget:
        assert found == {}
    if not found:
        return
    assert set(found) <= known | {"batch_size", "quantization", "max_length"}

    def whole(names: list[str]) -> int:
        changed = training
        for name in names:
            changed = EFFECTS[name](changed, found[name])
        return sum(memory(LARGE, changed).values())

    assert whole(list(found)) <= budget
    assert all(whole([other for other in found if other != name]) > budget for name in found)


@pytest.mark.parametrize(
    ("gigabytes", "changes", "proposed"),
    [
        (24, {"quantization": "none"}, {}),
        (12, {"quantization": "none"}, {"quantization": "nf4"}),
        (8, {"tokens": 8192}, {"pass_tokens": 2048}),
        (9, {"checkpointing": False}, {"gradient_checkpointing": True}),
        (6.8, {}, {"max_length": 512}),
        (4, {}, None),
    ],
)
def test_the_mildest_setting_is_proposed(gigabytes, changes, proposed):
    assert suggest_settings(LARGE, replace(SPECIFIED, **changes), int(gigabytes * 1e9), KNOWN, whole_of) == proposed


def test_without_packing_fewer_rows_a_pass_are_proposed():
    rows = replace(SPECIFIED, tokens=8 * 256, longest=256, packed=False)
    one_row = sum(memory(LARGE, replace(rows, tokens=256)).values())
    assert suggest_settings(LARGE, rows, one_row, {"batch_size"}, whole_of) == {"batch_size": 1}


def test_a_small_gpu_is_offered_layers_in_main_memory_before_shorter_rows():
    found = suggest_settings(LARGE, SPECIFIED, 5000 << 20, {*KNOWN, "max_memory.gpu"}, whole_of)
    assert found == {"max_memory.gpu": "5000MiB"}
    assert TrainSettings.model_validate({"max_memory": {"gpu": found["max_memory.gpu"]}}).max_memory.gpu == "5000MiB"
    assert suggest_settings(LARGE, replace(SPECIFIED, gpu=False), 5000 << 20, {"max_memory.gpu"}, whole_of) is None


def test_the_settings_that_are_proposed_without_being_asked_for_exist():
    assert {"batch_size", "quantization", "max_length"} <= TrainSettings.model_fields.keys()


# Files and time

PLAN = RunWorkload(
    fetched=True,
    made=False,
    adapters=trainable_parameters(LARGE, 8, ATTENTION),
    tokens=570_000,
    scored=0,
    checkpointing=True,
    quantizations=["Q4_K_M", "Q5_K_M", "Q8_0"],
    served="Q4_K_M",
    with_base=False,
    prompts=120,
    answer=515,
)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("F16", 270_885_696),
        ("Q8_0", 144_810_816),
        ("Q5_K_M", 112_103_232),
        ("Q5_K_S", 109_974_336),
        ("Q5_0", 104_997_696),
        ("Q4_K_M", 105_453_888),
        ("Q4_K_S", 102_039_360),
        ("Q4_0", 91_726_656),
    ],
)
def test_a_gguf_is_not_larger_than_estimated_and_hardly_smaller(kind, size):
    """The demo's 135M, whose rows do not fill the K-quants' blocks."""
    assert size <= gguf_bytes(DEMO, kind) < 1.06 * size


def test_every_quantization_of_a_recipe_has_a_size():
    assert {F16, *KINDS} == set(run_cost.GGUF_BITS)
    sizes = [gguf_bytes(LARGE, kind) for kind in ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")]
    assert sizes == sorted(sizes)


def test_the_8bs_chain_needs_the_disk_that_others_reported():
    """85 to 90 GB, Ollama's copies included (docs/facts.md, 9)."""
    assert sum(disk_bytes(LARGE, PLAN).values()) == pytest.approx(85e9, rel=0.05)


def test_only_what_is_made_is_counted():
    local = replace(PLAN, fetched=False)
    assert disk_bytes(LARGE, PLAN)["hub"] == pytest.approx(16.06e9, rel=1e-3)
    assert (disk_bytes(LARGE, local)["hub"], disk_bytes(LARGE, local)["base"]) == (0, 0)
    compared = disk_bytes(LARGE, replace(PLAN, with_base=True))["convert"] - disk_bytes(LARGE, PLAN)["convert"]
    assert compared == pytest.approx(16.2e9 + 5e9, rel=0.02)


def test_time_that_nobody_can_tell_is_none_and_more_cores_take_less():
    assert seconds(LARGE, PLAN, None, 2)["train"] is None
    few, many = seconds(LARGE, PLAN, 1e14, 2), seconds(LARGE, PLAN, 1e14, 16)
    assert few["convert"] > many["convert"]
    assert few["evaluate"] > many["evaluate"]
    assert few["train"] == many["train"]


def test_the_8bs_reference_times_come_out_again():
    """On two cores 78 s to merge the plain way, 15 minutes a K-quant (docs/facts.md, 9)."""
    took = seconds(LARGE, replace(PLAN, quantizations=["Q4_K_M"]), None, 2)
    assert took["merge"] == pytest.approx(78, rel=0.3)
    assert took["convert"] == pytest.approx(33 + 15 * 60, rel=0.1)


@pytest.mark.parametrize(
    ("name", "card"),
    [("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("Tesla T4", "T4"), ("NVIDIA L40S", "L40S")],
)
def test_cards_are_known_by_name(name, card):
    assert run_cost.gpu_rate(name) == run_cost.GPU_SHARE * run_cost.PEAKS[card]


def test_a_card_that_is_not_known_has_no_rate():
    assert run_cost.gpu_rate("NVIDIA T400") is None
