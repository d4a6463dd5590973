"""Weights of one small layer: as a model folder, as trained, as a GGUF."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

HEADS, KV_HEADS, HIDDEN, INNER, VOCABULARY = 4, 2, 128, 256, 40


ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."


SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    f"{ATTENTION}q_proj.weight": (HIDDEN, HIDDEN),
    f"{ATTENTION}q_proj.bias": (HIDDEN,),
    f"{ATTENTION}k_proj.weight": (HIDDEN // 2, HIDDEN),
    f"{ATTENTION}k_proj.bias": (HIDDEN // 2,),
    f"{MLP}down_proj.weight": (HIDDEN, INNER),
}


NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    f"{ATTENTION}q_proj.weight": "blk.0.attn_q.weight",
    f"{ATTENTION}q_proj.bias": "blk.0.attn_q.bias",
    f"{ATTENTION}k_proj.weight": "blk.0.attn_k.weight",
    f"{ATTENTION}k_proj.bias": "blk.0.attn_k.bias",
    f"{MLP}down_proj.weight": "blk.0.ffn_down.weight",
}


Weights = dict[str, Any]


def random_weights(seed: int = 0, scale: float = 0.05) -> Weights:
    generator = np.random.default_rng(seed)
    return {name: (generator.standard_normal(shape) * scale).astype(np.float16) for name, shape in SHAPES.items()}


def trained_weights(weights: Weights, share: float = 0.01, seed: int = 1) -> Weights:
    """The weights after a training: the matrices changed by a share, in 16 bits again."""
    changes = random_weights(seed, 0.05 * share)
    return {
        name: (value.astype(np.float32) + changes[name]).astype(np.float16) if "_proj.weight" in name else value
        for name, value in weights.items()
    }


def write_model(path: Path, weights: Weights) -> Path:
    path.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
    }
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(weights, path / "model.safetensors")
    return path


def permuted_for_llamacpp(name: str, value: Any) -> Any:
    """The rows of q and k in the order that llama.cpp's converter writes; other weights unchanged."""
    heads = {"q": HEADS, "k": KV_HEADS}.get(name.rpartition("_proj")[0][-1:])
    if heads is None or "attn" not in name:
        return value
    return value.reshape(heads, 2, value.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(value.shape)


def write_gguf(
    path: Path, weights: Weights, kind: str = "F16", *, as_is: bool = False, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a GGUF of the weights with matrices of one type; `as_is` keeps the row order of q and k."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for key, value in (metadata or {}).items():
        writer.add_string(key, value)
    type_ = gguf.GGMLQuantizationType[kind]
    for name, value in weights.items():
        value = value if as_is else permuted_for_llamacpp(name, value)  # noqa: PLW2901
        if value.ndim == 1:
            writer.add_tensor(NAMES[name], value.astype(np.float32))
        else:
            writer.add_tensor(NAMES[name], gguf.quantize(value.astype(np.float32), type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
