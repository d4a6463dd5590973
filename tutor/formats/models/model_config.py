"""The configuration of a base model (config.json): what makes it unfit, and how it is written for other programs.

In: the object in config.json. Out: nothing, or the error; the object as the merge stage writes it. Reads no file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutor.errors import ArtifactError, RecipeError
from tutor.formats.architectures import (
    ANOTHER,
    ARCHITECTURES,
    THETA,
    Architecture,
    architecture_of,
    layer_windows,
    rope_layers,
)
from tutor.formats.models.safetensors import SIXTEEN_BIT

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
YARN_SETTINGS = ("attention_factor", "attn_factor", "beta_fast", "beta_slow", "extrapolation_factor", "mscale")
"""Settings of YaRN that change log-probabilities by up to 6 nats between the two programs (measured)."""
FOREIGN = ("draft_vocab_size", "num_experts", "num_local_experts", "n_routed_experts", "text_config")
"""Settings with which llama.cpp's converter makes another model than one of the family: experts, a draft, images."""
MAX_LAYERS = 1 << 12
"""Upper bound of the number of layers; the largest models have some hundreds."""
SCALE = "query_pre_attn_scalar"
"""Setting of a family whose attention is not scaled by its head_dim: llama.cpp takes the scale from other settings."""
SCALED_BY_HIDDEN = 62
"""Number of layers of the one model that llama.cpp scales by hidden size / heads: Gemma 3 27B."""


def check_model_config(config: Mapping[str, Any], where: str) -> None:
    """Raise ArtifactError for a base that its configuration alone makes unfit: this comes before a download."""
    settings = config.get("quantization_config")
    if settings is not None:
        method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else "unknown"
        raise ArtifactError(f"{where} is already quantized ({method}); the base must be 16-bit", SIXTEEN_BIT)
    if "auto_map" in config:
        raise ArtifactError(f"{where} brings code of its own (auto_map), which is never run", ANOTHER)
    family = architecture_of(config.get("model_type"), where)
    for problem in _problems(family, config):
        raise ArtifactError(f"{where}: config.json has {problem}", ANOTHER)


def _problems(family: Architecture, config: Mapping[str, Any]) -> list[str]:
    """What a later stage would refuse, each as the end of a sentence that begins with "config.json has"."""
    given = {name: config[name] for name in (*SIZES, *OPTIONAL_SIZES) if config.get(name) is not None}
    sizes = {**dict.fromkeys(SIZES), **family.defaults, **given}
    found = [f"{name} {value!r}, not a positive integer" for name, value in sizes.items() if not _is_size(value)]
    if sizes["num_hidden_layers"] not in range(MAX_LAYERS):
        found.append(f"num_hidden_layers {sizes['num_hidden_layers']!r}, more than any model has")
    if found:
        return found[:1]
    vocabulary = config["vocab_size"]
    for name in (name for name in config if name.endswith("_token_id")):
        ids = config[name] if isinstance(config[name], list) else [config[name]]
        if not all(id_ is None or (_is_integer(id_) and id_ < vocabulary) for id_ in ids):
            found.append(f"{name} {config[name]!r}, which is no id of its vocabulary of {vocabulary}: null is none")
    name, known = family.activation, family.activations
    if (activation := config.get(name, known[0])) not in known:
        found.append(f"{name} {activation!r}; llama.cpp computes {family.model_type} with {known[0]!r}")
    found += [
        f"{name} {config[name]!r}, which llama.cpp does not compute"
        for name in family.false
        if config.get(name) not in (None, False)
    ]
    found += [f"{name}, which no {family.model_type} has" for name in FOREIGN if config.get(name) is not None]
    return found + _rope_problems(family, config) + _attention_problems(family, {**config, **sizes})


def _rope_problems(family: Architecture, config: Mapping[str, Any]) -> list[str]:
    rope, local = rope_settings(config), local_rope_settings(config)
    found = []
    if (kind := rope["rope_type"]) not in family.rope_kinds:
        known = ", ".join(family.rope_kinds)
        found.append(f"RoPE scaling {kind!r}; llama.cpp computes {known} for {family.model_type}")
    if kind == "yarn" and (given := [name for name in YARN_SETTINGS if rope.get(name) is not None]):
        found.append(f"RoPE scaling 'yarn' with {given[0]}, which llama.cpp computes otherwise than transformers")
    if local is not None and (kind := local["rope_type"]) != "default":
        found.append(f"RoPE scaling {kind!r} in layers with a sliding window, where llama.cpp computes none")
    roped = rope_layers(family, config)
    if roped != [_is_regular(number, family.rope_period) for number in range(config["num_hidden_layers"])]:
        found.append(f"layers without RoPE that differ from llama.cpp's: each {family.rope_period}th")
    return found


