"""The weights of the token that ends an answer: a base that never saw it cannot learn from an adapter to stop.

In: a model folder, the prompt format. Out: nothing, or the reason. An adapter changes neither the embedding nor the
head, so a row of them that was never trained stays so. Streams two tensors, and loads no model.
"""

from pathlib import Path
from typing import Any

import numpy as np

from tutor.errors import ArtifactError
from tutor.formats.models.safetensors import WIDTHS, Stored, folder_weights
from tutor.formats.models.tensor_streams import Bits, pieces
from tutor.prompt.base_format import BaseFormat

ENDINGS = ("embed_tokens.weight", "lm_head.weight")
"""Ends of the names of the tensors with a row for every token; a tied base has the first alone."""
FACTOR = 10.0
"""Maximum ratio between a trained row's norm and the median. SmolLM2's 49,152 rows are within 0.57 and 2.4."""
SAME = 0.9999
"""Cosine from which two rows are one. Rows that were never trained, or were added as the mean of all, are equal."""
REMEDY = 'name the instruction-tuned model as base, or set prompt = "tutor"'
"""Next step for a base that was never trained on its template."""

Numbers = np.ndarray[Any, np.dtype[Any]]
"""Floating-point numbers."""


def check_end_row(model: Path, prompt: BaseFormat) -> None:
    """Raise ArtifactError where the rows of the end-of-turn token were never trained."""
    for name, tensor in folder_weights(model).items():
        if name.endswith(ENDINGS) and (fault := _fault(tensor, prompt.end_id)):
            raise ArtifactError(
                f"{model} was never trained on {prompt.end}, with which its chat template ends an answer ({name}: "
                f"{fault}): no adapter could teach it to stop",
                REMEDY,
            )


def _fault(tensor: Stored, row: int) -> str:
    """Return what is wrong with a row among all rows; empty when nothing is."""
    width = tensor.shape[1]
    wanted = _row(tensor, row)
    norm = float(np.linalg.norm(wanted))
    if not 0 < norm < np.inf:
        return f"the norm of row {row} is {norm:g}"
    norms, cosines = [], []
    for bits in pieces(tensor):
        rows = _floats(bits, tensor.dtype).reshape(-1, width)
        lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows))
        norms.append(lengths)
        cosines.append(rows @ wanted / np.maximum(lengths * norm, np.finfo(np.float32).tiny))
    similar = np.concatenate(cosines)
    similar[row] = 0
    if similar.max() >= SAME:
        return f"row {row} is the same as row {int(similar.argmax())}"
    known = np.concatenate(norms)
    median = float(np.median(known[known > 0]))  # rows without a token are zero in some models
    if not median / FACTOR <= norm <= median * FACTOR:
        return f"the norm of row {row} is {norm:.3g}, the median of all {median:.3g}"
    return ""


def _row(tensor: Stored, row: int) -> Numbers:
    """Return one row of a tensor in fp32. Raises ArtifactError where the tensor has no such row."""
    count, width = tensor.shape
    if row >= count:
        raise ArtifactError(f"{tensor.path}: {tensor.name} has {count} rows, and the chat template's end is {row}")
    each = WIDTHS[tensor.dtype]
    bits = np.fromfile(tensor.path, f"<u{each}", width, offset=tensor.start + row * width * each)
    return _floats(bits, tensor.dtype)


def _floats(bits: Bits, dtype: str) -> Numbers:
    """Return bits of a safetensors type as fp32."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32, copy=False)
