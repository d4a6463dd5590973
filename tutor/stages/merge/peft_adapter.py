"""Read a PEFT LoRA adapter (A and B, DoRA's magnitudes, tensors that replace the base's) and apply it to weight rows.

In: an adapter folder. Out: an `Adapter`; changed rows in fp32. A setting of PEFT that is not implemented here is an
error that names it: ignoring it would give another model silently. Does not read the base and does not write.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from tutor.artifacts.disk import read_json
from tutor.errors import ArtifactError
from tutor.formats.models.safetensors import open_weights

PREFIX = "base_model.model."
A, B, B_BIAS, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector"
BASE_BIAS = ".base_layer.bias"
NEUTRAL_SETTINGS = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode",
        "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
        "revision", "target_modules", "task_type",
    )
)  # fmt: skip
"""Settings without an effect on the arithmetic: the adapter's origin, and its layers, which its tensors name too."""
SUPPORTED_SETTINGS = frozenset(
    (
        "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r",
        "rank_pattern", "use_dora", "use_rslora",
    )
)  # fmt: skip
"""Settings whose arithmetic is implemented. Any other setting with a value is an error."""
SUPPORTED_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of init_lora_weights that leave the base unchanged; PiSSA and others move a part of it into the adapter."""


class LoraSettings(BaseModel):
    """Types of the settings in SUPPORTED_SETTINGS that are read here."""

    model_config = ConfigDict(extra="ignore", strict=True)

    r: int = Field(ge=1)
    lora_alpha: FiniteFloat
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    modules_to_save: list[str] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    bias: str = "none"

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _compiles(cls, patterns: dict[str, Any] | None) -> dict[str, Any] | None:
        for pattern in patterns or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns


@dataclass(frozen=True)
class Delta:
    """The change of one weight: scale·B·A, and the length of each row with DoRA."""

    a: torch.Tensor  # rank x in
    b: torch.Tensor  # out x rank
    scale: float
    magnitude: torch.Tensor | None = None  # out

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that is changed."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors by the names of the base's tensors that they change."""

    deltas: Mapping[str, Delta]
    bias_deltas: Mapping[str, torch.Tensor]  # added to a bias
    replacements: Mapping[str, torch.Tensor]  # replace the base's: modules_to_save, trained biases

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that the base's tensors must have, for every tensor that the adapter changes."""
        rest = {**self.bias_deltas, **self.replacements}
        return {
            **{name: delta.shape for name, delta in self.deltas.items()},
            **{name: tuple(tensor.shape) for name, tensor in rest.items()},
        }


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT LoRA folder into fp32.

    Raises ArtifactError for a variant that cannot be merged here, an incomplete pair, a tensor that no setting
    explains, NaN or infinity.
    """
    config = read_json(folder / "adapter_config.json")
    refuse_config(config, folder)
    tensors: dict[str, torch.Tensor] = {}
    with open_weights(folder / "adapter_model.safetensors") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no dict
            tensors[name] = file.get_tensor(name).float()
            if not torch.isfinite(tensors[name]).all():
                raise ArtifactError(f"{folder}: {name} holds NaN or infinity", "train again with a lower learning_rate")
    remaining = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    layers = [name.removesuffix(A) for name in remaining if name.endswith(A)]
    if not layers:
        raise ArtifactError(f"{folder} holds {len(tensors)} tensors for 0 LoRA layers")
    deltas = {f"{layer}.weight": _delta(layer, remaining, config, folder) for layer in layers}
    scales = {name.removesuffix(".weight"): delta.scale for name, delta in deltas.items()}
    bias_deltas = {
        f"{layer}.bias": remaining.pop(layer + B_BIAS) * scales[layer]
        for layer in layers
        if layer + B_BIAS in remaining
    }
    replacements = {_replaced_name(name, config, folder): tensor for name, tensor in remaining.items()}
    return Adapter(deltas, bias_deltas, replacements)


def refuse_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ArtifactError, naming the setting, for arithmetic that is not implemented here."""
    for name, value in config.items():
        known = name in NEUTRAL_SETTINGS or name in SUPPORTED_SETTINGS or not value
        if name == "peft_type":
            known = value == "LORA"
        elif name == "init_lora_weights":
            known = value in SUPPORTED_INITS
        if not known:
            raise ArtifactError(f"{folder}: {name} = {value!r} cannot be merged here", "train a plain LoRA")
    try:
        LoraSettings.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{folder}/adapter_config.json: {where}: {first['msg']}", "run: tutor train") from None


def _delta(layer: str, remaining: dict[str, torch.Tensor], config: Mapping[str, Any], folder: Path) -> Delta:
    """Return one layer's pair and magnitude, and remove them from `remaining`."""
    a, b, magnitude = (remaining.pop(layer + end, None) for end in (A, B, MAGNITUDE))
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0]:
        raise ArtifactError(f"{folder}: {layer} has no fitting lora_B")
    if bool(config.get("use_dora")) != (magnitude is not None) or (
        magnitude is not None and magnitude.shape != b.shape[:1]
    ):
        raise ArtifactError(f"{folder}: {layer} has no fitting lora_magnitude_vector for its use_dora")
    rank = _setting(layer, config, "r", "rank_pattern")
    if rank != len(a):
        raise ArtifactError(f"{folder}: {layer} has rank {len(a)}, its adapter_config.json says {rank}")
    alpha = _setting(layer, config, "lora_alpha", "alpha_pattern")
    return Delta(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), magnitude)


def _setting(layer: str, config: Mapping[str, Any], name: str, patterns: str) -> float:
    """Return a layer's rank or alpha. PEFT's patterns are regular expressions for the end of a name; the first wins."""
    overrides = config.get(patterns) or {}
    matching = (value for pattern, value in overrides.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    return next(matching, config[name])  # type: ignore[no-any-return]


def _replaced_name(name: str, config: Mapping[str, Any], folder: Path) -> str:
    """Return the name of the base's tensor that `name` replaces. Raises ArtifactError when no setting allows that."""
    module, _, kind = name.rpartition(".")
    if kind == "bias" and config.get("bias", "none") != "none":
        return name.removesuffix(BASE_BIAS) + ".bias" if name.endswith(BASE_BIAS) else name
    if module.endswith(tuple(config.get("modules_to_save") or ())):  # PEFT's own rule
        return name
    raise ArtifactError(f"{folder} holds {PREFIX}{name}, which cannot be merged here", "train a plain LoRA")


def apply_delta(weight: torch.Tensor, delta: Delta, first: int) -> torch.Tensor:
    """Return the rows of a weight from row `first` on, adapter applied; in fp32, in PEFT's order of operations."""
    rows = slice(first, first + len(weight))
    weight = weight.float()
    new = weight + (delta.b[rows] @ delta.a) * delta.scale
    if delta.magnitude is not None:
        new = (delta.magnitude[rows] / torch.linalg.norm(new, dim=1))[:, None] * new
    return new
