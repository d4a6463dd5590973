"""The plan of a training: quantization, checkpointing, resident layers, micro-batches; suggested settings."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.models.workloads import ATTENTION, LARGE, SPECIFIED, workloads

from tutor.errors import HostError, RecipeError
from tutor.machine.device import DeviceMemory
from tutor.machine.memory import plan as memory_plan
from tutor.machine.memory.batching import MAX_TOKENS, MicroBatches, split_step
from tutor.machine.memory.estimate import memory
from tutor.machine.memory.plan import MemoryRequest, TrainingPlan, suggest_settings
from tutor.machine.memory.row_lengths import RowLengths
from tutor.recipe.settings import TrainSettings

GB = 10**9
REQUEST = MemoryRequest("auto", "auto", "bf16", tokens=1024, rank=8, targets=ATTENTION)


def device(free: float, total: float = 0, *, gpu: bool = True) -> DeviceMemory:
    """A device with this memory in GB; without a total, all of it is available."""
    return DeviceMemory(int(free * GB), int((total or free) * GB), "a device", gpu)


def plan(wanted: MemoryRequest, free: float, total: float = 0) -> TrainingPlan:
    batches = MicroBatches(1, 1, wanted.tokens, packed=wanted.packed)
    return memory_plan.plan(LARGE, wanted, batches, device(free, total, gpu=wanted.on_gpu))


def chosen(free: float, total: float = 0, *, on_gpu: bool = True, longest: int = 480, **set_to: Any) -> int:
    """Tokens of the largest micro-batch of the specification's 8B, ten rows a step."""
    asked = TrainSettings.model_validate({"batch_size": 1, "accumulation": 10, "max_length": 512, **set_to})
    rows = RowLengths([longest] * 250, 250 * longest, exact=True)
    most = memory_plan.choose_tokens(LARGE, asked, "bf16", rows, device(free, total, gpu=on_gpu), 1)
    return split_step(asked.model_copy(update={"pass_tokens": most}), rows.lengths).tokens


def test_micro_batch_on_a_gpu_fills_available_memory() -> None:
    assert chosen(80) == 5 * 480 <= MAX_TOKENS < 10 * 480
    assert [chosen(free) for free in (7.1, 7.7, 9)] == sorted(chosen(free) for free in (7.1, 7.7, 9))
    assert chosen(7.1) < chosen(9)
    assert chosen(1) == 480  # nothing fits: one row a micro-batch


def test_gpu_limit_shrinks_micro_batch_before_streaming() -> None:
    fewer = chosen(80, max_memory={"gpu": "7.1GB"})
    assert fewer == chosen(7.1)
    assert plan(replace(REQUEST, quantization="nf4", tokens=fewer, longest=480, gpu=int(7.1 * GB)), 80).resident == 32


def test_micro_batch_shrinks_before_quality_settings_change() -> None:
    """16 bits and kept activations take priority over fewer micro-batches."""
    single = replace(REQUEST, tokens=512, longest=480)
    free = next(tenth / 10 for tenth in range(100, 600) if plan(single, tenth / 10).quantization == "none")
    assert chosen(free, quantization="auto") < chosen(80)
    pair = replace(REQUEST, quantization="nf4", tokens=960, longest=480)
    free = next(free for free in range(7, 40) if not plan(pair, free).checkpointing)
    assert plan(replace(pair, tokens=chosen(free)), free).checkpointing is False


def test_micro_batch_on_a_cpu_ignores_other_programs() -> None:
    assert chosen(1, 24, on_gpu=False) == chosen(20, 24, on_gpu=False)


def test_pass_tokens_in_the_recipe_are_kept() -> None:
    assert chosen(1, pass_tokens=970) == 960


@pytest.mark.parametrize(
    ("text", "count"), [("6GiB", 6 * 2**30), ("6GB", 6 * GB), ("500 MB", 500_000_000), ("1.5MiB", 1_572_864)]
)
def test_byte_amounts_are_parsed_with_their_unit(text: str, count: int) -> None:
    assert memory_plan.parse_bytes(text) == count


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
def test_auto_prefers_16_bits_and_kept_activations(free: int, quantization: str, checkpointing: Any) -> None:
    found = plan(REQUEST, free)
    assert (found.quantization, found.checkpointing, found.resident) == (quantization, checkpointing, 32)
    assert found.needed <= free * GB


def test_explicit_settings_are_kept() -> None:
    for quantization in ("nf4", "int8", "none"):
        for checkpointing in (True, False):
            wanted = replace(REQUEST, quantization=quantization, checkpointing=checkpointing)
            found = plan(wanted, 40)
            assert (found.quantization, found.checkpointing) == (quantization, checkpointing)


def test_base_that_cannot_fit_is_refused_with_both_sizes() -> None:
    with pytest.raises(
        HostError,
        match=r"the base takes 5\.7 GB in nf4 and this training 6\.4 GB, and 5\.0 GB are free; .*train\.max_memory",
    ) as one:
        plan(REQUEST, 5)
    assert one.value.code == 4
    with pytest.raises(HostError, match=r"16\.1 GB in none .* and 12\.0 GB are free"):
        plan(replace(REQUEST, quantization="none"), 12)


