"""Bounds of the difference between two computations of equal numbers on any two processors.

Processors differ in the order in which their kernels sum, and in where they round: the width of a vector, fused
multiplication, tiles, threads. Bounds on what that changes:

- Higham (2002), Accuracy and Stability of Numerical Algorithms, equation 3.5: an inner product of n terms in any order
  is within n u of the exact one, as a share of the sum of the terms' magnitudes; u is the unit roundoff.
- Higham and Mary (2019), A New Approach to Probabilistic Rounding Error Analysis, theorem 3.1: as roundings go up and
  down alike, it is within CERTAINTY sqrt(n) u, but for 2 exp(-CERTAINTY ** 2 / 2) of the cases.
- Higham (2002), lemma 3.3: sums one after the other err as one sum of all their terms.
"""

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

CERTAINTY = 6
"""Number of standard deviations of a bound; 3 of 100 million sums of roundings exceed it."""


def roundoff(dtype: Any = torch.float32) -> float:
    """Unit roundoff u of a type: the largest relative error of one rounding to nearest."""
    return float(torch.finfo(dtype).eps) / 2


def sum_error(terms: int, dtype: Any = torch.float32, *, exact: bool = False) -> float:
    """Largest difference of two sums of the same terms, as a share of the sum of the terms' magnitudes.

    With `exact`, of one sum and the exact value: half as many roundings.
    """
    roundings = terms if exact else 2 * terms
    return min(roundings, CERTAINTY * math.sqrt(roundings)) * roundoff(dtype)


def forward_terms(config: Any, tokens: int) -> int:
    """Number of terms on the longest way through a model, from an embedding to a log-probability over its vocabulary.

    `config` is the model's; `tokens` the longest row's.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    attention = hidden + head + 2 * tokens + heads * head  # q; scores; softmax and its weighted sum; o
    layer = 2 * hidden + attention + hidden + config.intermediate_size  # norms; attention; gate; down
    return int(config.num_hidden_layers * layer + 2 * hidden + config.vocab_size)  # norm, head, softmax


def forward_error(config: Any, tokens: int) -> float:
    """Largest difference of two fp32 passes in a logit, log-probability or loss, as a share of the largest logit.

    Norms keep the states of all layers at one size, so that errors add up and do not multiply.
    """
    return sum_error(forward_terms(config, tokens))


def backward_error(config: Any, tokens: int) -> float:
    """Largest difference of two fp32 backward passes, as a share of the largest gradient; `tokens` of all rows.

    The way back is as long as the way there, and a weight's gradient is a sum over all tokens.
    """
    return sum_error(2 * forward_terms(config, tokens) + tokens)


def half_error(config: Any) -> float:
    """Largest difference of llama.cpp's pass over F16 weights from one in fp32, as a share of the largest logit.

    It rounds to F16 what goes into q, k and v, the cache of k and v, the softmax, and what goes into o, gate, up and
    down; at last what goes into the head. fp32's own roundings are 8,000 times smaller.
    """
    return sum_error(7 * config.num_hidden_layers + 1, torch.float16, exact=True)


def largest_logit(model: Any, rows: Any) -> float:
    """The largest magnitude among a model's logits and their log-sum-exp, over rows of (prompt ids, answer ids)."""
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].float() for prompt, answer in rows]
    return max(max(row.abs().max().item(), row.logsumexp(-1).abs().max().item()) for row in logits)
