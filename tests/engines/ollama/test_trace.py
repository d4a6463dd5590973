"""engines/ollama/trace.py with a fake server."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.fakes import ollama as fake

from tutor.engines.ollama.client import connect
from tutor.engines.ollama.trace import trace as ollama_trace
from tutor.engines.trace import EOS_TEXT, Step
from tutor.errors import ServiceError
from tutor.prompt.messages import conversation

HELLO = conversation("Hola")


@pytest.fixture
def server() -> Iterator[fake.FakeOllama]:
    with fake.running() as running:
        running.models["tutor:latest"] = fake.Model({}, {"chat_template": ""}, "")
        yield running


def traced(server: fake.FakeOllama, tokens: int = 16) -> Any:
    with connect(server.host, silent=2, pause=0.01) as api:
        return ollama_trace(api, "tutor", HELLO, tokens)


def test_trace_has_a_step_for_each_piece_and_the_end(server: fake.FakeOllama) -> None:
    found = traced(server)
    assert [step.text for step in found.steps] == [*server.pieces, EOS_TEXT]
    assert found.steps[0].logprob == -0.1
    assert found.steps[0].margin == pytest.approx(3)
    assert (found.finish, found.steps[-1].logprob) == ("eos", None)
    (body,) = server.bodies("POST /api/chat")
    assert (body["options"]["temperature"], body["options"]["stop"]) == (0.0, [])
    assert body["truncate"] is False


def test_cut_answer_has_no_end_step(server: fake.FakeOllama) -> None:
    found = traced(server, tokens=3)
    assert (found.text, found.finish) == ("".join(server.pieces[:3]), "length")
    assert found.steps[-1].text != EOS_TEXT


def test_piece_of_several_tokens_has_no_logprob(server: fake.FakeOllama) -> None:
    piece = fake.chunk("👩", -0.2, 2)
    piece["logprobs"][0]["token"] = "\u200d"
    server.script("POST /api/chat", fake.stream(piece, {"done": True, "done_reason": "stop", "prompt_eval_count": 3}))
    assert traced(server).steps[0] == Step("👩", None)


def test_stream_without_last_event_raises_service_error(server: fake.FakeOllama) -> None:
    server.script("POST /api/chat", fake.stream(fake.chunk(" la", -0.1, 2)))
    with pytest.raises(ServiceError, match="without its last event"):
        traced(server)
