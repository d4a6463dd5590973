"""The memory estimate, compared with measured allocations and peaks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.workloads import ALL, ATTENTION, DEMO, LARGE, SPECIFIED, TINY, workloads

from tutor.machine.memory import estimate
from tutor.machine.memory.estimate import StepWorkload, memory
from tutor.machine.memory.plan import MemoryRequest
from tutor.machine.memory.shapes import Shape, read_shape
from tutor.recipe.settings import TrainSettings

WIDE = Shape(4096, 2, 14336, 32, 8, 128, 49152, tied=False)  # two layers as wide as the 8B's


def on_cpu(tokens: int, quantization: str, precision: str, **changes: Any) -> StepWorkload:
    """Workload of the measurements below: rank 16 on all matrices, no dropout, half of each row scored."""
    plain: dict[str, Any] = {"rank": 16, "targets": ALL, "dropout": False, "checkpointing": False, "gpu": False}
    row = changes.pop("row", tokens)
    made = replace(SPECIFIED, tokens=tokens, longest=row // 2, quantization=quantization, precision=precision)
    return replace(made, **{**plain, **changes})


SPECIFIED_ADAPTER = {"rank": 8, "targets": ATTENTION, "dropout": True}


@pytest.mark.parametrize(
    ("shape", "training", "measured"),
    [
        pytest.param(DEMO, on_cpu(512, "none", "bf16"), 948e6, id="135M"),
        pytest.param(DEMO, on_cpu(512, "none", "bf16", checkpointing=True), 540e6, id="135M, checkpointing"),
        pytest.param(DEMO, on_cpu(512, "nf4", "bf16"), 948e6, id="135M, NF4"),
        pytest.param(DEMO, on_cpu(512, "none", "fp32"), 1176e6, id="135M, fp32"),
        pytest.param(DEMO, on_cpu(512, "none", "bf16", **SPECIFIED_ADAPTER), 993e6, id="135M, dropout"),
        pytest.param(WIDE, on_cpu(512, "nf4", "bf16", checkpointing=True, **SPECIFIED_ADAPTER), 667e6, id="8B's width"),
        pytest.param(WIDE, on_cpu(512, "nf4", "bf16", **SPECIFIED_ADAPTER), 869e6, id="8B's width, all kept"),
    ],
)
def test_step_allocations_are_within_a_tenth_of_the_profiler(shape, training, measured):
    """The profiler's peak of a second step, above the memory before it."""
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
        pytest.param(TINY, on_cpu(4096, "none", "fp32", row=1024, **SPECIFIED_ADAPTER), 1208e6, id="tiny"),
        pytest.param(TINY, on_cpu(4096, "nf4", "fp32", row=1024, **SPECIFIED_ADAPTER), 1230e6, id="tiny, NF4"),
    ],
)
def test_total_is_within_a_tenth_of_the_measured_peak(shape, training, measured):
    assert sum(memory(shape, training).values()) == pytest.approx(measured, rel=0.1)


MIDDLE = Shape(1024, 4, 3072, 8, 4, 128, 49152, tied=True)


@pytest.mark.parametrize(
    ("family", "precision", "quantization", "changes", "measured"),
    [
        ("qwen3", "bf16", "none", {}, 330e6),
        ("qwen3", "fp32", "none", {}, 204e6),
        ("gemma3_text", "bf16", "none", {}, 347e6),
        ("gemma3_text", "fp32", "none", {}, 220e6),
        ("smollm3", "bf16", "none", {}, 317e6),
        ("qwen2", "fp32", "none", {"fused": True}, 151e6),
        ("llama", "bf16", "none", {"dora": True}, 342e6),
        ("llama", "bf16", "nf4", {"dora": True, "dropout": True}, 363e6),
        ("llama", "fp32", "nf4", {"dora": True, "dropout": True}, 300e6),
        ("llama", "fp32", "nf4", {"dora": True}, 241e6),
    ],
)
def test_families_and_dora_are_within_a_tenth_of_the_profiler(family, precision, quantization, changes, measured):
    adapter = {"rank": 8, "targets": ATTENTION, "head": "chunked"}
    parts = memory(replace(MIDDLE, family=family), on_cpu(512, quantization, precision, **{**adapter, **changes}))
    assert parts["activations"] + parts["workspace"] + parts["gradients"] == pytest.approx(measured, rel=0.1)


def test_dora_trains_a_magnitude_for_each_output():
    plain, dora = (estimate.trainable_parameters(MIDDLE, 8, ("q_proj", "k_proj"), dora=each) for each in (False, True))
    assert dora - plain == 4 * (1024 + 512)


SMALL = Shape(384, 5, 896, 6, 2, 64, 49152, tied=True)  # scripts/bench_train.py's 26m


@pytest.mark.parametrize(
    ("shape", "tokens", "changes", "measured"),
    [
        pytest.param(SMALL, 883, {}, 182e6, id="26m"),
        pytest.param(DEMO, 850, {}, 880e6, id="135M"),
    ],
)
def test_chunked_head_is_within_a_tenth_of_the_measurement(shape, tokens, changes, measured):
    """The specification's settings in NF4 and bf16 on a CPU, two rows of data/tutor.jsonl a pass."""
    parts = memory(shape, on_cpu(tokens, "nf4", "bf16", head="chunked", **SPECIFIED_ADAPTER, **changes))
    found = parts["activations"] + parts["workspace"] + parts["gradients"]
    assert found == pytest.approx(measured, rel=0.11)


