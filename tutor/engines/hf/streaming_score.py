"""Teacher-forced log-probabilities of a Llama, with one decoder layer in memory at a time.

All rows pass through a layer before the next one is read. In: a configuration, weights piece by piece, rows of ids.
Out: nats, equal to those of score.py on the loaded model in fp32. Does not generate, and never loads the whole model.
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
"""Function from a tensor's name to its rows from first to last, in pieces of any floating-point type."""


@torch.no_grad()
def streamed_logprobs(
    model: Path, weights: Weights, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[list[float]]:
    """Return the log-probability (nats, in float32) of each answer id, given the prompt and the answer before it.

    `model` is the folder of config.json. Uses the first GPU when there is one; a layer must fit in it. Computes in fp32
    on every machine: two bases of one model differ by less than bf16 rounds.
    """
    config = LlamaConfig.from_pretrained(model, local_files_only=True)
    config._attn_implementation = "sdpa"  # from_pretrained sets it too
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
        progress = {"done": number + 1, "total": config.num_hidden_layers}
        log.info("scored through layer %d of %d", number + 1, config.num_hidden_layers, extra=progress)
    del layer
    norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps).to(device)
    _fill(norm.weight, weights(NORM))
    # The hidden state before an id gives the probability of that id.
    states_before = [norm(states[0, len(prompt) - 1 : -1]) for states, (prompt, _) in zip(hidden, rows, strict=True)]
    targets = torch.tensor([token for _, answer in rows for token in answer], device=device)
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    scores = iter(_log_probabilities(torch.cat(states_before), targets, weights(head)).tolist())
    return [[next(scores) for _ in answer] for _, answer in rows]


def _embed(ids: Sequence[Sequence[int]], weights: Weights, width: int, device: torch.device) -> list[torch.Tensor]:
    """Return the embedding of each sequence, 1 x length x width; the embedding table is read once."""
    wanted = torch.tensor([token for sequence in ids for token in sequence])
    found = torch.empty(len(wanted), width)
    first = 0
    for piece in weights(EMBEDDING):
        in_piece = (wanted >= first) & (wanted < first + len(piece))
        found[in_piece] = piece[wanted[in_piece] - first].float()
        first += len(piece)
    ends = list(itertools.accumulate(len(sequence) for sequence in ids))
    return [found[start:end][None].to(device) for start, end in zip([0, *ends], ends, strict=False)]


def _fill(parameter: torch.Tensor, pieces: Iterator[torch.Tensor]) -> None:
    first = 0
    for piece in pieces:
        parameter[first : first + len(piece)].copy_(piece)
        first += len(piece)


def _log_probabilities(states: torch.Tensor, targets: torch.Tensor, head: Iterator[torch.Tensor]) -> torch.Tensor:
    """Return the log-probability of each state's target over the whole vocabulary, read in pieces."""
    # In 64 bits: the rounding errors of 32 bits over hundreds of pieces are as large as the difference of two bases.
    total = torch.full((len(states),), -torch.inf, device=states.device, dtype=torch.float64)
    chosen = torch.empty_like(total)
    first = 0
    for piece in head:
        logits = states @ piece.to(states.device, torch.float32).T
        total = torch.logaddexp(total, logits.logsumexp(dim=-1).double())
        in_piece = (targets >= first) & (targets < first + len(piece))
        chosen[in_piece] = logits[in_piece, targets[in_piece] - first].double()
        first += len(piece)
    return chosen - total
