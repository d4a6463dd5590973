"""A PEFT LoRA adapter and what it makes of a weight: A and B, DoRA's magnitudes, whole tensors in place of the base's.

In: an adapter folder. Out: an `Adapter`; changed rows in fp32. What PEFT can write and this cannot merge is refused by
name, for a setting that is overlooked gives another model without a word. Does not read the base and writes nothing.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import open_weights, read_json

PREFIX = "base_model.model."
A, B, SHIFT, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_magnitude_vector"
BASE_BIAS = ".base_layer.bias"
NO_MATTER = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode",
        "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size",
        "revision", "target_modules", "task_type",
    )
)  # fmt: skip
"""Settings that say where an adapter came from and which layers it has, which its tensors say themselves."""
HANDLED = frozenset(
    (
        "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r",
        "rank_pattern", "use_dora", "use_rslora",
    )
)  # fmt: skip
"""Settings that are merged as they say. Any other that is set changes the arithmetic, and is refused."""
KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Ways to begin a training that leave the base alone; PiSSA and its kin move a part of it into the adapter."""


@dataclass(frozen=True)
class Delta:
    """What is added to one weight: scale·B·A, and DoRA's length of each row where it has one."""

    a: torch.Tensor  # rank x in
    b: torch.Tensor  # out x rank
    scale: float
    magnitude: torch.Tensor | None = None  # out

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it fits."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """An adapter by the names of the base's tensors."""

    deltas: Mapping[str, Delta]
    shifts: Mapping[str, torch.Tensor]  # added to a bias
    whole: Mapping[str, torch.Tensor]  # in place of the base's: modules_to_save, trained biases

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that it changes, with the shape that the base's must have."""
        rest = {**self.shifts, **self.whole}
        return {
            **{name: delta.shape for name, delta in self.deltas.items()},
            **{name: tuple(tensor.shape) for name, tensor in rest.items()},
        }


def read_adapter(folder: Path) -> Adapter:
    """A PEFT LoRA folder in fp32.

    Raises ArtifactError for a variant that cannot be merged here, an incomplete pair, a tensor that no setting
    explains, or a value that is no number.
    """
    config = read_json(folder / "adapter_config.json")
    refuse_config(config, folder)
    tensors: dict[str, torch.Tensor] = {}
    with open_weights(folder / "adapter_model.safetensors") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no dict
            tensors[name] = file.get_tensor(name).float()
            if not torch.isfinite(tensors[name]).all():
                raise ArtifactError(f"{folder}: {name} holds NaN or infinity", "train again with a lower learning_rate")
    left = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    layers = [name.removesuffix(A) for name in left if name.endswith(A)]
    if not layers:
        raise ArtifactError(f"{folder} holds {len(tensors)} tensors for 0 LoRA layers")
    deltas = {f"{layer}.weight": _delta(layer, left, config, folder) for layer in layers}
    scales = {name.removesuffix(".weight"): delta.scale for name, delta in deltas.items()}
    shifts = {f"{layer}.bias": left.pop(layer + SHIFT) * scales[layer] for layer in layers if layer + SHIFT in left}
    whole = {_place(name, config, folder): tensor for name, tensor in left.items()}
    return Adapter(deltas, shifts, whole)


def refuse_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ArtifactError, naming the setting, for arithmetic that is not done here."""
    for name, value in config.items():
        known = name in NO_MATTER or name in HANDLED or not value
        if name == "peft_type":
            known = value == "LORA"
        elif name == "init_lora_weights":
            known = value in KEEP_BASE
        if not known:
            raise ArtifactError(f"{folder}: {name} = {value!r} cannot be merged here", "train a plain LoRA")


def _delta(layer: str, left: dict[str, torch.Tensor], config: Mapping[str, Any], folder: Path) -> Delta:
    """One layer's pair and magnitude, taken out of what is left."""
    a, b, magnitude = (left.pop(layer + end, None) for end in (A, B, MAGNITUDE))
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
    """A layer's rank or alpha. PEFT's patterns are regular expressions for the end of a name; the first that fits."""
    given = config.get(patterns) or {}
    found = (value for pattern, value in given.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    value = next(found, config.get(name))
    if not isinstance(value, int | float):
        raise ArtifactError(f"adapter_config.json: {name} of {layer} is {value!r}, no number", "run: tutor train")
    return value


def _place(name: str, config: Mapping[str, Any], folder: Path) -> str:
    """The base's tensor that a whole one stands for. Raises ArtifactError where no setting says that it may."""
    module, _, kind = name.rpartition(".")
    if kind == "bias" and config.get("bias", "none") != "none":
        return name.removesuffix(BASE_BIAS) + ".bias" if name.endswith(BASE_BIAS) else name
    if module.endswith(tuple(config.get("modules_to_save") or ())):  # as PEFT finds them
        return name
    raise ArtifactError(f"{folder} holds {PREFIX}{name}, which cannot be merged here", "train a plain LoRA")


def changed(weight: torch.Tensor, delta: Delta, first: int) -> torch.Tensor:
    """Rows of a weight, from row `first` on, with the adapter in them; in fp32, in PEFT's order of operations."""
    rows = slice(first, first + len(weight))
    weight = weight.float()
    new = weight + (delta.b[rows] @ delta.a) * delta.scale
    if delta.magnitude is not None:
        new = (delta.magnitude[rows] / torch.linalg.norm(new, dim=1))[:, None] * new
    return new
