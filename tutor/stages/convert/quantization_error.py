"""The error of a quantized GGUF by type, and the share of the LoRA update that survives quantization.

In: a GGUF, the merged and the base weights. Out: figures, or an error for figures out of bounds. Changes no file.

Weights that were quantized before (the demo's base comes from a Q4_1 file) lie on the old grid. The rounding errors of
a new quantization are then not random: they depend on the weights. On the demo, Q5_1, whose 32 levels span the range of
Q4_1's 16, made every change of training 1.2 to 1.7 times as large, although its error of 4.5 % was equal to that of
Q5_0. Held-out perplexity was 18.6 instead of 10.6, with llama.cpp's own kernels and with the weights dequantized to
F32. So `kept` is measured in addition to the error.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tutor.errors import ArtifactError, GateError
from tutor.formats.models.gguf import Gguf
from tutor.formats.models.gguf_metadata import is_fallback
from tutor.formats.models.gguf_weights import ErrorSums, Weight, check_exact, check_names, error_sums

MAX_ERROR = {
    "F32": 0.0,
    "F16": 0.001,
    "BF16": 0.01,
    "Q8_0": 0.02,
    "Q6_K": 0.05,
    **dict.fromkeys(("Q5_0", "Q5_1", "Q5_K"), 0.12),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS"), 0.25),
    **dict.fromkeys(("Q3_K", "IQ3_S", "IQ3_XXS"), 0.5),
}
"""Maximum relative error of a tensor by type: root mean square of the error over that of the weights."""
MAX_ERROR_BELOW_3_BITS = 0.95
"""Maximum relative error of a tensor of two bits and less; a tensor of zeros has 1.0."""
MIN_KEPT = 0.5
"""Minimum share of the LoRA update that survives quantization. Below, the file behaves like the base."""
MAX_KEPT = 1.25
"""Maximum share of the LoRA update that survives quantization (1.0: unchanged). Above, the file exaggerates it."""
MAX_KEPT_ERROR = 0.1
"""Maximum standard error of `kept` at which it is used: four-bit quantization hides a small update in noise."""
REPLACEMENT = "Q8_0"
"""Type that replaces an unfit fallback type: llama.cpp's own fallback for Q6_K, in blocks of 32."""


@dataclass(frozen=True)
class QuantizationError:
    """The error of a file."""

    error: float  # largest relative error of a tensor
    kept: float | None  # share of the LoRA update that survives; None where the update is zero or too small to measure
    by_type: Mapping[str, float | None]  # `kept` over the tensors of each type


def require_exact(path: Path, gguf: Gguf, weights: Mapping[str, Weight]) -> None:
    """Raise ArtifactError where a number of a 16-bit file differs from its folder."""
    _raise(path, check_exact(path, gguf, weights))


def measure(
    path: Path, gguf: Gguf, weights: Mapping[str, Weight], base: Mapping[str, Weight] | None
) -> QuantizationError:
    """Measure a quantized file. Raises ArtifactError for a missing tensor, or an error above the type's maximum."""
    _raise(path, check_names(gguf, weights))
    found = error_sums(path, gguf, weights, base)
    far = {name: each for name, each in found.items() if not each.relative <= _bound(each.kind)}
    _raise(path, [f"{name} ({each.kind}) is {100 * each.relative:.1f} % off" for name, each in far.items()])
    types = sorted({each.kind for each in found.values()})
    by_type = {kind: kept_share(each for each in found.values() if each.kind == kind) for kind in types}
    return QuantizationError(max(each.relative for each in found.values()), kept_share(found.values()), by_type)


def kept_share(tensors: Iterable[ErrorSums]) -> float | None:
    """Return the share of the LoRA update that survives: 1.0 unchanged, 0.0 lost, None where it is not measurable."""
    moved = [each for each in tensors if each.moved]
    total = sum(each.moved for each in moved)
    if not total:
        return None
    noise = sum(each.error for each in moved) / sum(each.count for each in moved)
    if math.sqrt(noise / total) > MAX_KEPT_ERROR:
        return None
    return sum(each.kept for each in moved) / total


def require_kept(path: Path, kind: str, measured: QuantizationError) -> None:
    """Raise GateError for a file in which the LoRA update is lost or exaggerated."""
    if not is_kept(measured.kept):
        raise GateError(
            f"{path.name} keeps {100 * (measured.kept or 0):.0f} % of the LoRA update: "
            f"the base was quantized before, and the grid of {kind} interferes with the old one",
            "set other convert.quantizations: Q8_0, Q5_0 and Q4_0 have grids of their own",
        )


def is_kept(kept: float | None) -> bool:
    """Return whether a share of the LoRA update is inside the bounds, or unknown."""
    return kept is None or MIN_KEPT <= kept <= MAX_KEPT


def unfit_types(gguf: Gguf, kind: str, measured: QuantizationError) -> tuple[str, ...]:
    """Return the types that llama.cpp fell back to and that do not keep the LoRA update."""
    fallbacks = {tensor.kind for name, tensor in gguf.tensors.items() if is_fallback(name, tensor, kind)}
    return tuple(type_ for type_, kept in measured.by_type.items() if type_ in fallbacks and not is_kept(kept))


def replacement_types(gguf: Gguf, unfit: Iterable[str]) -> dict[str, str]:
    """Return the type of every matrix by name, with REPLACEMENT in place of the unfit types.

    Every matrix is listed: llama.cpp leaves listed tensors out when it chooses the types of the others.
    """
    matrices = {name: tensor.kind for name, tensor in gguf.tensors.items() if len(tensor.shape) > 1}
    return {name: REPLACEMENT if kind in unfit else kind for name, kind in matrices.items()}


def _bound(kind: str) -> float:
    return MAX_ERROR.get(kind, MAX_ERROR_BELOW_3_BITS)


def _raise(path: Path, lines: list[str]) -> None:
    if lines:
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise ArtifactError(f"{path} differs from its source: {'; '.join(lines[:3])}{more}", "run: tutor convert")
