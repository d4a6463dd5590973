"""engines/hf/score.py: log-probabilities equal to those of a plain forward pass."""

import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from support.models.learnt_model import ENDS
from support.tolerances import forward_error, largest_logit

from tutor.engines.hf.engine import TransformersEngine
from tutor.engines.hf.loading import load_base
from tutor.engines.hf.score import answer_logprobs
from tutor.engines.protocol import SCORE_CHUNK_TOKENS
from tutor.prompt.encoding import encode

pytestmark = pytest.mark.usefixtures("one_thread")


def test_answer_logprobs_equal_those_of_a_plain_forward_pass(engine: TransformersEngine) -> None:
    rows = [([5, 6, 7], [8, 9]), ([1], [2, 3, 4, 256])]
    bound = forward_error(engine.model.config, 5) * largest_logit(engine.model, rows)
    for (prompt, answer), scores in zip(rows, answer_logprobs(engine.model, rows), strict=True):
        with torch.no_grad():
            table = torch.log_softmax(engine.model(input_ids=torch.tensor([prompt + answer])).logits[0], -1)
        expected = [table[len(prompt) - 1 + n, token].item() for n, token in enumerate(answer)]
        assert scores == pytest.approx(expected, abs=bound)


def test_answer_logprobs_of_a_learnt_row_are_near_zero(engine: TransformersEngine) -> None:
    row = encode(engine.tokenizer, *ENDS)
    [scores] = answer_logprobs(engine.model, [(row.ids[: row.n_prompt], row.ids[row.n_prompt :])])
    assert len(scores) == len(ENDS[1].encode()) + 1
    assert math.exp(-sum(scores) / len(scores)) < 1.1


def test_answer_logprobs_in_parts_equal_those_of_all_logits(tiny: Path) -> None:
    model = load_base(tiny, "none", "fp32")
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 250, (2 * SCORE_CHUNK_TOKENS + 90,), generator=draw).tolist()
    rows = [(ids[:9], ids[9:]), (ids[:1], ids[1 : SCORE_CHUNK_TOKENS + 1]), (ids[:80], ids[80:81])]
    bound = forward_error(model.config, len(ids)) * largest_logit(model, rows)
    for (prompt, answer), found in zip(rows, answer_logprobs(model, rows), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        whole = torch.log_softmax(logits.float(), dim=-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
        assert found == pytest.approx(whole, abs=bound)
        # Errors of both signs: a single one may reach the bound, in a sum they cancel.
        assert math.fsum(found) == pytest.approx(math.fsum(whole), abs=bound * math.sqrt(len(found)))
