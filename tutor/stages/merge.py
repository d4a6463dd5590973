"""The merge stage: adapter + 16-bit base -> merged/ in FP16, tokenizer as it was with our chat template in it.

Tensor by tensor, W + scale·B·A in fp32, rounded once. Refuses an adapter of another base, one whose layers are not all
found, NaN, and values that FP16 cannot hold. Does not load a model and does not quantize.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from tutor.artifacts import read_manifest
from tutor.errors import ArtifactError
from tutor.modelfolder import WEIGHTS, load_tokenizer, open_weights, read_facts, read_json, refuse
from tutor.template import chat_template

if TYPE_CHECKING:
    from tutor.recipe import Recipe

log = logging.getLogger(__name__)

PREFIX = "base_model.model."
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "init_lora_weights": True,  # PiSSA and its kin also change the base
    "alora_invocation_tokens": None,
    "layer_replication": None,
}
"""What a plain LoRA's configuration says; anything else changes the arithmetic, and is refused by name."""
UNTOUCHED = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "LICENSE*", "NOTICE*")
Delta = tuple[torch.Tensor, torch.Tensor, float]
"""A (rank x in), B (out x rank), scale."""


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the merged model folder into `out`; how many layers changed and by how much."""
    del recipe
    facts, base = read_facts(inputs["base"])
    adapter = inputs["train"]
    manifest = read_manifest(adapter)
    trained_on = manifest.results.get("base_weights") if manifest else None
    if trained_on != facts.weights:
        raise ArtifactError(
            f"{adapter} was trained on other weights ({str(trained_on)[:12]}) than {base} ({facts.weights[:12]})",
            "run: tutor train",
        )
    refuse(base)  # it may lie in a cache that was cleaned since its stage ran
    deltas = read_deltas(adapter)
    changed = merge_shards(base, out, deltas)
    copy_rest(base, out, add_bos=facts.add_bos)
    load_tokenizer(out)
    return {"base_weights": facts.weights, "dtype": "float16", **changed}


def read_deltas(adapter: Path) -> dict[str, Delta]:
    """Weight name -> (A, B, scale) of a PEFT LoRA folder.

    Raises ArtifactError for a variant that is not plain LoRA, an incomplete pair, or a value that is no number.
    """
    config = read_json(adapter / "adapter_config.json")
    for name, plain in PLAIN.items():
        if config.get(name, plain) not in (plain, None, [], {}):
            raise ArtifactError(f"{adapter}: {name} = {config[name]!r} is not plain LoRA and cannot be merged here")
    tensors: dict[str, torch.Tensor] = {}
    with open_weights(adapter / "adapter_model.safetensors") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no dict
            tensors[name] = file.get_tensor(name)
    deltas: dict[str, Delta] = {}
    for name, a in tensors.items():
        if not torch.isfinite(a).all():
            raise ArtifactError(f"{adapter}: {name} holds NaN or infinity", "train again with a lower learning_rate")
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        b = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if b is None or b.shape[1] != a.shape[0]:
            raise ArtifactError(f"{adapter}: {layer} has no fitting lora_B")
        scale = _alpha(config, layer) / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        deltas[layer + ".weight"] = (a.float(), b.float(), scale)
    if not deltas or 2 * len(deltas) != len(tensors):
        raise ArtifactError(f"{adapter} holds {len(tensors)} tensors for {len(deltas)} LoRA layers; expected pairs")
    return deltas


def _alpha(config: Mapping[str, Any], layer: str) -> float:
    """A layer's alpha. PEFT's patterns are regular expressions for the end of a name; the first that fits wins."""
    patterns = config.get("alpha_pattern") or {}
    found = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    alpha = next(found, config.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise ArtifactError(f"adapter_config.json: lora_alpha of {layer} is {alpha!r}, no number", "run: tutor train")
    return alpha


def merge_shards(base: Path, out: Path, deltas: Mapping[str, Delta]) -> dict[str, Any]:
    """Write every weight file of `base` to `out` in FP16, the layers of `deltas` merged.

    Returns the number of merged layers and the largest change of one weight. Raises ArtifactError when a layer of the
    adapter is not in the base, has another shape, or a value does not fit FP16.
    """
    left = dict(deltas)
    largest = 0.0
    for path in sorted(base.glob(WEIGHTS)):
        merged: dict[str, torch.Tensor] = {}
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                weight = file.get_tensor(name)
                if name in left:
                    weight, change = merge_one(name, weight, left.pop(name))
                    largest = max(largest, change)
                merged[name] = to_fp16(name, weight)
        save_file(merged, out / path.name, metadata={"format": "pt"})
        log.info("merged %s", path.name)
    if left:
        raise ArtifactError(f"the base has no {sorted(left)[0]} ({len(left)} of {len(deltas)} adapted layers missing)")
    index = base / "model.safetensors.index.json"
    if index.exists():
        shutil.copyfile(index, out / index.name)
    return {"layers": len(deltas), "largest_change": largest}


def merge_one(name: str, weight: torch.Tensor, delta: Delta) -> tuple[torch.Tensor, float]:
    """W + scale·B·A in fp32, and the largest absolute change. Raises ArtifactError when the shapes do not fit."""
    a, b, scale = delta
    if weight.shape != (b.shape[0], a.shape[1]):
        raise ArtifactError(f"{name} is {tuple(weight.shape)} in the base, {(b.shape[0], a.shape[1])} in the adapter")
    change = scale * (b @ a)
    return weight.float() + change, change.abs().max().item()


def to_fp16(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The tensor in FP16. Raises ArtifactError when a value is NaN or beyond FP16's 65504."""
    half = weight.to(torch.float16)
    if not torch.isfinite(half).all():
        worst = weight.float().abs().max().item()
        what = "NaN" if math.isnan(worst) else f"{worst:g}, beyond FP16's 65504"
        raise ArtifactError(f"{name} holds {what}", "this model cannot be kept in FP16")
    return half.contiguous()


def copy_rest(base: Path, out: Path, *, add_bos: bool) -> None:
    """Configuration in FP16, tokenizer files byte for byte, and our chat template in place of the base's.

    The template stands in both places where tools look: tokenizer_config.json (llama.cpp, transformers 4) and
    chat_template.jinja (transformers 5).
    """
    for pattern in UNTOUCHED:
        for path in base.glob(pattern):
            shutil.copyfile(path, out / path.name)
    config = read_json(base / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = "float16"
    # transformers 4 and llama.cpp know the older name; transformers 5 reads both.
    config["torch_dtype"] = "float16"
    _write(out / "config.json", config)
    template = chat_template(add_bos=add_bos)
    labels = read_json(base / "tokenizer_config.json")
    labels["chat_template"] = template
    _write(out / "tokenizer_config.json", labels)
    (out / "chat_template.jinja").write_text(template, "utf-8")
    if (base / "generation_config.json").exists():
        shutil.copyfile(base / "generation_config.json", out / "generation_config.json")


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
