"""engines/hf/trace.py with the tiny model."""

from types import SimpleNamespace
from typing import Any

import pytest
from support.models.conversations import CONVERSATIONS, HELLO, greedy_ids

from tutor.engines.trace import EOS_TEXT, Penalty, Trace
from tutor.prompt.tutor_format import render


def trace_along(engine: Any, ids: Any, path: Any, penalty: Penalty | None = None) -> Trace:
    """Return the trace along one answer."""
    from tutor.engines.hf.trace import Followed, observe

    _, (found,) = observe(engine, [], [Followed(ids, path, penalty)])
    return found


@pytest.mark.pipeline
def test_trace_along_own_answer_has_all_of_it(loaded: Any) -> None:
    from support.tolerances import forward_error, largest_logit

    from tutor.engines.hf.score import answer_logprobs

    ids = loaded.tokenizer(render(CONVERSATIONS[1]))["input_ids"]
    path = greedy_ids(loaded, ids, 12)
    bound = forward_error(loaded.model.config, len(ids) + 12) * largest_logit(loaded.model, [(ids, path)])
    found = trace_along(loaded, ids, path)
    assert min(step.margin for step in found.steps) > 2 * bound, "rounding must not decide which token is the best"
    assert (
        "".join(step.text for step in found.steps)
        == loaded.tokenizer.decode([*ids, *path])[len(loaded.tokenizer.decode(ids)) :]
    )
    (logprobs,) = answer_logprobs(loaded.model, [(ids, path)])
    assert [step.logprob for step in found.steps] == pytest.approx(logprobs, abs=bound)
    assert found.finish == "length"


@pytest.mark.pipeline
def test_trace_joins_a_blank_with_the_character_it_begins() -> None:
    """The base of the demo has a token of a blank and the first byte of "¡"; llama-server returns both as one step."""
    import torch

    pieces = (b":", b" \xc2", b"\xa1", b"El")
    tokenizer = SimpleNamespace(
        decode=lambda ids, **_: b"".join(pieces[id_] for id_ in ids).decode("utf-8", "replace"), eos_token_id=9
    )

    def logits(rows: Any) -> Any:
        """Prefers the next of `pieces` after each."""
        ((prompt, answer),) = rows
        yield torch.nn.functional.one_hot((torch.tensor([*prompt, *answer])[:-1] + 1) % 4, 24).float()

    engine: Any = SimpleNamespace(end_id=9, tokenizer=tokenizer, logits=logits)
    pieces += (b"x",) * 20
    found = trace_along(engine, [0], [1, 2, 3])
    assert [(step.text, step.tokens) for step in found.steps] == [(" ¡", 2), ("El", 1)]


@pytest.mark.pipeline
def test_trace_along_other_answer_ends_at_first_difference(loaded: Any) -> None:
    ids = loaded.tokenizer(render(HELLO))["input_ids"]
    path = greedy_ids(loaded, ids, 8)
    own = trace_along(loaded, ids, path)
    strange = [*path[:5], (path[5] + 1) % 900, *path[6:]]
    found = trace_along(loaded, ids, strange)
    assert [step.text for step in found.steps] == [step.text for step in own.steps][: len(found.steps)]
    assert found.finish is None


@pytest.mark.pipeline
def test_trace_along_eos_has_eos_step_and_finish_reason(loaded: Any) -> None:
    ids = loaded.tokenizer(render(HELLO))["input_ids"]
    eos = loaded.tokenizer.eos_token_id
    head = loaded.model.lm_head.weight
    kept = head.data[eos].clone()
    head.data[eos] = 100 * head.data.mean(0)  # the sign decides whether EOS is the best token or the worst
    try:
        ends = trace_along(loaded, ids, [eos])
        if ends.steps[-1].text != EOS_TEXT:
            head.data[eos] = -head.data[eos]
            ends = trace_along(loaded, ids, [eos])
    finally:
        head.data[eos] = kept
    assert (ends.finish, ends.text, ends.steps[-1].text) == ("eos", "", EOS_TEXT)


@pytest.mark.pipeline
def test_scores_equal_answer_logprobs_and_have_sorted_candidates(loaded: Any) -> None:
    from support.tolerances import forward_error, largest_logit

    from tutor.engines.hf.score import answer_logprobs
    from tutor.engines.hf.trace import observe

    rows = [(loaded.tokenizer(render(messages))["input_ids"], [5, 9, 300]) for messages in CONVERSATIONS]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    bound = forward_error(loaded.model.config, longest) * largest_logit(loaded.model, rows)
    for plain, full in zip(answer_logprobs(loaded.model, rows), observe(loaded, rows, [])[0], strict=True):
        assert full.logprobs == pytest.approx(plain, abs=bound)
        assert all(top == tuple(sorted(top, key=lambda pair: -pair[1])) for top in full.top)


@pytest.mark.pipeline
@pytest.mark.parametrize("window", [1000, 9])
def test_penalised_trace_chooses_as_generate_does(loaded: Any, window: int) -> None:
    """A window within the sequence is generate() with a penalty of the last tokens alone."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    class Windowed(LogitsProcessor):  # type: ignore[no-untyped-call]
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return RepetitionPenaltyLogitsProcessor(1.9)(input_ids[:, -window:], scores)

    ids = loaded.tokenizer(render(CONVERSATIONS[2]))["input_ids"]
    processors = LogitsProcessorList([Windowed()])
    out = loaded.model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12, logits_processor=processors)
    path = out[0, len(ids) :].tolist()
    assert path != greedy_ids(loaded, ids, 12), "the penalty must change an answer"
    found = trace_along(loaded, ids, path, Penalty(1.9, window))
    assert found.finish == "length", "it follows the answer to its end"
    assert all(step.top[0][0] == step.text for step in found.steps), "the best candidate behind the penalty"
    assert trace_along(loaded, ids, path).finish is None, "without the penalty its own token differs"
