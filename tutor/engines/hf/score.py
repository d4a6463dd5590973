"""Teacher-forced log-probabilities of answers under a loaded model.

In: a model in transformers, ids of prompts and answers. Out: nats of each answer id, in float32. Does not generate.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tutor.engines.protocol import SCORE_CHUNK_TOKENS


@torch.no_grad()
def answer_logprobs(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
    """Return the log-probability (nats, in float32) of each answer id, given the prompt and the answer before it.

    `model` is an engine's model; rows are (prompt ids, answer ids). One forward pass per row: padding would change the
    rounding. The logits of SCORE_CHUNK_TOKENS tokens are computed at a time: those of a whole row with a vocabulary of
    128,256 need more memory than a training step.
    """
    head = model.get_output_embeddings()
    decoder = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    scores = []
    for prompt, answer in rows:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        parts = zip(*(torch.split(part, SCORE_CHUNK_TOKENS) for part in (hidden, ids[0, len(prompt) :])), strict=True)
        scores.append([value for states, chosen in parts for value in _log_probabilities(head(states), chosen)])
    return scores


def _log_probabilities(logits: torch.Tensor, chosen: torch.Tensor) -> list[float]:
    found: list[float] = torch.log_softmax(logits.float(), dim=-1).gather(1, chosen[:, None])[:, 0].tolist()
    return found
