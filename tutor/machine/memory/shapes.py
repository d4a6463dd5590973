"""Sizes of models of all families: number and form of their matrices.

In: a config.json, a GGUF's metadata, or a known model name. Out: a `Shape`. Reads no weights; needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import read_json
from tutor.errors import ArtifactError
from tutor.formats.architectures import ARCHITECTURES, Architecture
from tutor.formats.models.model_config import is_tied

if TYPE_CHECKING:
    from tutor.formats.models.gguf import Gguf

MATRIX_INPUTS = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "heads",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "product",
}
"""Input tensor of each matrix of a layer; matrices with one name share their input."""


@dataclass(frozen=True)
class Shape:
    """Size of a model, as in its config.json."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the output head is the embedding
    positions: int | None = None  # maximum length of a text in tokens; None: unknown
    family: str = "llama"  # model_type

    @property
    def architecture(self) -> Architecture:
        """The row of the model's family; of a Llama for a family that is not in the table, which no stage accepts."""
        return ARCHITECTURES.get(self.family, ARCHITECTURES["llama"])

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices, by name."""
        inner, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, inner),
            "k_proj": (self.hidden, shared),
            "v_proj": (self.hidden, shared),
            "o_proj": (inner, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def matrix_parameters(self) -> int:
        """Parameters in the matrices of all layers: the part that a 4-bit base quantizes."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def other_parameters(self) -> int:
        """Parameters in embedding, output head and norms, which stay in 16 bits."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden * (2 * self.layers + 1)

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        return self.matrix_parameters + self.other_parameters


SHAPES = {
    "tiny": Shape(64, 2, 128, 4, 2, 16, 1024, tied=False, positions=4096),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": Shape(
        4096, 32, 14336, 32, 8, 128, 128256, tied=False, positions=131072
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Shape(
        1536, 28, 8960, 12, 2, 128, 151936, tied=False, positions=131072, family="qwen2"
    ),
}
"""Shapes that are known before a config.json exists: of stages/base/tiny_model.py, and of hub models by name."""


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape in a config.json. Raises ValueError with the name of a missing or impossible value."""

    def number(name: str, default: int | None = None) -> int:
        value = config.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
            raise ValueError(f"{name} is {value!r}")
        return value

    family = ARCHITECTURES.get(str(config.get("model_type")))
    heads, hidden = number("num_attention_heads"), number("hidden_size")
    # A null counts as absent: head_dim and num_key_value_heads may be null.
    given = {name: value for name, value in config.items() if value is not None}
    config = {**family.defaults, **given} if family else given
    return Shape(
        hidden=hidden,
        layers=number("num_hidden_layers"),
        intermediate=number("intermediate_size"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", max(1, hidden // heads)),
        vocabulary=number("vocab_size"),
        tied=is_tied(config),
        positions=number("max_position_embeddings") if "max_position_embeddings" in config else None,
        family=str(config.get("model_type", "llama")),
    )


def shape_of_gguf(gguf: "Gguf") -> Shape:
    """The shape in a GGUF's metadata. Raises ValueError with the name of a missing value."""
    names = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "max_position_embeddings": "context_length",
    }
    prefix = gguf.fields.get("general.architecture")
    config = {name: gguf.fields.get(f"{prefix}.{key}") for name, key in names.items()}
    embedding = gguf.tensors.get("token_embd.weight")
    config["vocab_size"] = embedding.shape[-1] if embedding else None
    family = next((row.model_type for row in ARCHITECTURES.values() if row.gguf == prefix), None)
    given = {"model_type": family} if family else {}
    return shape_of({**config, **given, "tie_word_embeddings": "output.weight" not in gguf.tensors})


def read_shape(folder: Path) -> Shape:
    """The shape of a model folder, from its config.json. Raises ArtifactError for a config.json without a shape."""
    try:
        return shape_of(read_json(folder / "config.json"))
    except ValueError as error:
        raise ArtifactError(f"{folder / 'config.json'}: {error}") from None
