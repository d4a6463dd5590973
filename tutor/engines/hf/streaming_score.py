"""Teacher-forced log-probabilities of a Llama that is never loaded: one decoder layer in memory, all rows through it.

As engines/hf.score of the same weights in fp32. In: a configuration, weights piece by piece, rows of ids. Out: nats.
Generates nothing.
"""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

log = logging.getLogger(__name__)

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
Weights = Callable[[str], Iterator[torch.Tensor]]
"""A name -> its rows from first to last, in pieces, of any floating type."""


@torch.no_grad()
def score(model: Path, weights: Weights, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
    """Log-probabilities (nats) of each row's answer ids, given its prompt ids and the answer so far; in float32.

    `model` is the folder of config.json. On the first GPU where there is one: a layer has to fit in it.
    """
    config = LlamaConfig.from_pretrained(model, local_files_only=True)
    config._attn_implementation = "sdpa"  # as from_pretrained sets it
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden = _embed([[*prompt, *answer] for prompt, answer in rows], weights, config.hidden_size, device)
    rotary = LlamaRotaryEmbedding(config).to(device)
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0)
    layer = layer.to_empty(device=device).float().eval()
    for number in range(config.num_hidden_layers):
        for name, parameter in layer.named_parameters():
            _fill(parameter, weights(f"model.layers.{number}.{name}"))
        for index, states in enumerate(hidden):
            positions = torch.arange(states.shape[1], device=device)[None]
            hidden[index] = layer(states, position_embeddings=rotary(states, positions), position_ids=positions)
        counted = {"done": number + 1, "total": config.num_hidden_layers}
        log.info("scored through layer %d of %d", number + 1, config.num_hidden_layers, extra=counted)
    del layer
    norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps).to(device)
    _fill(norm.weight, weights(NORM))
    # The state before an id says how probable that id is.
    asked = [norm(states[0, len(prompt) - 1 : -1]) for states, (prompt, _) in zip(hidden, rows, strict=True)]
    targets = torch.tensor([token for _, answer in rows for token in answer], device=device)
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    scores = iter(_log_probabilities(torch.cat(asked), targets, weights(head)).tolist())
    return [[next(scores) for _ in answer] for _, answer in rows]


def _embed(ids: Sequence[Sequence[int]], weights: Weights, width: int, device: torch.device) -> list[torch.Tensor]:
    """The embedding's rows of each sequence, 1 x length x width; the embedding itself is read through once."""
    wanted = torch.tensor([token for sequence in ids for token in sequence])
    found = torch.empty(len(wanted), width)
    first = 0
    for piece in weights(EMBEDDING):
        here = (wanted >= first) & (wanted < first + len(piece))
        found[here] = piece[wanted[here] - first].float()
        first += len(piece)
    ends = list(itertools.accumulate(len(sequence) for sequence in ids))
    return [found[start:end][None].to(device) for start, end in zip([0, *ends], ends, strict=False)]


def _fill(parameter: torch.Tensor, pieces: Iterator[torch.Tensor]) -> None:
    first = 0
    for piece in pieces:
        parameter[first : first + len(piece)].copy_(piece)
        first += len(piece)


def _log_probabilities(states: torch.Tensor, targets: torch.Tensor, head: Iterator[torch.Tensor]) -> torch.Tensor:
    """Of one target a state, over the whole vocabulary, of which one piece is looked at a time."""
    # In 64 bits: over hundreds of pieces the roundings of 32 bits add up to what two bases differ by.
    total = torch.full((len(states),), -torch.inf, device=states.device, dtype=torch.float64)
    chosen = torch.empty_like(total)
    first = 0
    for piece in head:
        logits = states @ piece.to(states.device, torch.float32).T
        total = torch.logaddexp(total, logits.logsumexp(dim=-1).double())
        here = (targets >= first) & (targets < first + len(piece))
        chosen[here] = logits[here, targets[here] - first].double()
        first += len(piece)
    return chosen - total
