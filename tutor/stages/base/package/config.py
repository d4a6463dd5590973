"""The config.json of a GGUF's metadata, for each family.

In: the metadata of a GGUF. Out: a configuration as version 5 of transformers writes it, or the error. Reads no tensor.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutor.errors import ArtifactError
from tutor.formats.architectures import THETA, Architecture
from tutor.formats.models.gguf import Gguf
from tutor.formats.models.gguf_weights import COMPUTED

SETTINGS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""Settings of config.json by the required keys of a GGUF, behind the prefix of the family."""
OPTIONAL = {
    "head_dim": "attention.key_length",
    "num_key_value_heads": "attention.head_count_kv",
    "sliding_window": "attention.sliding_window",
}
"""Settings of config.json by keys that a GGUF may lack."""
TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""Names of special tokens in a GGUF by those of config.json."""
BIASES = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_up.bias"}
"""Tensors that show that a setting is true."""
ORIGINAL = "use its original folder: base.source = path:..."
"""Next step for a GGUF that does not say all that training needs."""


def config_of(path: Path, gguf: Gguf, family: Architecture) -> dict[str, Any]:
    """Return the configuration. Raises ArtifactError for a missing key and a half described RoPE."""
    fields = gguf.fields
    try:
        config = {name: fields[f"{family.gguf}.{key}"] for name, key in SETTINGS.items()}
        ids = {"eos_token_id": fields["tokenizer.ggml.eos_token_id"]}
    except KeyError as missing:
        raise ArtifactError(f"{path} lacks {missing}") from None
    ids |= {f"{name}_token_id": fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in TOKENS.items()}
    optional = {name: fields.get(f"{family.gguf}.{key}") for name, key in OPTIONAL.items()}
    return {
        **config,
        "num_key_value_heads": config["num_attention_heads"],
        **{name: value for name, value in (ids | optional).items() if value is not None},
        **{name: True for name, tensor in BIASES.items() if tensor in gguf.tensors},
        family.activation: family.activations[0],
        "architectures": [family.class_name],
        "dtype": {"F16": "float16", "BF16": "bfloat16"}[family.reference],
        "model_type": family.model_type,
        "rope_parameters": _rope(path, gguf, family),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", ())),
    }


def _rope(path: Path, gguf: Gguf, family: Architecture) -> Mapping[str, Any]:
    fields = gguf.fields
    kind = fields.get(f"{family.gguf}.rope.scaling.type")
    scaled = [name for name in COMPUTED if name in gguf.tensors]
    scaled += [f"rope.scaling.type {kind}"] if kind not in (None, "none", "linear") else []
    if scaled:
        raise ArtifactError(f"{path} scales its RoPE ({scaled[0]})", ORIGINAL)
    rope = {"rope_theta": fields.get(f"{family.gguf}.rope.freq_base", THETA), "rope_type": "default"}
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": fields.get(f"{family.gguf}.rope.scaling.factor", 1.0)}
    if not family.window_period:
        return rope
    local = fields.get(f"{family.gguf}.rope.freq_base_swa", THETA)
    return {"full_attention": rope, "sliding_attention": {"rope_theta": local, "rope_type": "default"}}
