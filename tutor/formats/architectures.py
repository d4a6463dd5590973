"""Families of models that tutor tunes: one row a family. No other module compares with a family's name.

In: `model_type` of a config.json, or `general.architecture` of a GGUF. Out: the row, or the error with the list.
A row says what the pinned llama.cpp computes otherwise than, or exactly as, the class of transformers. Names of tensors
are not here: gguf's `get_tensor_name_map` has them. Reads no file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutor.errors import ArtifactError
from tutor.recipe.quantizations import BF16, F16

SILU = ("silu", "swish")
"""Names of one activation."""
ROPE_KINDS = ("default", "linear", "yarn")
"""Kinds of RoPE scaling that transformers and llama.cpp compute equally for every family with one RoPE base."""
OF_LLAMA = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE scaling of the families that llama.cpp's converter treats as a Llama."""
WINDOWED_FROM = 28
"""Number of the first layer with a sliding window where a Qwen's configuration names none."""
THETA = 10000.0
"""Base of RoPE where a family and a configuration name none."""
ANOTHER = "name another base"
"""Next step for a base of another family."""


@dataclass(frozen=True)
class Architecture:
    """A family, as transformers and llama.cpp compute it."""

    model_type: str  # of config.json
    class_name: str  # the class of transformers with whose tensors every base is compared
    gguf: str  # general.architecture, and the prefix of the family's keys
    multimodal: str = ""  # model_type of checkpoints with images whose text model is of this family
    permuted: tuple[str, ...] = ()  # modules in a GGUF whose rows the converter reorders, by heads
    norm_offset: float = 0.0  # what the converter adds to the weights of norms
    wide: bool = False  # activations overflow in FP16: compute in BF16 or FP32, store merged weights and GGUF in BF16
    activation: str = "hidden_act"  # name of the setting
    activations: tuple[str, ...] = SILU  # its values that llama.cpp computes
    rope_kinds: tuple[str, ...] = ROPE_KINDS
    false: tuple[str, ...] = ()  # settings that llama.cpp does not compute: null, false or absent in config.json
    head_dim: int | None = None  # where config.json has none; None: hidden size / heads
    head_dim_is_free: bool = True  # heads x head_dim may differ from the hidden size
    tied: bool = False  # tie_word_embeddings where config.json does not say
    context: int | None = None  # max_position_embeddings where config.json does not say
    window_period: int = 0  # llama.cpp computes a sliding window, except in each n-th layer; 0: no window
    window_switch: str | None = None  # the setting without which `sliding_window` has no effect
    rope_period: int = 0  # llama.cpp leaves RoPE out of each n-th layer; 0: of none
    rope_theta: float = THETA  # where config.json does not say
    norms: int = 2  # of hidden states in a layer
    head_norms: bool = False  # norms of queries and keys

    @property
    def plain_layers(self) -> bool:
        """Whether a layer is a Llama's: x + o(attention(rotate(q, k), v)), then x + down(silu(gate) * up)."""
        return self.norms == 2 and not self.head_norms and not self.rope_period and self.activations == SILU

    @property
    def defaults(self) -> dict[str, int]:
        """Sizes where config.json does not say, by setting."""
        given = {"head_dim": self.head_dim, "max_position_embeddings": self.context}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def reference(self) -> str:
        """Type of the GGUF that quantizations are made of and that parity compares: F16, or BF16 of a wide family."""
        return BF16 if self.wide else F16

    @property
    def merged_dtype(self) -> str:
        """Type of merged weights with merge.dtype "auto", by the recipe's name."""
        return "bf16" if self.wide else "fp16"


