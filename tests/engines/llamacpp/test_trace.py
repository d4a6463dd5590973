"""engines/llamacpp/trace.py with the pinned build, against engines/hf/trace.py."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.models.conversations import CONVERSATIONS, greedy_ids

from tutor.engines.llamacpp.convert import Conversion, to_gguf
from tutor.engines.llamacpp.server import LlamaServer, serve
from tutor.engines.llamacpp.trace import rendered
from tutor.engines.llamacpp.trace import trace as llamacpp_trace
from tutor.engines.trace import Penalty, Step, divergence
from tutor.formats.models.pre_tokenizer import pre_tokenizer_name
from tutor.prompt.tutor_format import render


@pytest.fixture(scope="module")
def served(real: None, chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    """A llama-server of the tiny model's F16 GGUF, with the chat template of the file."""
    gguf = tmp_path_factory.mktemp("served") / "tiny-F16.gguf"
    to_gguf(Conversion(chat_model, gguf, pre_tokenizer_name(chat_model / "tokenizer.json")))
    with serve(gguf, context=512, threads=1, log=gguf.with_name("server.log"), own_template=True) as running:
        yield running


def decided(steps: Sequence[Step], bound: float) -> int:
    """Return the number of steps before the first near tie, which rounding may decide; at least four."""
    count = next((number for number, step in enumerate(steps) if step.margin <= 2 * bound), len(steps))
    assert count >= 4
    return count


@pytest.mark.llamacpp
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_llama_server_renders_template_of_its_file(served: LlamaServer, messages: Any) -> None:
    assert rendered(served, messages) == render(messages)


@pytest.mark.llamacpp
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_trace_of_llama_server_equals_trace_of_transformers(served: LlamaServer, loaded: Any, messages: Any) -> None:
    from support.tolerances import half_error, largest_logit

    from tutor.engines.hf.trace import Followed, observe

    ids = loaded.tokenizer(render(messages))["input_ids"]
    path = greedy_ids(loaded, ids, 12)
    _, (ours,) = observe(loaded, [], [Followed(ids, path)])
    bound = half_error(loaded.model.config) * largest_logit(loaded.model, [(ids, path)])
    taken, theirs = llamacpp_trace(served, render(messages), 12)
    assert len(path) == len(taken) == 12
    assert (theirs.prompt_tokens, theirs.finish) == (len(ids), "length")
    same = decided(ours.steps, bound)
    assert taken[:same] == path[:same]
    found, wanted = theirs.steps[:same], ours.steps[:same]
    assert [step.text for step in found] == [step.text for step in wanted]
    assert [step.logprob for step in found] == pytest.approx([step.logprob for step in wanted], abs=bound)
    assert [step.margin for step in found] == pytest.approx([step.margin for step in wanted], abs=2 * bound)
    assert divergence(dict(ours.steps[0].top), dict(theirs.steps[0].top)) < 1e-3


@pytest.mark.llamacpp
@pytest.mark.parametrize("window", [512, 9])
def test_penalised_trace_equals_that_of_transformers(served: LlamaServer, loaded: Any, window: int) -> None:
    from support.tolerances import half_error, largest_logit

    from tutor.engines.hf.trace import Followed, observe

    prompt, penalty = render(CONVERSATIONS[2]), Penalty(1.9, window)
    ids = loaded.tokenizer(prompt)["input_ids"]
    path, theirs = llamacpp_trace(served, prompt, 12, penalty)
    _, (ours,) = observe(loaded, [], [Followed(ids, path, penalty)])
    bound = half_error(loaded.model.config) * largest_logit(loaded.model, [(ids, path)])
    pairs = list(zip(theirs.steps, ours.steps, strict=False))
    if len(ours.steps) < len(path):  # its last token differs from the path's
        assert ours.steps[-1].margin <= 2 * 1.9 * bound, "only a near tie behind the penalty may be another token"
        pairs = pairs[:-1]
    assert len(pairs) >= 4
    for found, wanted in pairs:
        assert found.text == wanted.text
        assert found.logprob == pytest.approx(wanted.logprob, abs=bound), "before the penalty"
        assert divergence(dict(wanted.top), dict(found.top)) < 1e-3, "behind it"
    taken, _ = llamacpp_trace(served, prompt, 12)
    assert taken != path, "the penalty must change an answer"


class SilentServer:
    """Tells nothing of the first tokens that are drawn at the second place, and never of those at the third."""

    def __init__(self) -> None:
        self.draws: list[tuple[int, int]] = []

    def tokenize(self, text: str) -> list[int]:
        return [1] * len(text)

    def post(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        if "post_sampling_probs" not in request:
            item = {"id": 5, "token": "a", "logprob": -0.5, "top_logprobs": [{"token": "a", "logprob": -0.5}]}
            items = [{**item, "id": number} for number in (5, 6, 7)]
            return {
                "stop_type": "limit", "tokens": [5, 6, 7], "tokens_evaluated": 2, "completion_probabilities": items
            }  # fmt: skip
        place, seed = len(request["prompt"]) - 2, request["seed"]
        self.draws.append((place, seed))
        known = place == 0 or (place == 1 and seed == 3)
        return {"completion_probabilities": [{"top_probs": [{"token": "b", "prob": 0.5}]}]} if known else {}


def test_token_that_is_part_of_a_character_is_drawn_again() -> None:
    server: Any = SilentServer()
    _, found = llamacpp_trace(server, "xx", 3, Penalty(1.1, 64))
    assert [[text for text, _ in step.top] for step in found.steps] == [["b"], ["b"], []]
    assert [place for place, _ in server.draws] == [0, 1, 1, 1, 2, 2, 2, 2]
