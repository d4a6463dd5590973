"""Disk space and time of a run, compared with measured values; the check of free disk space."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.models.workloads import ATTENTION, DEMO, LARGE

from tutor.engines.answer_limit import answer_limit
from tutor.errors import HostError
from tutor.formats.models import base_source
from tutor.machine import host, run_cost
from tutor.machine.matmul_rate import MatmulRates
from tutor.machine.memory.estimate import trainable_parameters
from tutor.machine.memory.row_lengths import RowLengths
from tutor.machine.run_cost import RunWorkload, disk_bytes, estimate_seconds, gguf_bytes
from tutor.recipe.quantizations import BF16, F16, KINDS
from tutor.recipe.settings import DataSettings, GenerateSettings, OllamaSettings, Recipe

WORK = RunWorkload(
    fetched=True,
    made=False,
    adapters=trainable_parameters(LARGE, 8, ATTENTION),
    tokens=570_000,
    scored=0,
    checkpointing=True,
    quantizations=["Q4_K_M", "Q5_K_M", "Q8_0"],
    served=("Q4_K_M",),
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
def test_gguf_bytes_bound_real_files_closely(kind, size):
    """The demo's 135M, whose rows do not fill the K-quants' blocks."""
    assert size <= gguf_bytes(DEMO, kind) < 1.06 * size


def test_gguf_bytes_exist_for_every_quantization():
    assert {F16, BF16, *KINDS} == set(run_cost.GGUF_BITS)
    sizes = [gguf_bytes(LARGE, kind) for kind in ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "F16")]
    assert sizes == sorted(sizes)


def test_disk_bytes_of_the_8b_match_reported_values():
    """85 to 90 GB, Ollama's copies included (docs/facts.md, 9)."""
    assert sum(disk_bytes(LARGE, WORK).values()) == pytest.approx(85e9, rel=0.05)


def test_disk_bytes_count_only_written_files():
    local = replace(WORK, fetched=False)
    assert disk_bytes(LARGE, WORK)["hub"] == pytest.approx(16.06e9, rel=1e-3)
    assert (disk_bytes(LARGE, local)["hub"], disk_bytes(LARGE, local)["base"]) == (0, 0)
    compared = disk_bytes(LARGE, replace(WORK, with_base=True))["convert"] - disk_bytes(LARGE, WORK)["convert"]
    assert compared == gguf_bytes(LARGE, "Q4_K_M"), "the base's F16 file is gone before the tutor's is there"
    small = disk_bytes(DEMO, replace(WORK, with_base=True))["convert"] - disk_bytes(DEMO, WORK)["convert"]
    assert small == gguf_bytes(DEMO, "Q4_K_M") + gguf_bytes(DEMO, F16), "one process converts both"


def test_auto_quantization_counts_all_that_may_be_served():
    recipe = Recipe(data=DataSettings(prompts=120), ollama=OllamaSettings(quantization="auto"))
    work = run_cost.run_workload(recipe, LARGE, None, checkpointing=False)
    assert work.served == recipe.convert.quantizations
    written = {**dict.fromkeys(recipe.convert.quantizations, 2), F16: 1}  # of the tutor, and of the base
    assert disk_bytes(LARGE, work)["convert"] >= sum(gguf_bytes(LARGE, kind) * n for kind, n in written.items())
    assert disk_bytes(LARGE, work)["publish"] == 4 * gguf_bytes(LARGE, "Q8_0")
    assert estimate_seconds(LARGE, work, None, 2)["evaluate"]
    named = replace(work, served=["Q4_K_M"])
    more = estimate_seconds(LARGE, work, None, 2)["convert"] - estimate_seconds(LARGE, named, None, 2)["convert"]
    assert more == pytest.approx(LARGE.parameters / 9e6), "the base is made in one more K-quant"


def test_auto_answers_take_the_longest_answer_or_row():
    recipe = Recipe(data=DataSettings(prompts=120), generate=GenerateSettings(max_new_tokens="auto"))

    def answer(rows):
        return run_cost.run_workload(recipe, LARGE, rows, checkpointing=False).answer

    assert answer(RowLengths([600], 600, exact=True, answer=300)) == 330
    assert answer(RowLengths([600], 600)) == 660
    assert answer(RowLengths([6000], 6000)) == answer(None) == answer_limit(recipe.train.max_length)


