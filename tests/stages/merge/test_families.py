"""Each family, and each variant of an adapter, trained and merged: the numbers of PEFT's own merge, and one loss."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support.models.families import FAMILIES, family_folder
from support.models.tiny_models import base_stage, recipe, tensors
from support.models.training import HELD_OUT, ROWS

torch = pytest.importorskip("torch")
from support.models.merging import MERGE_MARKS

from tutor.artifacts.manifest import require_stage
from tutor.artifacts.stage_folder import writing
from tutor.engines.hf.loading import DTYPES, load_base
from tutor.formats.architectures import ARCHITECTURES
from tutor.formats.models.model_folder import load_tokenizer
from tutor.machine.capacity import plan_training
from tutor.prompt.encoding import RowEncoder
from tutor.stages.merge import stage as merge
from tutor.stages.train import stage as train_stage
from tutor.stages.train.audit import encode_rows
from tutor.stages.train.held_out_loss import mean_loss

pytestmark = [*MERGE_MARKS, pytest.mark.pipeline]

SETTINGS = {
    "epochs": 1, "accumulation": 2, "dropout": 0.0, "learning_rate": 0.02, "rank": 4, "save_minutes": 0,
    "target_modules": "all-linear", "precision": "fp32",
}  # fmt: skip


def by_peft(model: Path, adapter: Path) -> dict[str, Any]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(loaded, adapter).merge_and_unload(safe_merge=True).state_dict()  # type: ignore[no-any-return]


LENGTHS = {"mistral_window": 128}
"""Maximum tokens of a row where llama.cpp computes no sliding window."""


@pytest.mark.parametrize(
    ("name", "variant", "quantization"),
    [
        ("llama_bias", "lora", "none"),
        ("llama", "dora", "nf4"),
        ("qwen2", "rslora", "nf4"),
        ("qwen3", "lora", "none"),
        ("mistral_window", "lora", "none"),
        ("gemma3_text", "lora", "none"),
        ("smollm3", "lora", "none"),
    ],
)
def test_training_is_merged_as_by_peft(
    name: str,
    variant: str,
    quantization: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = family_folder(tmp_path_factory, name)
    inputs = {"base": base_stage(model, tmp_path / "base"), "data": tmp_path / "data", "train": tmp_path / "adapter"}
    inputs["data"].mkdir()
    for split, rows in (("train", ROWS), ("held_out", HELD_OUT), ("prompts", HELD_OUT)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (inputs["data"] / f"{split}.jsonl").write_text("".join(lines), "utf-8")
    train = {**SETTINGS, "variant": variant, "quantization": quantization, "max_length": LENGTHS.get(name, 1024)}
    chosen = recipe(tmp_path / "r.toml", train=train, merge={"base": "original"}, generate={"context": 1024})
    with caplog.at_level(logging.INFO), writing(inputs["train"], "train", {}) as (folder, written):
        written.update(train_stage.run(chosen, inputs, folder, plan_training(chosen, inputs)))
    assert f"{len(ROWS)} rows audited" in caplog.text
    trained = require_stage(inputs["train"], "train").results
    held_out = trained["held_out"]
    assert held_out["loss_after"] < held_out["loss_before"] - 0.1

    out = tmp_path / "merged"
    out.mkdir()
    results = merge.run(chosen, inputs, out)
    dtype = DTYPES[ARCHITECTURES[FAMILIES[name].model_type].merged_dtype]
    assert results["dtype"] == str(dtype).removeprefix("torch.")
    found, wanted = tensors(out), by_peft(model, inputs["train"])
    assert wanted.keys() - found.keys() <= {"lm_head.weight"}, "tied"
    assert [each for each in found if not torch.equal(found[each], wanted[each].to(dtype))] == []

    held = encode_rows(RowEncoder(load_tokenizer(model)), HELD_OUT, 1024)
    loss = mean_loss(load_base(out, "none", "fp32"), held)
    gained = held_out["loss_before"] - held_out["loss_after"]
    assert abs(loss - held_out["loss_after"]) < (0.02 if quantization == "none" else 0.3) * gained