def test_main_memory_counts_in_total_not_as_available() -> None:
    wanted = replace(REQUEST, on_gpu=False)
    assert plan(wanted, 1, 64).checkpointing
    with pytest.raises(HostError, match=r"and 8\.0 GB are installed"):
        plan(wanted, 1, 8)


def test_cpu_unpacks_nf4_weights_only_where_memory_suffices() -> None:
    wanted = replace(REQUEST, quantization="nf4", on_gpu=False)
    plans = {free: plan(wanted, free, 64) for free in (64, 30, 14)}
    assert {free: made.unpacked for free, made in plans.items()} == {64: True, 30: True, 14: False}
    assert "nf4 unpacked to bf16" in str(plans[64])
    assert "unpacked" not in str(plans[14])
    assert plans[64].needed - plans[14].needed > 1.8 * LARGE.matrix_parameters
    assert plans[30].needed <= 30 * GB
    assert not any(plan(replace(wanted, **one), 64).unpacked for one in ({"on_gpu": True}, {"quantization": "int8"}))


def test_gpu_limit_streams_layers_and_is_kept() -> None:
    found = plan(replace(REQUEST, gpu=memory_plan.parse_bytes("6GiB")), 24)
    assert (found.quantization, found.checkpointing) == ("nf4", True)
    assert 0 < found.resident < 32
    assert found.needed <= 6 * 2**30
    whole = plan(replace(REQUEST, gpu=20 * GB), 24)
    assert whole.resident == 32


def test_limits_that_nothing_fits_are_refused() -> None:
    with pytest.raises(HostError, match=r"without its layers .* take \d\.\d GB, and 2\.0 GB are available for them"):
        plan(replace(REQUEST, gpu=2 * GB), 24)
    with pytest.raises(
        HostError, match=r"of 32 layers take \d\.\d GB of RAM, more than train\.max_memory\.cpu \(0\.1 GB\)"
    ):
        plan(replace(REQUEST, gpu=5 * GB, cpu=100_000_000), 24)
    with pytest.raises(RecipeError, match="int8"):
        plan(replace(REQUEST, gpu=5 * GB, quantization="int8"), 24)


@given(
    st.integers(1, 200), st.one_of(st.none(), st.integers(1, 200)), st.sampled_from(["auto", "nf4", "none"]),
    st.integers(16, 8192),
)  # fmt: skip
def test_plan_with_a_limit_stays_within_it(free: int, gpu: int | None, quantization: Any, tokens: int) -> None:
    wanted = replace(REQUEST, quantization=quantization, tokens=tokens, gpu=gpu and gpu * GB // 2)
    try:
        found = plan(wanted, free / 2)
    except HostError:
        return
    assert 0 <= found.resident <= 32
    assert found.resident == 32 or found.checkpointing
    if gpu is not None:
        assert found.needed <= min(free, gpu) * GB // 2


# Suggested settings


def all_parts(parts: dict[str, int]) -> int:
    return sum(parts.values())


ALLOWED = {"gradient_checkpointing", "pass_tokens", "batch_size", "quantization", "max_length"}

EFFECTS = {
    "gradient_checkpointing": lambda training, _: replace(training, checkpointing=True),
    "pass_tokens": lambda training, tokens: replace(training, tokens=tokens),
    "batch_size": lambda training, rows: replace(training, tokens=rows * training.longest),
    "quantization": lambda training, kind: replace(training, quantization=kind),
    "max_length": lambda training, length: replace(training, longest=length, tokens=length),
}


@hypothesis_settings(deadline=None)
@given(workloads, st.integers(int(1e9), int(4e10)), st.sets(st.sampled_from(sorted(ALLOWED))))
def test_suggested_settings_fit_and_each_is_needed(training, budget, known):
    training = replace(training, tokens=max(training.tokens, training.longest))
    found = suggest_settings(LARGE, training, budget, known, all_parts)
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
def test_suggestion_is_the_least_invasive_setting(gigabytes, changes, proposed):
    assert suggest_settings(LARGE, replace(SPECIFIED, **changes), int(gigabytes * 1e9), ALLOWED, all_parts) == proposed


def test_suggestion_without_packing_is_fewer_rows():
    rows = replace(SPECIFIED, tokens=8 * 256, longest=256, packed=False)
    one_row = sum(memory(LARGE, replace(rows, tokens=256)).values())
    assert suggest_settings(LARGE, rows, one_row, {"batch_size"}, all_parts) == {"batch_size": 1}


def test_suggestion_for_small_gpu_streams_before_cutting_rows():
    found = suggest_settings(LARGE, SPECIFIED, 5000 << 20, {*ALLOWED, "max_memory.gpu"}, all_parts)
    assert found == {"max_memory.gpu": "5000MiB"}
    assert TrainSettings.model_validate({"max_memory": {"gpu": found["max_memory.gpu"]}}).max_memory.gpu == "5000MiB"
    assert suggest_settings(LARGE, replace(SPECIFIED, gpu=False), 5000 << 20, {"max_memory.gpu"}, all_parts) is None


def test_suggested_settings_exist_in_the_recipe():
    assert {"batch_size", "quantization", "max_length"} <= TrainSettings.model_fields.keys()
