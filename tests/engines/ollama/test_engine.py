"""engines/ollama/engine.py with a fake server on a loopback socket."""

import pytest
from support.fakes import ollama as fake
from support.fakes.ollama import FakeOllama

from tutor.engines.ollama.client import Ollama
from tutor.engines.ollama.engine import OllamaServer, serve
from tutor.engines.ollama.protocol import (
    MissingError,
)
from tutor.engines.protocol import Generation, greedy
from tutor.errors import ServiceError
from tutor.prompt.messages import Message, conversation
from tutor.prompt.own_format import OwnFormat
from tutor.recipe.settings import GenerateSettings

GREEDY = Generation(max_new_tokens=24, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=7)
HOLA = conversation("Hola")


def test_answer_has_leading_blank_counts_and_pieces(engine: OllamaServer) -> None:
    received: list[str] = []
    answer = engine.answer(HOLA, GREEDY, received.append)
    assert answer.text == " Una interfaz describe un objeto." == "".join(received)
    assert len(received) == 6
    assert (answer.finish, answer.tokens, answer.prompt_tokens) == ("eos", 6, 3)
    assert answer.tokens_per_second == pytest.approx(14.0)


def test_cut_answer_has_finish_reason_length(engine: OllamaServer) -> None:
    answer = engine.answer(HOLA, Generation(2, 0.0, 1.0, 1.0, 7))
    assert (answer.text, answer.finish) == (" Una interfaz", "length")


def test_stop_text_ends_an_answer_and_no_part_of_it_is_sent(server: FakeOllama, engine: OllamaServer) -> None:
    pieces = [" Un", " tipo.\n", "Ins", "isto.", "\n", "Instr", "ucción", ": ¿Y", " más?"]
    server.reply_to = lambda prompt: [(piece, -0.1) for piece in pieces]
    received: list[str] = []
    answer = engine.answer(HOLA, GREEDY, received.append)
    assert (answer.text, answer.finish) == (" Un tipo.\nInsisto.", "stop")
    assert received == [" Un", " tipo.", "\nInsisto."]
    assert (answer.prompt_tokens, answer.tokens) == (3, 8), "pieces up to the end of the stop text"
    assert [body["options"]["num_predict"] for body in server.bodies("POST /api/chat")] == [24, 1]


def test_beginning_of_a_stop_text_at_the_end_is_sent(server: FakeOllama, engine: OllamaServer) -> None:
    server.reply_to = lambda prompt: [(" a", -0.1), ("\nInst", -0.1)]
    received: list[str] = []
    answer = engine.answer(HOLA, GREEDY, received.append)
    assert (answer.text, answer.finish, received) == (" a\nInst", "eos", [" a", "\nInst"])


def test_request_has_unchanged_history_and_every_sampler(server: FakeOllama, engine: OllamaServer) -> None:
    history: list[Message] = [*HOLA, {"role": "assistant", "content": " Hola.\n"}, {"role": "user", "content": " ¿Y? "}]
    engine.answer(history, Generation(9, 0.003, 0.85, 1.15, 42))
    body = server.bodies("POST /api/chat")[0]
    assert body["messages"] == history
    assert body["options"] == {
        "num_predict": 9,
        "temperature": 0.003,
        "top_p": 0.85,
        "top_k": 40,
        "repeat_penalty": 1.15,
        "repeat_last_n": 64,
        "seed": 42,
        "stop": [],
    }
    assert body["stream"] is True
    assert body["truncate"] is False
    assert "think" not in body


def test_evaluation_request_has_temperature_zero_and_seed(server: FakeOllama, engine: OllamaServer) -> None:
    engine.answer(HOLA, greedy(GenerateSettings(), 7))
    options = server.bodies("POST /api/chat")[0]["options"]
    assert (options["temperature"], options["seed"], options["repeat_penalty"]) == (0.0, 7, 1.15)


def test_thinking_model_gets_think_false(server: FakeOllama, api: Ollama) -> None:
    server.capabilities = ["completion", "thinking"]
    OllamaServer(api, "tutor").answer(HOLA, GREEDY)
    assert server.bodies("POST /api/chat")[0]["think"] is False


def test_turns_that_ollama_would_drop_are_not_sent(server: FakeOllama, engine: OllamaServer) -> None:
    with pytest.raises(ValueError, match="empty"):
        engine.answer([{"role": "user", "content": ""}], GREEDY)
    assert not server.bodies("POST /api/chat")


def test_missing_model_raises_with_publish_command(server: FakeOllama) -> None:
    with pytest.raises(MissingError, match="has no model nope; publish it: tutor publish"), serve("nope", server.host):
        pass


def test_model_deleted_before_request_raises_missing_error(server: FakeOllama, engine: OllamaServer) -> None:
    server.models.clear()
    with pytest.raises(MissingError, match=r"model 'tutor' not found; publish it: tutor publish"):
        engine.answer(HOLA, GREEDY)