def _attention_problems(family: Architecture, config: Mapping[str, Any]) -> list[str]:
    """What llama.cpp computes otherwise in the attention of a complete configuration."""
    heads, hidden, found = config["num_attention_heads"], config["hidden_size"], []
    head_dim = config.get("head_dim") or hidden // heads
    if not family.head_dim_is_free and head_dim * heads != hidden:
        found.append(f"head_dim {head_dim} and {heads} heads; llama.cpp computes {hidden // heads} of {hidden}")
    expected = hidden // heads if config["num_hidden_layers"] == SCALED_BY_HIDDEN else head_dim
    if (scale := config.get(SCALE, expected)) != expected:
        found.append(f"{SCALE} {scale!r}; llama.cpp scales by {expected}")
    windows, period = layer_windows(family, config), family.window_period
    slides = [period > 0 and _is_regular(number, period) for number in range(len(windows))]
    if period and any(windows) and [each is not None for each in windows] != slides:
        found.append(f"layer_types that differ from llama.cpp's: full attention in every {period}th layer")
    return found


def _is_regular(number: int, period: int) -> bool:
    """Whether a layer is none of each `period`th, counted from 1; 0: there is no such period."""
    return not period or (number + 1) % period != 0


def equal_length(config: Mapping[str, Any]) -> int | None:
    """Return the number of tokens up to which llama.cpp computes a text as transformers; None: any number.

    Beyond it, transformers' layers see the last tokens of a text alone, and llama.cpp's see all.
    """
    family = architecture_of(config.get("model_type"), "the base")
    if family.window_period:
        return None
    windows = [window for window in layer_windows(family, config) if window is not None]
    shortest = min(windows, default=None)
    return None if shortest is None or shortest >= config["max_position_embeddings"] else shortest


def require_equal_lengths(lengths: Mapping[str, int], config: Mapping[str, Any], model: Path) -> None:
    """Raise RecipeError for settings, by name, that allow texts beyond `equal_length`."""
    limit = equal_length(config)
    if limit is not None and (long := [name for name, tokens in lengths.items() if tokens > limit]):
        raise RecipeError(
            f"{long[0]} is {lengths[long[0]]}, and {model} has a sliding window of {limit} tokens: llama.cpp computes "
            "its layers without one",
            f"set {' and '.join(long)} to {limit} at most",
        )


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of RoPE as version 5 of transformers names them, read from either version's form.

    Those of layers with full attention, where layers with a sliding window have settings of their own.
    """
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    found = dict(new if isinstance(new, dict) and new else old if isinstance(old, dict) else {})
    found = dict(found["full_attention"]) if isinstance(found.get("full_attention"), dict) else found
    family = ARCHITECTURES.get(str(config.get("model_type")))
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    found["rope_theta"] = (
        found.get("rope_theta") or config.get("rope_theta") or (family.rope_theta if family else THETA)
    )
    return found


def local_rope_settings(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings of RoPE of layers with a sliding window; None for a family where all layers share them."""
    family = ARCHITECTURES.get(str(config.get("model_type")))
    if family is None or not family.window_period:
        return None
    new = config.get("rope_parameters")
    given = new.get("sliding_attention") if isinstance(new, dict) else None
    found = dict(given) if isinstance(given, dict) else {}
    found["rope_type"] = found.get("rope_type") or "default"
    found["rope_theta"] = found.get("rope_theta") or config.get("rope_local_base_freq") or THETA
    return found


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether the head is the embedding; some families tie them where the configuration says nothing."""
    family = ARCHITECTURES.get(str(config.get("model_type")))
    return bool(config.get("tie_word_embeddings", family is not None and family.tied))


def token_id(config: Mapping[str, Any], name: str) -> int | None:
    """Return the id of a special token, such as "pad"; None where there is none: old configurations write -1."""
    value = config.get(f"{name}_token_id")
    return value if isinstance(value, int) and _is_integer(value) and value >= 0 else None


def normalised_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as all programs understand it: the architecture by name, and null for a negative id."""
    ids = {name: None for name, value in config.items() if name.endswith("_token_id") and _is_negative(value)}
    family = architecture_of(config.get("model_type"), "config.json")
    return {**config, **ids, "architectures": [family.class_name]}


def _is_negative(value: Any) -> bool:
    return _is_integer(value) and value < 0


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return _is_integer(value) and value > 0