def test_seconds_fall_with_cores_and_need_a_rate():
    assert estimate_seconds(LARGE, WORK, None, 2)["train"] is None
    few, many = estimate_seconds(LARGE, WORK, 1e14, 2), estimate_seconds(LARGE, WORK, 1e14, 16)
    assert few["convert"] > many["convert"]
    assert few["evaluate"] > many["evaluate"]
    assert few["train"] == many["train"]


def test_seconds_of_the_8b_match_measurements():
    """On two cores 78 s to merge the plain way, 15 minutes a K-quant (docs/facts.md, 9)."""
    took = estimate_seconds(LARGE, replace(WORK, quantizations=["Q4_K_M"]), None, 2)
    assert took["merge"] == pytest.approx(78, rel=0.3)
    assert took["convert"] == pytest.approx(33 + 15 * 60, rel=0.1)


@pytest.mark.parametrize(
    ("name", "card"),
    [("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100"), ("Tesla T4", "T4"), ("NVIDIA L40S", "L40S")],
)
def test_gpu_rate_of_known_gpus_is_found_by_name(name, card):
    assert run_cost.gpu_rate(name) == run_cost.GPU_SHARE * run_cost.PEAK_RATES[card]


@pytest.mark.parametrize(("precision", "seconds"), [("fp32", 51.4), ("bf16", 27.2)])
def test_cpu_rate_matches_the_demo_in_both_precisions(precision, seconds):
    """32 rows of 361 tokens on two cores (docs/facts.md, 13)."""
    rate = run_cost.cpu_rate(DEMO, precision, MatmulRates(bf16=953e9, fp32=222e9), 2)
    assert 4 * DEMO.parameters * 32 * 361 / rate == pytest.approx(seconds, rel=0.1)


def test_cpu_rate_of_a_wide_model_is_nearer_to_the_products():
    rates = MatmulRates(bf16=953e9, fp32=222e9)
    assert run_cost.cpu_rate(DEMO, "fp32", rates, 2) < run_cost.cpu_rate(LARGE, "fp32", rates, 2) < rates.fp32


def test_gpu_rate_of_unknown_gpu_is_none():
    assert run_cost.gpu_rate("NVIDIA T400") is None


def test_downloaded_files_need_no_more_disk(machine, based_on, tmp_path):
    recipe = based_on()
    before = run_cost.disk_sizes(recipe, LARGE, ["base"])
    assert before == {"hub": 2 * LARGE.parameters}
    snapshot = base_source.hub_snapshot(recipe.base.source)
    snapshot.mkdir(parents=True)
    with (snapshot / "model-00001-of-00002.safetensors").open("wb") as file:
        file.truncate(9 * 10**9)
    assert run_cost.disk_sizes(recipe, LARGE, ["base"])["hub"] == before["hub"] - 9 * 10**9
    (snapshot / "model-00002-of-00002.safetensors").symlink_to("gone")
    assert run_cost.disk_sizes(recipe, LARGE, ["base"])["hub"] == before["hub"] - 9 * 10**9
    with (snapshot / "model-00003-of-00003.safetensors").open("wb") as file:
        file.truncate(9 * 10**9)
    assert run_cost.disk_sizes(recipe, LARGE, ["base"]) == {}


def test_folders_on_one_disk_are_added_up(tmp_path):
    _, _, free = host.free_disk(tmp_path)
    half = free * 2 // 3
    assert run_cost.short_disks([(tmp_path / "a", half)]) == []
    ((place, left, need),) = run_cost.short_disks([(tmp_path / "a" / "b", half), (tmp_path, half)])
    assert (place, need) == (tmp_path, 2 * half)
    assert left < need


def test_require_disk_names_work_and_both_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 * 10**9))
    run_cost.require_disk(tmp_path, 3e9, "merging")
    with pytest.raises(HostError, match=r"has 3\.0 GB free, merging needs 4\.5 GB; free disk space") as caught:
        run_cost.require_disk(tmp_path, 4.5e9, "merging")
    assert caught.value.code == 4


def test_checkpoint_bytes_hold_adapter_and_two_moments():
    assert run_cost.checkpoint_bytes(1000) == 3 * 4 * 1000 + (2 << 20)