_ROWS = (
    Architecture(
        "llama",
        "LlamaForCausalLM",
        "llama",
        permuted=("attn_q", "attn_k"),
        rope_kinds=OF_LLAMA,
    ),
    Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        head_dim_is_free=False,
        window_switch="use_sliding_window",
    ),
    Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        head_dim=128,
        false=("attention_bias",),
        window_switch="use_sliding_window",
        head_norms=True,
    ),
    Architecture("mistral", "MistralForCausalLM", "llama", permuted=("attn_q", "attn_k"), rope_kinds=OF_LLAMA),
    Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "gemma3",
        multimodal="gemma3",
        norm_offset=1.0,
        wide=True,
        activation="hidden_activation",
        activations=("gelu_pytorch_tanh",),
        rope_kinds=("default", "linear"),
        false=(
            "attention_bias",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "use_bidirectional_attention",
        ),
        head_dim=256,
        tied=True,
        context=131072,
        window_period=6,
        norms=4,
        head_norms=True,
        rope_theta=1_000_000.0,
    ),
    Architecture(
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        permuted=("attn_q", "attn_k"),
        false=("attention_bias", "mlp_bias"),
        tied=True,
        window_switch="use_sliding_window",
        rope_period=4,
        rope_theta=2_000_000.0,
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = {row.model_type: row for row in _ROWS}
"""Families by `model_type`, in the order of their worth to users."""


def architecture_of(model_type: object, where: str) -> Architecture:
    """Return a family's row. Raises ArtifactError with the list for one that is not in the table."""
    found = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        known = ", ".join(ARCHITECTURES)
        raise ArtifactError(f"{where} is a {model_type!r} model; tutor tunes {known}", ANOTHER)
    return found


def architecture_of_gguf(name: object, where: str) -> Architecture:
    """Return the row of a GGUF's `general.architecture`; of two families with one name there the first.

    Raises ArtifactError with the list for one that is not in the table.
    """
    found = next((row for row in ARCHITECTURES.values() if row.gguf == name), None)
    if found is None:
        known = ", ".join(dict.fromkeys(row.gguf for row in ARCHITECTURES.values()))
        raise ArtifactError(f"{where} is a {name!r} model; tutor tunes {known}", ANOTHER)
    return found


def layer_windows(family: Architecture, config: Mapping[str, Any]) -> list[int | None]:
    """Return the sliding window of each layer in tokens, as transformers computes a config.json; None: no window.

    A window of n lets a token see itself and the n - 1 tokens before it.
    """
    count, window = config["num_hidden_layers"], _size(config, "sliding_window", 0)
    if family.window_switch is not None and not config.get(family.window_switch):
        window = 0
    if not window:
        return [None] * count
    kinds = config.get("layer_types")
    if family.window_switch is None and not family.window_period:
        return [window] * count
    if not isinstance(kinds, Sequence) or isinstance(kinds, str):
        kinds = _layer_kinds(family, config)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _layer_kinds(family: Architecture, config: Mapping[str, Any]) -> list[str]:
    """The kinds of the layers where config.json does not list them, as transformers sets them."""
    numbers = range(config["num_hidden_layers"])
    if family.window_period:
        period = _size(config, "sliding_window_pattern", family.window_period)
        slides = [bool((number + 1) % period) for number in numbers]
    elif family.rope_period:
        slides = [not roped for roped in rope_layers(family, config)]
    else:
        slides = [number >= _size(config, "max_window_layers", WINDOWED_FROM, least=0) for number in numbers]
    return ["sliding_attention" if each else "full_attention" for each in slides]


def rope_layers(family: Architecture, config: Mapping[str, Any]) -> list[bool]:
    """Return whether each layer has RoPE, as transformers computes a config.json."""
    numbers = range(config["num_hidden_layers"])
    if not family.rope_period:
        return [True for _ in numbers]
    listed = config.get("no_rope_layers")
    if isinstance(listed, Sequence) and not isinstance(listed, str):
        return [bool(each) for each in listed[: len(numbers)]]
    period = _size(config, "no_rope_layer_interval", family.rope_period)
    return [bool((number + 1) % period) for number in numbers]


def _size(config: Mapping[str, Any], name: str, default: int, *, least: int = 1) -> int:
    """An integer of a configuration, at least `least`; the default where it has none, or something else."""
    value = config.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= least else default
