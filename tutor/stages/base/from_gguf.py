"""Make a plain 16-bit model folder of the quantized GGUF that a Python package carries.

In: the GGUF file. Out: weights, configuration and tokenizer as a Hugging Face folder, with a README that states that
the weights were quantized. Does not restore what quantization lost, and does not import the package.
transformers' own loader is used for the tokenizer alone: for a model it reads the file four times, item by item.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tutor.errors import ArtifactError
from tutor.formats.models.gguf import Gguf, Tensor, read_gguf
from tutor.formats.models.gguf_metadata import Metadata, metadata_of
from tutor.formats.models.gguf_weights import COMPUTED, all_rows, file_rows
from tutor.formats.models.model_config import check_model_type
from tutor.formats.models.pre_tokenizer import equivalent_names, pre_tokenizer_name
from tutor.formats.models.safetensors import make_header

log = logging.getLogger(__name__)

NAMES = {
    "token_embd": "embed_tokens",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "output_norm": "norm",
}
"""Modules of a Llama in transformers by their names in a GGUF; `output` is the head, outside the model."""
SETTINGS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "max_position_embeddings": "llama.context_length",
    "num_attention_heads": "llama.attention.head_count",
    "num_hidden_layers": "llama.block_count",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}
"""Settings of config.json by the required keys of a GGUF."""


def make_folder(gguf: Path, model: Path, package: str) -> None:
    """Write the model of a package's GGUF into the folder `model`.

    Raises ArtifactError for a damaged file, another architecture, or a tokenizer that does not split as the file does.
    """
    log.info("reading %s", gguf.name)
    try:
        content = read_gguf(gguf)
    except ArtifactError as error:
        raise ArtifactError(error.message, f"install {package} again") from None
    metadata = metadata_of(content)
    check_model_type(metadata.architecture, str(gguf))
    config = _config(gguf, content)
    model.mkdir(parents=True, exist_ok=True)
    log.info("writing its weights in 16 bits")
    _write_weights(gguf, content, config, model)
    _write_json(model / "config.json", config)
    log.info("writing its tokenizer")
    _write_tokenizer(gguf, model, metadata)
    card = f"# Weights of {gguf.name}\n\nOnce quantized as the file's name says; here they are 16-bit again.\n"
    (model / "README.md").write_text(card, "utf-8")


def _config(path: Path, gguf: Gguf) -> dict[str, Any]:
    """Return config.json of a Llama. Raises ArtifactError for a missing key, and for a scaled RoPE."""
    fields = gguf.fields
    if scaled := [name for name in (*COMPUTED, "llama.rope.scaling.type") if name in gguf.tensors or name in fields]:
        raise ArtifactError(f"{path} scales its RoPE ({scaled[0]})", "use its original folder: base.source = path:...")
    try:
        config = {name: fields[key] for name, key in SETTINGS.items()}
    except KeyError as missing:
        raise ArtifactError(f"{path} lacks {missing}") from None
    heads = config["num_attention_heads"]
    optional = {"pad_token_id": "padding_token_id", "unk_token_id": "unknown_token_id"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}") for name, key in optional.items()}
    return {
        **config,
        **{name: id_ for name, id_ in ids.items() if id_ is not None},
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "dtype": "float16",
        "head_dim": fields.get("llama.attention.key_length", config["hidden_size"] // heads),
        "hidden_act": "silu",
        "mlp_bias": False,
        "model_type": "llama",
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "rope_parameters": {"rope_theta": fields.get("llama.rope.freq_base", 10000.0), "rope_type": "default"},
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", ())),
    }


def _write_weights(path: Path, gguf: Gguf, config: Mapping[str, Any], model: Path) -> None:
    """Write model.safetensors in FP16. Raises ArtifactError for a tensor that no plain Llama has."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    named = {_name(path, name): (name, tensor) for name, tensor in gguf.tensors.items()}
    ordered = sorted(named.items())  # as the safetensors library orders tensors of one type
    with (model / "model.safetensors").open("wb") as file:
        file.write(make_header([(name, tensor.shape[::-1]) for name, (_, tensor) in ordered], "F16"))
        for _, (name, tensor) in ordered:
            for numbers in _rows(path, tensor, heads.get(name.split(".")[-2], 0)):
                file.write(numbers.astype("<f2").tobytes())


def _name(path: Path, name: str) -> str:
    """Return the name in transformers of a tensor in a GGUF."""
    *block, module, kind = name.split(".")
    if kind == "weight" and module == "output" and not block:
        return "lm_head.weight"
    if kind != "weight" or module not in NAMES or (block and (len(block) != 2 or block[0] != "blk")):
        raise ArtifactError(f"{path} holds {name}, which no plain Llama has", "use another base")
    layer = f"layers.{block[1]}." if block else ""
    return f"model.{layer}{NAMES[module]}.weight"


def _rows(path: Path, tensor: Tensor, heads: int) -> Iterator["np.ndarray[Any, np.dtype[np.float32]]"]:
    """Yield a tensor's numbers, some rows at a time; rows that llama.cpp's converter reorders in the original order."""
    shape = tensor.shape[::-1]
    if not heads:
        yield from (file_rows(path, tensor, rows) for rows in all_rows(shape))
        return
    order = np.arange(shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    yield file_rows(path, tensor, order)


def _write_tokenizer(gguf: Path, model: Path, metadata: Metadata) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gguf.parent, gguf_file=gguf.name)
    split = metadata.pre_tokenizer
    if split == "smollm":
        # transformers' loader ignores the GGUF's splitting: blanks before a digit would get other ids than in serving
        digits = pre_tokenizers.Digits(individual_digits=True)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.save_pretrained(model)
    found = pre_tokenizer_name(model / "tokenizer.json")
    if not split or split not in equivalent_names(found):
        raise ArtifactError(f"{gguf} splits text as {split!r}, its tokenizer was read as {found!r}")
    path = model / "tokenizer_config.json"
    labels = json.loads(path.read_text("utf-8"))
    for name in ("is_local", "local_files_only", "backend"):
        labels.pop(name, None)
    # transformers 4 (pinned by llama.cpp's converter) knows this name, and not that of version 5
    labels["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(path, labels)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n", "utf-8")