def test_prompt_longer_than_context_raises_and_is_not_cut(engine: OllamaServer) -> None:
    with pytest.raises(ServiceError, match=r"exceeds the available context size; use a shorter prompt"):
        engine.answer(conversation("hola " * 100), GREEDY)


def test_full_context_logs_a_warning(
    server: FakeOllama, engine: OllamaServer, caplog: pytest.LogCaptureFixture
) -> None:
    last = {"done": True, "done_reason": "stop", "prompt_eval_count": 60, "eval_count": 10}
    server.script("POST /api/chat", fake.stream(fake.chunk(" x"), last))
    answer = engine.answer(HOLA, GREEDY)
    assert "context of 64 tokens was full" in caplog.text
    assert answer.tokens_per_second == 0.0


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        (fake.stream(*[fake.chunk(" la")] * 31), r"repeated one token over and over \('la'\)"),
        (
            fake.stream(fake.chunk(" a"), {"error": "prediction aborted, token repeat limit reached"}),
            "repeated one token",
        ),
        (fake.stream(fake.chunk(" a"), fake.chunk(" b")), "ended after 2 pieces without its last event"),
        (fake.stream(), "ended after 0 pieces"),
        (fake.stream({"done": True, "done_reason": "load"}), "done_reason 'load'"),
        (fake.stream(fake.chunk(" a"), end="drop"), "broke"),
        (fake.stream(fake.chunk(" a"), end="hang"), "does not answer"),
        (fake.stream(fake.chunk(" a"), b'{"message": {"con'), "another form"),
        (fake.stream(fake.chunk(" a"), b"[]\n"), "another form"),
        (fake.stream(b"<html>hello\n"), "not Ollama"),
        (fake.stream(fake.chunk(" a"), {"error": "llama-server process has terminated"}), "terminated; memory may be"),
        (fake.stream({"error": {"code": 400, "message": "deep"}}), "Ollama reports: deep"),
        (fake.stream({"error": '{"error":{"code":400,"message":"deeper"}}'}), "Ollama reports: deeper"),
        (fake.stream({"error": 12}), "Ollama reports: 12"),
        (fake.stream({"error": "12"}), "Ollama reports: 12"),
        (fake.stream({"error": None}), "Ollama reports: None"),
        (fake.status(500, '{"error": "unable to load model"}'), r"\(500\): unable to load model"),
        (fake.status(400, '{"error": {"message": "no"}}'), r"\(400\): no"),
        (fake.status(500, ""), r"\(500\): nothing"),
        (fake.status(403, "<html>forbidden"), "web page"),
        (fake.hang_up, "broke"),
    ],
)
def test_failed_stream_raises_service_error(
    server: FakeOllama, engine: OllamaServer, reply: fake.Reply, what: str
) -> None:
    server.script("POST /api/chat", reply)
    with pytest.raises(ServiceError, match=what):
        engine.answer(HOLA, GREEDY)
    assert engine.answer(HOLA, GREEDY).finish == "eos", "the next question is answered"


def test_pieces_before_a_failure_are_delivered(server: FakeOllama, engine: OllamaServer) -> None:
    received: list[str] = []
    server.script("POST /api/chat", fake.stream(fake.chunk(" a"), fake.chunk(" b"), end="drop"))
    with pytest.raises(ServiceError):
        engine.answer(HOLA, GREEDY, received.append)
    assert received == [" a", " b"]


def test_unicode_line_separators_do_not_split_events(server: FakeOllama, engine: OllamaServer) -> None:
    server.pieces = [" uno\u0085", "dos\u2028tres", " 👩‍💻"]
    assert engine.answer(HOLA, GREEDY).text == " uno\u0085dos\u2028tres 👩‍💻"


def test_ctrl_c_ends_the_generation_on_the_server(server: FakeOllama, engine: OllamaServer) -> None:
    server.script("POST /api/chat", fake.stream(*[fake.chunk(f" {n}") for n in range(500)], pause=0.01))

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.answer(HOLA, GREEDY, interrupt)
    assert server.cancelled.wait(5)


def test_raw_prompts_are_rendered_here(server: FakeOllama, api: Ollama) -> None:
    base = OwnFormat("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|think|>", {}, add_bos=False)
    server.reply_to = lambda prompt: [("<think>Pienso.", -0.1), ("</think>\n", -0.1), (prompt, -0.1)]
    answer = OllamaServer(api, "tutor", base, raw=True).answer(HOLA, GREEDY)
    assert (answer.thought, answer.text, answer.finish) == ("Pienso.", "<|user|>Hola<|think|>", "eos")
    (body,) = server.bodies("POST /api/generate")
    assert (body["raw"], body["think"], body["prompt"]) == (True, False, "<|user|>Hola<|think|>")
    assert body["options"]["repeat_last_n"] == 64
    assert not server.bodies("POST /api/chat")