def test_varied_lengths_cost_kernels_where_onednn_multiplies():
    def process(**changes: Any) -> int:
        training = on_cpu(883, "nf4", changes.pop("precision", "bf16"), head="chunked", **SPECIFIED_ADAPTER, **changes)
        return memory(SMALL, training)["process"]

    assert process(varied=True) - process() == pytest.approx(estimate.KERNEL_BYTES, abs=1)
    assert process(varied=True, precision="fp32") == process(precision="fp32")
    fused = {"precision": "fp32", "fused": True}
    assert process(varied=True, **fused) - process(**fused) == pytest.approx(estimate.KERNEL_BYTES, abs=1)
    assert process(varied=True, gpu=True) == process(gpu=True)


def test_nf4_weights_keep_embedding_and_head_in_16_bits():
    """3.6 GB for 6.98 billion numbers at 4.127 bits, 2.1 GB for the rest."""
    assert memory(LARGE, SPECIFIED)["weights"] == pytest.approx(3.600e9 + 2.102e9, rel=1e-3)
    assert memory(LARGE, replace(SPECIFIED, quantization="int8"))["weights"] == pytest.approx(6.98e9 + 2.1e9, rel=0.01)
    assert memory(LARGE, replace(SPECIFIED, quantization="none"))["weights"] == pytest.approx(16.06e9, rel=1e-3)


def test_specified_8b_training_fits_8_gb():
    assert 6e9 < sum(memory(LARGE, SPECIFIED).values()) < 8e9


def test_head_tile_on_a_gpu_has_full_width():
    """Measured: 698 MB for 4,096 tokens in fp32, of which main memory holds only the pages that are written."""
    training = on_cpu(4096, "none", "fp32", row=1024, **SPECIFIED_ADAPTER)
    assert memory(TINY, replace(training, gpu=True))["workspace"] > 4 * 4096 * 32768
    assert memory(TINY, training)["workspace"] < 2e8


def test_certain_bytes_on_a_gpu_exclude_assumptions():
    parts = memory(LARGE, SPECIFIED)
    assert estimate.certain_bytes(parts, gpu=True) == sum(parts.values()) - parts["process"]
    assert estimate.certain_bytes(parts, gpu=False) == sum(parts.values())


def test_unpacked_weights_add_the_matrices_in_the_precision():
    step = on_cpu(850, "nf4", "fp32", fused=True)
    parts, unpacked = memory(DEMO, step), memory(DEMO, replace(step, unpacked=True))
    assert unpacked["weights"] - parts["weights"] == pytest.approx(4 * DEMO.matrix_parameters, abs=1)
    assert unpacked["workspace"] <= parts["workspace"]


def test_scoring_takes_only_a_part_of_the_logits():
    """256 tokens of 128,256 logits: in bf16, in fp32, and their logarithms."""
    training = replace(SPECIFIED, tokens=256)
    parts = memory(LARGE, training)
    assert parts["workspace"] + parts["activations"] == pytest.approx(256 * 128256 * 10)
    longer = memory(LARGE, replace(SPECIFIED, tokens=4096, longest=4096))
    assert longer["workspace"] < 1e9


def test_waiting_layers_reduce_gpu_weights():
    layer = estimate.layer_bytes(LARGE, "nf4", 2)
    weights = [memory(LARGE, replace(SPECIFIED, resident=count))["weights"] for count in (None, 32, 31, 30, 0)]
    assert weights[0] == weights[1] == weights[2]  # one waiting layer is copied to the GPU at a time
    assert weights[2] - weights[3] == pytest.approx(layer, rel=0.04)  # its scales stay on the GPU
    assert weights[4] == pytest.approx(2.1e9 + layer + 31 * layer / 32, rel=0.01)
    assert estimate.waiting_bytes(LARGE, replace(SPECIFIED, resident=30)) == pytest.approx(2 * layer, abs=1)
    assert estimate.waiting_bytes(LARGE, SPECIFIED) == 0


@settings(deadline=None)
@given(workloads, st.sampled_from([LARGE, DEMO, TINY]))
def test_larger_workload_never_takes_less_memory(training, shape):
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


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*autograd kernel was not registered")
@pytest.mark.parametrize("targets", [ATTENTION, ALL], ids=["attention", "all layers"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_activations_equal_the_tensors_autograd_keeps(
    targets: tuple[str, ...], checkpointing: Any, fused: Any, tiny: Path
) -> None:
    torch = pytest.importorskip("torch")
    from peft import get_peft_model

    from tutor.engines.hf.loading import load_base
    from tutor.stages.train.kernels.fast_dropout import replace_dropout
    from tutor.stages.train.kernels.fused_layers import fuse_layers
    from tutor.stages.train.trainer import lora_config

    chosen = TrainSettings(target_modules=list(targets))
    model = load_base(tiny, "none", "bf16")
    model = get_peft_model(model, lora_config(chosen))
    for weight in model.parameters():
        weight.data = weight.data.float() if weight.requires_grad else weight.data
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    replace_dropout(model)
    if fused:
        fuse_layers(model, torch.bfloat16, unpack=False)
    model.train()
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(saved: Any) -> Any:
        if saved.untyped_storage().data_ptr() not in own:
            kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    # Autocast as in the trainer; its copies of the adapters are not activations.
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        hidden = model.get_base_model().model(input_ids=torch.arange(256)[None] % 100, use_cache=False)
    found = sum(saved.untyped_storage().nbytes() for saved in kept.values())
    assert hidden.last_hidden_state.shape == (1, 256, 64)
    request = MemoryRequest("auto", "auto", "bf16", tokens=256, rank=8, targets=targets, on_gpu=False)
    step = replace(request.workload("none", checkpointing=checkpointing), fused=fused)
    expected = memory(read_shape(tiny), step)["activations"]
    if checkpointing:
        last_norm = 4 * 256 * 64  # its input in fp32: with the head's part, and once for all layers
        assert found == pytest.approx(expected + last_norm, rel=0.05)
    else:
        assert found == pytest.approx(expected, rel=0.15)
