"""The configuration of a base model (config.json): what makes it unfit, and how it is written for other programs.

In: the object in config.json. Out: nothing, or the error; the object as the merge stage writes it. Reads no file.
"""

from collections.abc import Mapping
from typing import Any

from tutor.errors import ArtifactError
from tutor.formats.models.safetensors import SIXTEEN_BIT

ARCHITECTURE = "LlamaForCausalLM"
"""Name of the model's class: the tensors of every base are compared with this class, whatever its config.json says."""
SIZES = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)
"""Settings that must be positive integers."""
OPTIONAL_SIZES = ("head_dim", "num_key_value_heads")
"""Settings that must be positive integers, or null: the default."""
ACTIVATIONS = ("silu", "swish")
"""Names of the only activation that llama.cpp computes for a Llama."""
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE scaling that transformers and llama.cpp compute equally for a Llama."""
YARN_SETTINGS = ("attention_factor", "attn_factor", "beta_fast", "beta_slow", "extrapolation_factor", "mscale")
"""Settings of YaRN that change log-probabilities by up to 6 nats between the two programs (measured)."""
FOREIGN = ("draft_vocab_size", "num_experts", "num_local_experts", "n_routed_experts", "text_config")
"""Settings with which llama.cpp's converter makes another model than a Llama."""
ANOTHER = "name another base"
"""Next step for a base that cannot be used."""


def check_model_config(config: Mapping[str, Any], where: str) -> None:
    """Raise ArtifactError for a base that its configuration alone makes unfit: this comes before a download."""
    settings = config.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
        raise ArtifactError(f"{where} is already quantized ({method}); the base must be 16-bit", SIXTEEN_BIT)
    if "auto_map" in config:
        raise ArtifactError(f"{where} brings code of its own (auto_map), which is never run", ANOTHER)
    check_model_type(config.get("model_type"), where)
    for problem in _problems(config):
        raise ArtifactError(f"{where}: config.json has {problem}", ANOTHER)


def check_model_type(name: object, where: str) -> None:
    """Raise ArtifactError for a model of a family that tutor does not tune."""
    if name != "llama":
        raise ArtifactError(f"{where} is a {name!r} model; tutor tunes Llamas")


def _problems(config: Mapping[str, Any]) -> list[str]:
    """What a later stage would refuse, each as the end of a sentence that begins with "config.json has"."""
    sizes = {
        name: config.get(name) for name in (*SIZES, *OPTIONAL_SIZES) if name in SIZES or config.get(name) is not None
    }
    found = [f"{name} {value!r}, not a positive integer" for name, value in sizes.items() if not _is_size(value)]
    if found:
        return found
    vocabulary = config["vocab_size"]
    for name in (name for name in config if name.endswith("_token_id")):
        ids = config[name] if isinstance(config[name], list) else [config[name]]
        if not all(id_ is None or (_is_integer(id_) and id_ < vocabulary) for id_ in ids):
            found.append(f"{name} {config[name]!r}, which is no id of its vocabulary of {vocabulary}: null is none")
    if (activation := config.get("hidden_act", ACTIVATIONS[0])) not in ACTIVATIONS:
        found.append(f"hidden_act {activation!r}; llama.cpp computes a Llama with {ACTIVATIONS[0]!r}")
    rope = rope_settings(config)
    if (kind := rope["rope_type"]) not in ROPE_KINDS:
        found.append(f"RoPE scaling {kind!r}; llama.cpp computes {', '.join(ROPE_KINDS)} for a Llama")
    if kind == "yarn" and (given := [name for name in YARN_SETTINGS if rope.get(name) is not None]):
        found.append(f"RoPE scaling 'yarn' with {given[0]}, which llama.cpp computes otherwise than transformers")
    return found + [f"{name}, which no Llama has" for name in FOREIGN if config.get(name) is not None]


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of RoPE as version 5 of transformers names them, read from either version's form."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    found = dict(new if isinstance(new, dict) and new else old if isinstance(old, dict) else {})
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    found["rope_theta"] = found.get("rope_theta") or config.get("rope_theta") or 10000.0
    return found


def token_id(config: Mapping[str, Any], name: str) -> int | None:
    """Return the id of a special token, such as "pad"; None where there is none: old configurations write -1."""
    value = config.get(f"{name}_token_id")
    return value if isinstance(value, int) and _is_integer(value) and value >= 0 else None


def normalised_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as all programs understand it: the architecture by name, and null for a negative id."""
    ids = {name: None for name, value in config.items() if name.endswith("_token_id") and _is_negative(value)}
    return {**config, **ids, "architectures": [ARCHITECTURE]}


def _is_negative(value: Any) -> bool:
    return _is_integer(value) and value < 0


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_integer(value) and value > 0
