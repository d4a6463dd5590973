"""Teacher-forced logits of a model, with one decoder layer in memory at a time.

All rows pass through a layer before the next one is read. In: a configuration, weights piece by piece, rows of ids.
Out: logits, equal to those of the loaded model in fp32. Masks, positions, scaled embeddings and the last norm
are those of the model's own code. Does not generate, and never loads the whole model.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from tutor.engines.protocol import SCORE_CHUNK_TOKENS

log = logging.getLogger(__name__)

Row = tuple[Sequence[int], Sequence[int]]
"""Prompt ids and answer ids."""
Weights = Callable[[str], Iterator[torch.Tensor]]
"""Function from a tensor's name to its rows from first to last, in pieces of any floating-point type."""
LayerCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a decoder layer after its hidden states: positions, and a mask where it needs one."""


@torch.no_grad()
def logits_of_rows(streamed: "StreamedModel", rows: Sequence[Row]) -> Iterator[torch.Tensor]:
    """Yield for each row the logits in fp32 that each of its answer's ids was chosen from, one line an id.

    The output head is read once for each SCORE_CHUNK_TOKENS of the answers, whose logits are in memory together.
    """
    waiting: list[torch.Tensor] = []
    for states in _states_before_answers(streamed, rows):
        if waiting and sum(map(len, waiting)) + len(states) > SCORE_CHUNK_TOKENS:
            yield from _logits(waiting, streamed.head())
            waiting = []
        waiting.append(states)
    yield from _logits(waiting, streamed.head())


def _logits(states: Sequence[torch.Tensor], head: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    together = torch.cat([*states])
    lines = torch.cat([together @ piece.to(together.device, torch.float32).T for piece in head], dim=1)
    return iter(torch.split(lines, [len(each) for each in states]))


def _states_before_answers(streamed: "StreamedModel", rows: Sequence[Row]) -> list[torch.Tensor]:
    """Return each row's hidden states, one line for each id of its answer: that before it, which gives its chances."""
    hidden = streamed.embed([[*prompt, *answer] for prompt, answer in rows])
    calls = [streamed.layer_calls(states) for states in hidden]
    total = len(streamed.layers)
    for number in range(total):
        filled = streamed.read_layer(number)
        for index, states in enumerate(hidden):
            hidden[index] = streamed.run_layer(number, filled, states, calls[index][number])
        progress = {"done": number + 1, "total": total}
        log.info("scored through layer %d of %d", number + 1, total, extra=progress)
    del filled
    ends = zip(hidden, rows, strict=True)
    return [streamed.finish(states)[0, len(prompt) - 1 : -1] for states, (prompt, _) in ends]


class StreamedModel:
    """A model that holds the weights of its norm alone; all others are read when they are needed, into fp32."""

    def __init__(self, folder: Path, weights: Weights, device: torch.device, adapter: Path | None = None) -> None:
        """`adapter`: the folder of a PEFT adapter, whose layers stand in the place of those that it changes."""
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
            if adapter is not None:
                from peft import PeftConfig, inject_adapter_in_model

                inject_adapter_in_model(PeftConfig.from_pretrained(adapter), model)
        self._model = model.eval()
        self._decoder = model.get_decoder()
        self._names = {module: name for name, module in model.named_modules()}
        self._weights = weights
        self._device = device
        self._held: dict[str, torch.Tensor] = {}
        self.layers = list(self._decoder.layers)
        left_out = {module for layer in self.layers for module in layer.modules()} | {model.get_input_embeddings()}
        for module in set(self._decoder.modules()) - left_out:
            for name, parameter in module.named_parameters(recurse=False):
                filled = torch.empty(parameter.shape, device=device)
                _fill(filled, weights(f"{self._names[module]}.{name}"))
                setattr(module, name, torch.nn.Parameter(filled, requires_grad=False))
        for module in self._decoder.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    def embed(self, ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Return the embedding of each sequence, 1 x length x width; the embedding table is read once."""
        used, places = torch.unique(torch.tensor(list(itertools.chain(*ids))), return_inverse=True)
        module = self._model.get_input_embeddings()
        table, first = torch.empty(len(used), module.weight.shape[1]), 0
        for piece in self._weights(f"{self._names[module]}.weight"):
            in_piece = (used >= first) & (used < first + len(piece))
            table[in_piece] = piece[used[in_piece] - first].float()
            first += len(piece)
        module.padding_idx = None  # an id of the whole table, and without an effect on values
        found = functional_call(module, {"weight": table.to(self._device)}, (places.to(self._device),))
        return [states[None] for states in found.split([len(sequence) for sequence in ids])]

    def layer_calls(self, states: torch.Tensor) -> list[LayerCall]:
        """Return the arguments that the model gives each of its layers for a row's hidden states."""
        calls: list[LayerCall] = []

        def record(hidden_states: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
            calls.append((given, named))
            return hidden_states

        self._forward(states, record)
        return calls

    def read_layer(self, number: int) -> dict[str, torch.Tensor]:
        """Return the weights of a layer, in the memory of the layer before it where their shapes are equal."""
        layer = self.layers[number]
        shapes = {name: parameter.shape for name, parameter in layer.named_parameters()}
        if {name: tensor.shape for name, tensor in self._held.items()} != shapes:
            self._held = {name: torch.empty(shape, device=self._device) for name, shape in shapes.items()}
        for name, tensor in self._held.items():
            _fill(tensor, self._weights(f"{self._names[layer]}.{name}"))
        return self._held

    def run_layer(
        self, number: int, filled: dict[str, torch.Tensor], states: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        """Return a layer's output for a row's hidden states."""
        given, named = call
        return functional_call(self.layers[number], filled, (states, *given), named)  # type: ignore[no-any-return]

    def finish(self, states: torch.Tensor) -> torch.Tensor:
        """Return what the model makes of the last layer's output: the input of its head."""
        return self._forward(states, lambda hidden_states, *_, **__: hidden_states)

    def head(self) -> Iterator[torch.Tensor]:
        """Yield the rows of the output head."""
        tied = self._model.config.get_text_config().tie_word_embeddings
        module = self._model.get_input_embeddings() if tied else self._model.get_output_embeddings()
        return self._weights(f"{self._names[module]}.weight")

    def _forward(self, states: torch.Tensor, replacement: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Run the model between embedding and head, with a function in the place of every layer."""
        for layer in self.layers:
            layer.forward = replacement
        try:
            return self._decoder(inputs_embeds=states, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
        finally:
            for layer in self.layers:
                del layer.forward


def _fill(parameter: torch.Tensor, pieces: Iterator[torch.Tensor]) -> None:
    first = 0
    for piece in pieces:
        parameter[first : first + len(piece)].copy_(piece)
        first += len(piece)
