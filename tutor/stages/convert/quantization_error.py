"""Whether a quantized GGUF still says what was trained: its error by type, and how much of the training it keeps.

In: a GGUF, the merged and the base weights. Out: figures, or the error that they amount to. Changes no file.

Quantizing weights that were quantized before (the demo's base once was Q4_1) meets the older grid: the rounding is then
no noise but follows the weights. Q5_1, whose 32 levels span the same range as Q4_1's 16, made every change of training
1.2 to 1.7 times as large on the demo, while its error of 4.5 % looked like Q5_0's: held-out perplexity 18.6 after 10.6,
by the program's own kernels and dequantized to F32 alike. That is why `kept` is measured, and not the error alone.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tutor.errors import ArtifactError, GateError
from tutor.formats.models.gguf import Gguf
from tutor.formats.models.gguf_metadata import is_fallback
from tutor.formats.models.gguf_weights import Compared, Weight, check_exact, check_names, compare

LARGEST_ERROR = {
    "F32": 0.0,
    "F16": 0.001,
    "BF16": 0.01,
    "Q8_0": 0.02,
    "Q6_K": 0.05,
    **dict.fromkeys(("Q5_0", "Q5_1", "Q5_K"), 0.12),
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS"), 0.25),
    **dict.fromkeys(("Q3_K", "IQ3_S", "IQ3_XXS"), 0.5),
}
"""Root mean square of a tensor's error over that of its weights."""
LARGEST_OTHER = 0.95
"""The same for types of two bits and less: beyond it a tensor might as well be zero."""
LEAST, MOST = 0.5, 1.25
"""Of what training changed: with less it is the base that answers, and with more nothing that was ever trained."""
CERTAIN = 0.1
"""Standard error of `kept` up to which it is judged: in four bits, hardly any training is hard to see."""
REPLACEMENT = "Q8_0"
"""What a tensor gets instead of such a type that llama.cpp fell back to: its own fallback for Q6_K, of blocks of 32."""


@dataclass(frozen=True)
class Figures:
    """What a file's tensors come to."""

    error: float  # the largest of a tensor, relative
    kept: float | None  # of what training changed; None where nothing was, or too little to be seen
    by_type: Mapping[str, float | None]  # the same of a type's tensors


def exact(path: Path, gguf: Gguf, weights: Mapping[str, Weight]) -> None:
    """Raise ArtifactError where an F16 file is not its folder, number for number."""
    _raise(path, check_exact(path, gguf, weights))


def measure(path: Path, gguf: Gguf, weights: Mapping[str, Weight], base: Mapping[str, Weight] | None) -> Figures:
    """The figures of a quantized file. Raises ArtifactError where a tensor is missing, or further off than its type."""
    _raise(path, check_names(gguf, weights))
    found = compare(path, gguf, weights, base)
    far = {name: each for name, each in found.items() if not each.relative <= _bound(each.kind)}
    _raise(path, [f"{name} ({each.kind}) is {100 * each.relative:.1f} % off" for name, each in far.items()])
    types = sorted({each.kind for each in found.values()})
    by_type = {kind: kept(each for each in found.values() if each.kind == kind) for kind in types}
    return Figures(max(each.relative for each in found.values()), kept(found.values()), by_type)


def kept(tensors: Iterable[Compared]) -> float | None:
    """How large what training changed is in a file: 1 as it was, 0 not there. None where it cannot be told."""
    moved = [each for each in tensors if each.moved]
    total = sum(each.moved for each in moved)
    if not total:
        return None
    noise = sum(each.error for each in moved) / sum(each.count for each in moved)
    if math.sqrt(noise / total) > CERTAIN:
        return None
    return sum(each.kept for each in moved) / total


def refuse_lost(path: Path, kind: str, figures: Figures) -> None:
    """Raise GateError for a file that says something else than was trained."""
    if not holds(figures.kept):
        raise GateError(
            f"{path.name} has {100 * (figures.kept or 0):.0f} % of what training changed: the base was once quantized, "
            f"and {kind} meets its old grid",
            "take others for convert.quantizations: Q8_0, Q5_0 and Q4_0 have grids of their own",
        )


def holds(kept: float | None) -> bool:
    """Whether so much of what training changed is enough, and not too much."""
    return kept is None or LEAST <= kept <= MOST


def unfit(gguf: Gguf, kind: str, figures: Figures) -> tuple[str, ...]:
    """The types that llama.cpp fell back to and that do not hold what was trained."""
    fallbacks = {tensor.kind for name, tensor in gguf.tensors.items() if is_fallback(name, tensor, kind)}
    return tuple(type_ for type_, kept in figures.by_type.items() if type_ in fallbacks and not holds(kept))


def replaced(gguf: Gguf, unfit: Iterable[str]) -> dict[str, str]:
    """Every matrix's type by name, with another in place of the unfit ones.

    Every one: llama.cpp does not count a tensor whose type is given, and would choose others' types otherwise.
    """
    matrices = {name: tensor.kind for name, tensor in gguf.tensors.items() if len(tensor.shape) > 1}
    return {name: REPLACEMENT if kind in unfit else kind for name, kind in matrices.items()}


def _bound(kind: str) -> float:
    return LARGEST_ERROR.get(kind, LARGEST_OTHER)


def _raise(path: Path, lines: list[str]) -> None:
    if lines:
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise ArtifactError(f"{path} is not what it was made from: {'; '.join(lines[:3])}{more}", "run: tutor convert")
