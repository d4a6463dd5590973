"""A Llama as odd repositories have it: biases, no architecture, -1 for no token, weights beside those that count."""

import json
import shutil
from pathlib import Path

from support.models.tiny_models import SEED, edit, tensors


def make_odd(tiny: Path, folder: Path) -> Path:
    """Write a copy of the tiny model with random biases and the other oddities; return its folder."""
    import torch
    from safetensors.torch import save_file

    shutil.copytree(tiny, folder)
    weights = tensors(folder)
    torch.manual_seed(SEED)
    for name in [name for name in weights if "_proj" in name]:
        weights[name.replace(".weight", ".bias")] = (0.05 * torch.randn(len(weights[name]))).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    stale = {name: weight for name, weight in weights.items() if name.endswith(".bias")}
    for name in ("consolidated.safetensors", "model-00002-of-00002.safetensors"):
        save_file(stale, folder / name)
    edit(folder / "config.json", drop="architectures", attention_bias=True, mlp_bias=True, pad_token_id=-1)
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": -1}), "utf-8")
    return folder
