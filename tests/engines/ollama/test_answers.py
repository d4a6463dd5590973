"""engines/ollama/answers.py: a field of a wrong type in any answer is exit 6 and names the endpoint and the field."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from support.fakes import ollama as fake
from support.fakes.ollama import FakeOllama

from tutor.engines.ollama.client import Ollama
from tutor.engines.ollama.engine import OllamaServer
from tutor.engines.ollama.trace import trace
from tutor.engines.protocol import Generation
from tutor.errors import ServiceError
from tutor.prompt.messages import conversation

SHORT = Generation(max_new_tokens=4, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=7)
HOLA = conversation("Hola")
END = {"done": True, "done_reason": "stop", "prompt_eval_count": 3, "eval_count": 2, "eval_duration": 5}
TAG = {"model": "a:b", "digest": "1", "size": 3, "modified_at": "2026-11-23T17:42:00.117365914Z"}


def message_of(call: Callable[[], object]) -> str:
    with pytest.raises(ServiceError) as caught:
        call()
    assert caught.value.code == 6
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"eval_count": None}, "eval_count"),
        ({"eval_count": "2"}, "eval_count"),
        ({"eval_count": True}, "eval_count"),
        ({"eval_count": -1}, "eval_count"),
        ({"eval_count": 10**30}, "eval_count"),
        ({"prompt_eval_count": 2.5}, "prompt_eval_count"),
        ({"eval_duration": float("nan")}, "eval_duration"),
        ({"done": 1}, "done"),
        ({"done_reason": None}, "done_reason"),
        ({"message": None}, "message"),
        ({"message": {"content": None}}, "message.content"),
        ({"message": ["x"]}, "message"),
    ],
)
def test_wrong_field_of_an_answer_is_named(
    server: FakeOllama, engine: OllamaServer, change: dict[str, Any], field: str
) -> None:
    server.script("POST /api/chat", fake.stream(fake.chunk(" a"), {**END, **change}))
    message = message_of(lambda: engine.answer(HOLA, SHORT))
    assert f"the answer of Ollama at {server.host} to POST /api/chat has a wrong {field}: " in message


@pytest.mark.parametrize(
    ("logprobs", "field"),
    [
        ([{"token": " a"}], "logprobs.0.logprob"),
        ([{"token": " a", "logprob": float("-inf")}], "logprobs.0.logprob"),
        ([{"token": 3, "logprob": -1}], "logprobs.0.token"),
        ([{"token": " a", "logprob": -1, "top_logprobs": [{"token": " a"}]}], "logprobs.0.top_logprobs.0.logprob"),
        ({"token": " a"}, "logprobs"),
    ],
)
def test_wrong_logprob_of_a_trace_is_named(server: FakeOllama, api: Ollama, logprobs: object, field: str) -> None:
    server.script("POST /api/chat", fake.stream({**fake.chunk(" a"), "logprobs": logprobs}, END))
    assert f"has a wrong {field}: " in message_of(lambda: trace(api, "tutor", HOLA, 4))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"capabilities": None}, "capabilities"),
        ({"capabilities": [3]}, "capabilities.0"),
        ({"template": 3}, "template"),
        ({"system": None}, "system"),
        ({"details": {"family": None}}, "details.family"),
        ({"parameters": {"num_ctx": 3}}, "parameters"),
        ({"parameters": "num_ctx many"}, "parameters.num_ctx"),
        ({"parameters": "num_ctx " + "[" * 5000}, "parameters.num_ctx"),
    ],
)
def test_wrong_field_of_a_description_is_named(
    server: FakeOllama, api: Ollama, change: dict[str, Any], field: str
) -> None:
    server.script("POST /api/show", fake.status(200, json.dumps({"template": "", **change})))
    assert f"to POST /api/show has a wrong {field}: " in message_of(lambda: OllamaServer(api, "tutor"))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"size": None}, "size"),
        ({"digest": ""}, "digest"),
        ({"model": 1}, "model"),
        ({"modified_at": "x"}, "modified_at"),
    ],
)
def test_wrong_field_of_a_list_is_named(server: FakeOllama, api: Ollama, change: dict[str, Any], field: str) -> None:
    server.script("GET /api/tags", fake.status(200, json.dumps({"models": [TAG, {**TAG, **change}]})))
    assert f"to GET /api/tags has a wrong models.1.{field}: " in message_of(api.tags)


def test_time_at_the_edge_of_the_calendar_is_left_out(server: FakeOllama, api: Ollama) -> None:
    server.script(
        "GET /api/tags", fake.status(200, json.dumps({"models": [{**TAG, "modified_at": "0001-01-01T00:00:00+14:00"}]}))
    )
    assert [tag.modified for tag in api.tags()] == [""]


@pytest.mark.parametrize(
    ("where", "call", "body", "field"),
    [
        ("GET /api/version", lambda api: api.version(), {}, "version"),
        ("GET /api/version", lambda api: api.version(), {"version": 3}, "version"),
        ("GET /api/ps", lambda api: api.loaded(), {"models": [{"model": "a", "size": "1"}]}, "models.0.size"),
        ("GET /api/ps", lambda api: api.loaded(), {"models": None}, "models"),
        (
            "POST /api/chat",
            lambda api: api.rendered("tutor", HOLA),
            {"_debug_info": {"rendered_template": 3}},
            "_debug_info.rendered_template",
        ),
    ],
)
def test_wrong_field_of_other_answers_is_named(
    server: FakeOllama, api: Ollama, where: str, call: Callable[[Ollama], object], body: object, field: str
) -> None:
    server.script(where, fake.status(200, json.dumps(body)))
    assert f"to {where} has a wrong {field}: " in message_of(lambda: call(api))


def test_wrong_event_of_a_creation_is_named(server: FakeOllama, api: Ollama) -> None:
    server.script("POST /api/create", fake.stream({"status": "x", "completed": "1"}))
    assert "to POST /api/create has a wrong completed: " in message_of(lambda: api.create("tutor:new", {}))


@pytest.mark.parametrize(
    "data",
    [
        "[" * 100_000,
        '{"a": ' * 100_000,
        '{"models": ' + "9" * 10_000 + "}",
        '{"error": "' + "[" * 100_000 + '"}',
        r'{"error": "\ud800"}',
        '{"error": ' + "[" * 100 + "]" * 100 + "}",
        "null",
        "\ufeff{}",
    ],
)
@pytest.mark.parametrize("code", [200, 500])
def test_hostile_json_is_a_service_error(server: FakeOllama, api: Ollama, data: str, code: int) -> None:
    server.script("GET /api/tags", fake.status(code, data))
    server.script("POST /api/copy", fake.status(500, data))
    message_of(api.tags)
    message_of(lambda: api.copy("a", "b"))


@pytest.mark.parametrize("data", ['{"models": []}'.encode("utf-16"), b'{"models": ["\xff"]}', b"\x00"])
def test_answer_in_another_encoding_is_a_service_error(server: FakeOllama, api: Ollama, data: bytes) -> None:
    server.script("GET /api/tags", lambda handler: handler.send(200, data))
    assert "is not Ollama: its answer to GET /api/tags has another form" in message_of(api.tags)


def test_fields_of_newer_servers_are_ignored(server: FakeOllama, engine: OllamaServer) -> None:
    event = {**fake.chunk(" a"), "new": [None], "thinking": 3}
    server.script("POST /api/chat", fake.stream(event, {**END, "context": [1, 2]}))
    assert engine.answer(HOLA, SHORT).text == " a"
