"""A model in transformers whose logits are computed with one decoder layer in memory at a time, in fp32.

In: model folders in 16 bits on this disk, perhaps a PEFT adapter, rows of ids. Out: logits as those of the loaded model
(engine.py), for machines that the model is too large for. Does not generate.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from tutor.engines.hf.loading import DTYPES
from tutor.engines.hf.nf4 import whole_round_trip
from tutor.engines.hf.streaming_score import StreamedModel, Weights, logits_of_rows
from tutor.formats.models.model_folder import load_tokenizer
from tutor.formats.models.safetensors import Stored, folder_weights
from tutor.formats.models.tensor_streams import pieces
from tutor.prompt.format import PromptFormat, end_token

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""PyTorch's types by their names in safetensors."""


class StreamedEngine:
    """A model folder that is read layer by layer for all rows together."""

    def __init__(
        self,
        folder: Path,
        adapter: Path | None,
        *,
        prompt: PromptFormat,
        device: torch.device,
        nf4_precision: str | None = None,
    ) -> None:
        """`nf4_precision`: the matrices of the layers are those of 4-bit training in this precision."""
        self.tokenizer = load_tokenizer(folder)
        self.prompt = prompt
        self.end_id = end_token(prompt, self.tokenizer)
        self._folder, self._adapter, self._device = folder, adapter, device
        self._weights = _weights(folder, adapter, device, nf4_precision)

    def logits(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[torch.Tensor]:
        """Yield for each (prompt ids, answer ids) the logits in fp32 that each answer id was chosen from."""
        return logits_of_rows(StreamedModel(self._folder, self._weights, self._device, self._adapter), rows)


def _weights(folder: Path, adapter: Path | None, device: torch.device, nf4_precision: str | None) -> Weights:
    """Return the function that reads a tensor by its name in the model, with PEFT's layers or without."""
    stored = folder_weights(folder)
    trained = load_file(adapter / "adapter_model.safetensors") if adapter else {}

    def read(name: str) -> Iterator[torch.Tensor]:
        if ".lora_" in name:
            return iter([trained[_adapter_name(name)].float()])
        tensor = stored[name.replace(".base_layer.", ".")]
        if nf4_precision and ".layers." in tensor.name and len(tensor.shape) == 2:
            whole = torch.cat([*_rows(tensor)]).to(device)
            return iter([whole_round_trip(whole, DTYPES[nf4_precision])])
        return _rows(tensor)

    return read


def _adapter_name(name: str) -> str:
    """Return the name in an adapter's file of a parameter in PEFT's layers."""
    return "base_model.model." + name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")


def _rows(tensor: Stored) -> Iterator[torch.Tensor]:
    shape = (-1, *tensor.shape[1:])
    return (
        torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(TYPES[tensor.dtype]).reshape(shape)
        for bits in pieces(tensor)
    )
