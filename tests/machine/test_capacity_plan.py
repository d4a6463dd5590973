"""The plan of a training that capacity.py makes; needs torch and the tiny model."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.files import write_rows
from support.models.tiny_models import base_stage, recipe
from support.models.workloads import LARGE
from support.processes.command import ROOT

from tutor.errors import HostError, RecipeError
from tutor.formats.models.model_folder import load_tokenizer
from tutor.machine import capacity, host
from tutor.machine.device import DeviceMemory, PrecisionChoice
from tutor.machine.matmul_rate import MatmulRates
from tutor.machine.memory.batching import split_step
from tutor.machine.memory.shapes import SHAPES
from tutor.prompt.encoding import RowEncoder
from tutor.recipe.reading import read_recipe
from tutor.stages.train.audit import encode_rows


@pytest.fixture
def inputs(tiny: Path, tmp_path: Path) -> dict[str, Path]:
    """Folders of the stages data, with rows of growing length, and base."""
    data = tmp_path / "inputs" / "data"
    data.mkdir(parents=True)
    rows = [{"instruction": f"¿{number}?", "response": "Un tipo. " * (1 + number)} for number in range(12)]
    write_rows(data / "train.jsonl", rows)
    write_rows(data / "held_out.jsonl", rows[:2])
    base_stage(tiny, tmp_path / "inputs" / "base")
    return {"data": data, "base": tmp_path / "inputs" / "base"}


def test_plan_warns_of_a_gpu_limit_without_gpu(inputs, tmp_path, caplog, monkeypatch):
    memory = DeviceMemory(10 << 30, 16 << 30, "this machine", gpu=False)
    monkeypatch.setattr("tutor.machine.device.training_memory", lambda: memory)
    chosen = recipe(tmp_path / "r.toml", train={"max_memory": {"gpu": "1GiB"}, "precision": "fp32"})
    with caplog.at_level("WARNING"):
        plan = capacity.plan_training(chosen, inputs)
    assert "train.max_memory has no effect without a GPU" in caplog.text
    assert (plan.precision, plan.streams, plan.available) == ("fp32", False, 10 << 30)


def test_plan_counts_rows_and_cuts_them_at_max_length(inputs, tmp_path):
    long = capacity.plan_training(recipe(tmp_path / "r.toml", train={"packing": False}), inputs)
    cut = capacity.plan_training(recipe(tmp_path / "r.toml", train={"packing": False, "max_length": 32}), inputs)
    assert cut.batches.tokens == 32 * cut.batches.rows < long.batches.tokens


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> list[MatmulRates]:
    """A CPU with 24 GiB whose rates are taken from the end of this list."""
    memory = DeviceMemory(20 << 30, 24 << 30, "this machine", gpu=False)
    monkeypatch.setattr("tutor.machine.device.training_memory", lambda: memory)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    rates: list[MatmulRates] = []
    monkeypatch.setattr("tutor.machine.device.find_rates", lambda shape, processor: rates.pop())
    return rates


def test_plan_computes_in_the_faster_precision_and_logs_both(inputs, tmp_path, caplog, cpu):
    cpu[:] = [MatmulRates(9e11, 2e11), MatmulRates(1.56e11, 2.88e11)]
    with caplog.at_level("INFO"):
        slow, fast = (capacity.plan_training(recipe(tmp_path / "r.toml"), inputs) for _ in range(2))
    assert (slow.precision, slow.choice.reason) == ("fp32", "rates")
    assert (fast.precision, fast.choice.reason) == ("bf16", "rates")
    lines = [line for line in caplog.messages if "matrix products" in line]
    assert lines[0] == "computing in fp32: matrix products reach 288 GFLOP/s in fp32, 156 in bf16"
    assert len(lines) == 2


def test_plan_keeps_the_precision_of_a_checkpoint_unmeasured(inputs, tmp_path, caplog, cpu):
    with caplog.at_level("INFO"):
        plan = capacity.plan_training(recipe(tmp_path / "r.toml"), inputs, "bf16")
    assert (plan.precision, plan.choice) == ("bf16", PrecisionChoice("bf16", "checkpoint"))
    assert "computing in bf16 as in the checkpoint" in caplog.messages


def test_plan_prefers_the_recipes_precision_to_a_checkpoints(inputs, tmp_path, cpu):
    plan = capacity.plan_training(recipe(tmp_path / "r.toml", train={"precision": "fp32"}), inputs, "bf16")
    assert (plan.precision, plan.choice.reason) == ("fp32", "setting")


def test_plan_takes_bf16_where_only_that_fits(inputs, tmp_path, caplog, cpu, monkeypatch):
    cpu[:] = [MatmulRates(1e11, 2e11)]
    monkeypatch.setattr(capacity, "read_shape", lambda folder: LARGE)
    with caplog.at_level("INFO"):
        plan = capacity.plan_training(recipe(tmp_path / "r.toml", train={"quantization": "none"}), inputs)
    assert plan.choice == PrecisionChoice("bf16", "memory", MatmulRates(1e11, 2e11))
    assert any(line.startswith("computing in bf16, because fp32 does not fit") for line in caplog.messages)


def test_plan_that_does_not_fit_is_refused(inputs, tmp_path, monkeypatch):
    memory = DeviceMemory(10**6, 10**6, "this machine", gpu=False)
    monkeypatch.setattr("tutor.machine.device.training_memory", lambda: memory)
    with pytest.raises(HostError, match=r"this training .* GB, and 0\.0 GB are installed"):
        capacity.plan_training(recipe(tmp_path / "r.toml"), inputs)


def test_plan_for_ranks_that_cannot_share_a_step_is_refused(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("tutor.machine.distributed.world_size", lambda: 7)
    with pytest.raises(RecipeError, match="7 processes cannot share the"):
        capacity.plan_training(recipe(tmp_path / "r.toml"), inputs)


@pytest.mark.parametrize(
    "changes",
    [{}, {"quantization": "auto", "gradient_checkpointing": True}, {"packing": False, "batch_size": 3, "dropout": 0.0}],
    ids=["packed", "checkpointing", "padded"],
)
def test_forecast_and_training_plan_agree(
    changes: dict[str, Any], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the base exists, the forecast has only the characters of the rows."""
    for module in ("capacity", "device"):
        monkeypatch.setattr(f"tutor.machine.{module}.find_rates", lambda *_: MatmulRates(2e11, 3e11))
    rows = [{"instruction": f"¿Qué es {'x' * number}?", "response": "Un tipo. " * (1 + number)} for number in range(12)]
    for name, part in (("train", rows[:9]), ("held_out", rows[9:])):
        path = tmp_path / "r" / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    chosen = recipe(tmp_path / "r.toml", train=changes, base={"source": "tiny"})
    before = capacity.forecast_memory(chosen, tmp_path, SHAPES["tiny"], None)
    base_stage(tiny, tmp_path / "r" / "base")
    facts = json.loads((tmp_path / "r" / "base" / "base.json").read_text())
    (tmp_path / "r" / "base" / "base.json").write_text(json.dumps({**facts, "source": "tiny"}))
    forecast = capacity.forecast_run(chosen, tmp_path, capacity.find_shape(chosen, tmp_path), None)["memory"]
    encoded = encode_rows(RowEncoder(load_tokenizer(tiny)), rows[:9], chosen.train.max_length)
    found = capacity.plan_training(chosen, {name: tmp_path / "r" / name for name in ("data", "base")})
    assert found.batches.tokens == split_step(chosen.train, [len(row.ids) for row in encoded]).tokens
    assert found.needed == forecast["need"]
    assert found.parts == forecast["parts"]
    assert f"about {forecast['need'] / 1e9:.2f} GB" in str(found)
    assert before.need == pytest.approx(forecast["need"], rel=0.01)


@pytest.mark.parametrize("capability", ["8.6", "7.5"])
def test_laptop_recipe_fits_a_gpu_of_6_gb(machine, tmp_path, capability):
    recipe = read_recipe(ROOT / "data" / "laptop.toml")
    machine.gpu(6.44, 5.7, capability=capability, name="a laptop's GPU")
    assert capacity.refuse_stages(recipe, tmp_path, ["train"])
    gpu = next(iter(host.gpus()))
    forecast = capacity.forecast_run(recipe, tmp_path, capacity.find_shape(recipe, tmp_path), gpu)
    assert forecast["parameters"] == 1_777_030_656
    memory = forecast["memory"]
    assert (memory["fits"], memory["tight"], memory["settings"]) == (True, False, {})
    assert memory["need"] < 5.2e9
    assert capacity.forecast_memory(recipe, tmp_path, capacity.find_shape(recipe, tmp_path), gpu).step.longest > 500
