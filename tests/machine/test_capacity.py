"""Whether a recipe fits a machine, and the plan of its training."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import base_stage, recipe

from tutor.formats.models.model_folder import load_tokenizer
from tutor.machine import capacity
from tutor.machine.memory.batching import split_step
from tutor.machine.memory.shapes import SHAPES


@pytest.mark.parametrize(
    "changes",
    [{}, {"quantization": "auto", "gradient_checkpointing": True}, {"packing": False, "batch_size": 3, "dropout": 0.0}],
    ids=["packed", "checkpointing", "padded"],
)
def test_forecast_and_training_plan_agree(changes: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """Before the base exists, the forecast knows the rows' characters only."""
    pytest.importorskip("torch")
    from tutor.stages.train.audit import encode_rows

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
    encoded = encode_rows(load_tokenizer(tiny), rows[:9], "", chosen.train.max_length)
    found = capacity.plan_training(chosen, {name: tmp_path / "r" / name for name in ("data", "base")})
    assert found.batches.tokens == split_step(chosen.train, [len(row.ids) for row in encoded]).tokens
    assert found.needed == forecast["need"]
    assert found.parts == forecast["parts"]
    assert f"about {forecast['need'] / 1e9:.2f} GB" in str(found)
    assert before.need == pytest.approx(forecast["need"], rel=0.01)
