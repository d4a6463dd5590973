"""The tiny Llama, made once a session, and what tests make of it: changed copies, shards, adapters, stage folders."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from support.processes.command import ROOT
from support.shared import shared

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read once at import; TRL reports every trainer that is made
torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file

from tutor.artifacts.stage_folder import writing
from tutor.recipe.settings import Recipe
from tutor.stages.base.stage import facts_of
from tutor.stages.base.tiny_model import make_tiny

DATA = ROOT / "data" / "tutor.jsonl"
SEED = 7
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@cache
def spanish() -> str:
    """Some KB of Spanish with code: the first rows of the data set, read at the first call."""
    with DATA.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(12), strict=False)]
    return "\n".join(f"{row['instruction']}\n{row['response']}" for row in rows)


def tiny_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model's folder, made once a test run."""
    return shared(factory, "tiny", lambda folder: make_tiny(folder, spanish(), SEED))


def edit(path: Path, drop: str = "", **changes: Any) -> None:
    """Change keys of a JSON file, and drop one."""
    values = {**json.loads(path.read_text("utf-8")), **changes}
    values.pop(drop, None)
    path.write_text(json.dumps(values, ensure_ascii=False), "utf-8")


def tensors(folder: Path) -> dict[str, Any]:
    """All weights of a model folder, whichever file they lie in."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def in_two_shards(folder: Path) -> Path:
    """Split the one weight file of a folder in two, with the index that names them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:8], "model-00002-of-00002.safetensors": names[8:]}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, folder / file, metadata={"format": "pt"})
    return write_index(folder)


def write_index(folder: Path) -> Path:
    """Write the index of all weight files of a folder."""
    held = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    index = {
        "metadata": {"total_size": sum(weight.nbytes for weights in held.values() for weight in weights.values())},
        "weight_map": {name: file for file, weights in held.items() for name in weights},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


def base_stage(model: Path, folder: Path) -> Path:
    """A base stage's folder over a model folder that is somewhere else."""
    folder.mkdir(parents=True)
    facts = facts_of(model, f"path:{model.name}", str(model))
    (folder / "base.json").write_text(json.dumps(asdict(facts)), "utf-8")
    return folder


def adapter_stage(model: Path, folder: Path, base_weights: str, **lora: Any) -> Path:
    """A train stage's folder: PEFT's own adapter of `model`, its B drawn at random as training would move it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(ATTENTION), "task_type": "CAUSAL_LM", **lora}
    torch.manual_seed(SEED)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with writing(folder, "train", {}) as (out, results):
        adapted.save_pretrained(out)
        results["base_weights"] = base_weights
    return folder


def recipe(path: Path, **sections: Mapping[str, Any]) -> Recipe:
    """A recipe with some settings, with `path` as its file."""
    return Recipe.model_validate({"seed": SEED, **sections}).model_copy(update={"path": path})
