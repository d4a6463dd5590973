"""engines/ollama/engine.py, ollama_api.py and ollama_wire.py against a fake server on a loopback socket."""

import hashlib
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import fake_ollama as fake
from support.command import ROOT, environment
from support.fake_ollama import FakeOllama

from tutor.engines.ollama import client as ollama_api
from tutor.engines.ollama.client import Ollama, connect
from tutor.engines.ollama.engine import OllamaServer, serve
from tutor.engines.ollama.protocol import (
    MissingError,
    UnreachableError,
    check_version,
    normalized_url,
    parse_parameters,
)
from tutor.engines.protocol import Generation, greedy
from tutor.errors import ArtifactError, RecipeError, ServiceError
from tutor.prompt import GO_TEMPLATE, STOPS, Message, conversation
from tutor.recipe.settings import GenerateSettings

GREEDY = Generation(max_new_tokens=24, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=7)
HOLA = conversation("Hola")


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    """A fake server with one model, `tutor`."""
    with fake.running() as running:
        data = fake.gguf()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        running.blobs[digest] = data
        body = {"files": {"m.gguf": digest}, "template": GO_TEMPLATE, "parameters": {"num_ctx": 64}}
        running.models["tutor:latest"] = fake.Model(body, {"quantization": "Q8_0", "chat_template": ""}, digest)
        running.order.append("tutor:latest")
        yield running


@pytest.fixture
def api(server: FakeOllama) -> Iterator[Ollama]:
    with connect(server.host, silent=0.5, pause=0.01) as connection:
        yield connection


@pytest.fixture
def engine(api: Ollama) -> OllamaServer:
    return OllamaServer(api, "tutor")


# Where the server is


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("ollama", "http://ollama:11434"),
        ("http://ollama", "http://ollama:11434"),
        ("http://ollama/", "http://ollama:11434"),
        ("ollama:80", "http://ollama:80"),
        ("https://models.example", "https://models.example:443"),
        ("https://models.example/ollama/", "https://models.example:443/ollama"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:11999", "http://127.0.0.1:11999"),
        ("[::1]", "http://[::1]:11434"),
        ("http://[::]:5", "http://[::1]:5"),
    ],
)
def test_a_host_gets_the_port_that_ollama_has_and_not_that_of_the_scheme(given: str, address: str) -> None:
    assert normalized_url(given) == address


def test_without_a_host_the_environment_decides_and_then_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", ' "ollama" ')
    assert normalized_url(None) == "http://ollama:11434"
    monkeypatch.setenv("OLLAMA_HOST", "")
    assert normalized_url(None) == "http://127.0.0.1:11434"


@pytest.mark.parametrize("given", ["ftp://x", "http://", "x:port", "x:99999", "a b", "x?y=1", "http://[::1", "x/y#z"])
def test_what_is_no_host_is_refused_with_the_forms_that_are(given: str) -> None:
    with pytest.raises(RecipeError, match="NAME:PORT"):
        normalized_url(given)


def test_a_password_in_the_host_is_refused_and_not_repeated() -> None:
    with pytest.raises(RecipeError) as caught:
        normalized_url("http://user:geheim@host:port")
    assert "geheim" not in str(caught.value)


def test_a_broken_ollama_host_is_a_users_fault_even_when_the_host_is_given() -> None:
    code = "from tutor.engines.ollama.client import connect\nwith connect('127.0.0.1'): pass"
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        run, cwd=ROOT, env=environment(OLLAMA_HOST="x:port"), capture_output=True, text=True, check=False
    )
    assert "RecipeError: OLLAMA_HOST is 'x:port'" in done.stderr


def test_proxies_of_the_environment_are_not_asked(server: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with connect(server.host) as api:
        assert api.version() == "0.33.0-rc2"
        assert api.tags()[0].name == "tutor:latest"


# Whether it is one


@pytest.mark.parametrize("version", ["0.30.0", "0.33.0-rc2", "1.0.0", "v0.31.2"])
def test_a_server_with_llama_server_behind_it_is_taken(version: str, caplog: pytest.LogCaptureFixture) -> None:
    check_version(version)
    assert not caplog.records


def test_an_older_server_is_refused() -> None:
    with pytest.raises(ServiceError, match=r"0\.17\.7 is too old: 0\.30"):
        check_version("0.17.7")


@pytest.mark.parametrize("version", ["0.0.0", "main"])
def test_a_server_that_does_not_say_its_version_is_taken_with_one_warning(
    version: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_version(version)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_no_server_is_said_without_waiting_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it waits {seconds} s to ask again"))
    with (
        pytest.raises(UnreachableError, match=r"no Ollama at http://127.0.0.1:1; start it") as caught,
        connect("127.0.0.1:1") as api,
    ):
        api.version()
    assert caught.value.code == 6


def test_every_call_says_that_there_is_no_server() -> None:
    with connect("127.0.0.1:1") as api:
        calls = (
            api.tags,
            api.loaded,
            lambda: api.show("x"),
            lambda: api.copy("x", "y"),
            lambda: api.has_blob("sha256:0"),
            lambda: next(api.stream("/api/chat", {})),
            lambda: api.create("x", {}),
        )
        for call in calls:
            with pytest.raises(UnreachableError):
                call()


class Clock:
    """A clock that moves when one sleeps, and does something then."""

    def __init__(self, when_slept: Callable[[int], object] = lambda _: None) -> None:
        self.slept: list[float] = []
        self.when_slept = when_slept

    def monotonic(self) -> float:
        return 1000.0 + sum(self.slept)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.when_slept(len(self.slept))


def test_a_server_that_is_still_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    started: list[FakeOllama] = []

    def start(sleeps: int) -> None:
        if sleeps == 2:
            started.append(FakeOllama(port))
            threading.Thread(target=started[0].serve_forever, args=(0.01,), daemon=True).start()

    clock = Clock(start)
    monkeypatch.setattr(ollama_api, "time", clock)
    with connect(f"127.0.0.1:{port}") as api:
        assert api.wait_ready(10) == "0.33.0-rc2"
    assert clock.slept == [0.5, 0.5]
    started[0].shutdown()
    started[0].server_close()


def test_a_server_that_never_starts_is_given_up_after_the_time_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked at 0, 0.5 and 1 s of 1.25, each time for as long as is left; a fourth would come after the end."""
    clock, allowed = Clock(), []
    monkeypatch.setattr(ollama_api, "time", clock)
    with connect("127.0.0.1:1") as api:
        version = api.version
        monkeypatch.setattr(api, "version", lambda seconds: (allowed.append(seconds), version(seconds)))
        with pytest.raises(UnreachableError):
            api.wait_ready(1.25)
    assert clock.slept == [0.5, 0.5]
    assert allowed == [1.25, 0.75, 0.25]


@pytest.mark.parametrize(
    "reply",
    [
        fake.status(200, "<html>Sign in</html>", "text/html"),
        fake.status(502, "<html><h1>Bad Gateway</h1></html>", "text/html"),
        fake.status(404, "404 page not found", "text/plain"),
        fake.status(404, "", "text/plain"),
        fake.status(200, "[1, 2]"),
        fake.status(200, '{"hello": 1}'),
        fake.status(200, ""),
        fake.status(301, "", "text/html"),
    ],
)
def test_another_program_at_that_address_is_called_not_ollama(
    server: FakeOllama, api: Ollama, reply: fake.Reply
) -> None:
    server.script("GET /api/version", reply)
    with pytest.raises(ServiceError, match=rf"what answers at {server.host} is not Ollama") as caught:
        api.wait_ready(5)
    assert "--host" in str(caught.value)


@pytest.mark.parametrize("path", ["GET /api/tags", "GET /api/ps"])
@pytest.mark.parametrize("text", ["<html>", "[]", '"text"', '{"models": 3}', "{"])
def test_the_package_failing_on_a_strange_answer_is_a_service_fault(
    server: FakeOllama, api: Ollama, path: str, text: str
) -> None:
    server.script(path, fake.status(200, text))
    with pytest.raises(ServiceError, match="Ollama"):
        api.tags() if "tags" in path else api.loaded()


def test_an_error_that_is_a_bare_number_does_not_break_the_client(server: FakeOllama, api: Ollama) -> None:
    server.script("POST /api/copy", fake.status(500, "12"))
    with pytest.raises(ServiceError):
        api.copy("a", "b")


def test_a_silent_server_is_given_up(server: FakeOllama, api: Ollama) -> None:
    server.script("GET /api/tags", fake.hang)
    with pytest.raises(ServiceError, match="does not answer"):
        api.tags()


def test_a_connection_closed_without_an_answer_is_a_service_fault(server: FakeOllama, api: Ollama) -> None:
    server.script("POST /api/show", fake.hang_up)
    with pytest.raises(ServiceError, match="broke"):
        api.show("tutor")


# A busy server


@pytest.mark.parametrize("code", [429, 503])
def test_a_busy_server_is_asked_again_until_it_answers(server: FakeOllama, engine: OllamaServer, code: int) -> None:
    busy = fake.status(code, '{"error": "server busy, please try again.  maximum pending requests exceeded"}')
    server.script("POST /api/chat", busy, busy, busy, None)
    assert engine.answer(HOLA, GREEDY).finish == "stop"
    assert len(server.asked("POST /api/chat")) == 4


def test_a_server_that_stays_busy_is_given_up_after_five_tries(server: FakeOllama, engine: OllamaServer) -> None:
    server.script("POST /api/chat", *[fake.status(503, '{"error": "server busy, please try again."}')] * 9)
    with pytest.raises(ServiceError, match=r"\(503\): server busy.*try again later"):
        engine.answer(HOLA, GREEDY)
    assert len(server.asked("POST /api/chat")) == 5


def test_other_faults_are_not_asked_again(server: FakeOllama, engine: OllamaServer) -> None:
    server.script("POST /api/chat", fake.status(500, '{"error": "boom"}'))
    with pytest.raises(ServiceError, match=r"\(500\): boom"):
        engine.answer(HOLA, GREEDY)
    assert len(server.asked("POST /api/chat")) == 1


# Answers


def test_an_answer_keeps_its_blank_its_counts_and_its_pieces(engine: OllamaServer) -> None:
    heard: list[str] = []
    answer = engine.answer(HOLA, GREEDY, heard.append)
    assert answer.text == " Una interfaz describe un objeto." == "".join(heard)
    assert len(heard) == 6
    assert (answer.finish, answer.tokens, answer.prompt_tokens) == ("stop", 6, 3)
    assert answer.tokens_per_second == pytest.approx(14.0)


def test_a_cut_answer_is_marked_as_cut(engine: OllamaServer) -> None:
    answer = engine.answer(HOLA, Generation(2, 0.0, 1.0, 1.0, 7))
    assert (answer.text, answer.finish) == (" Una interfaz", "length")


def test_the_history_goes_out_as_it_came_and_every_sampler_is_named(server: FakeOllama, engine: OllamaServer) -> None:
    history: list[Message] = [*HOLA, {"role": "assistant", "content": " Hola.\n"}, {"role": "user", "content": " ¿Y? "}]
    engine.answer(history, Generation(9, 0.003, 0.85, 1.15, 42))
    body = server.asked("POST /api/chat")[0]
    assert body["messages"] == history
    assert body["options"] == {
        "num_predict": 9,
        "temperature": 0.003,
        "top_p": 0.85,
        "top_k": 40,
        "repeat_penalty": 1.15,
        "repeat_last_n": 64,
        "seed": 42,
        "stop": list(STOPS),
    }
    assert body["stream"] is True
    assert body["truncate"] is False
    assert "think" not in body


def test_an_evaluation_is_asked_at_temperature_zero_with_its_seed(server: FakeOllama, engine: OllamaServer) -> None:
    engine.answer(HOLA, greedy(GenerateSettings(), 7))
    options = server.asked("POST /api/chat")[0]["options"]
    assert (options["temperature"], options["seed"], options["repeat_penalty"]) == (0.0, 7, 1.15)


def test_a_model_that_thinks_is_asked_not_to(server: FakeOllama, api: Ollama) -> None:
    server.capabilities = ["completion", "thinking"]
    OllamaServer(api, "tutor").answer(HOLA, GREEDY)
    assert server.asked("POST /api/chat")[0]["think"] is False


def test_turns_that_ollama_would_drop_are_not_sent(server: FakeOllama, engine: OllamaServer) -> None:
    with pytest.raises(ValueError, match="empty"):
        engine.answer([{"role": "user", "content": ""}], GREEDY)
    assert not server.asked("POST /api/chat")


def test_a_model_that_is_not_there_names_the_command_that_publishes_it(server: FakeOllama) -> None:
    with pytest.raises(MissingError, match="has no model nope; publish it: tutor publish"), serve("nope", server.host):
        pass


def test_a_model_deleted_while_it_is_asked_is_said_so(server: FakeOllama, engine: OllamaServer) -> None:
    server.models.clear()
    with pytest.raises(MissingError, match=r"model 'tutor' not found; publish it: tutor publish"):
        engine.answer(HOLA, GREEDY)


def test_a_prompt_that_does_not_fit_is_an_error_and_not_cut(engine: OllamaServer) -> None:
    with pytest.raises(ServiceError, match=r"exceeds the available context size; ask something shorter"):
        engine.answer(conversation("hola " * 100), GREEDY)


def test_a_context_that_was_full_is_warned_about(
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
def test_every_way_to_end_badly_is_a_service_fault(
    server: FakeOllama, engine: OllamaServer, reply: fake.Reply, what: str
) -> None:
    server.script("POST /api/chat", reply)
    with pytest.raises(ServiceError, match=what):
        engine.answer(HOLA, GREEDY)
    assert engine.answer(HOLA, GREEDY).finish == "stop", "the next question is answered"


def test_the_pieces_that_came_before_a_fault_were_heard(server: FakeOllama, engine: OllamaServer) -> None:
    heard: list[str] = []
    server.script("POST /api/chat", fake.stream(fake.chunk(" a"), fake.chunk(" b"), end="drop"))
    with pytest.raises(ServiceError):
        engine.answer(HOLA, GREEDY, heard.append)
    assert heard == [" a", " b"]


def test_line_separators_inside_an_answer_do_not_end_its_event(server: FakeOllama, engine: OllamaServer) -> None:
    server.pieces = [" uno\u0085", "dos\u2028tres", " 👩‍💻"]
    assert engine.answer(HOLA, GREEDY).text == " uno\u0085dos\u2028tres 👩‍💻"


def test_ctrl_c_ends_the_generation_on_the_server_too(server: FakeOllama, engine: OllamaServer) -> None:
    server.script("POST /api/chat", fake.stream(*[fake.chunk(f" {n}") for n in range(500)], pause=0.01))

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.answer(HOLA, GREEDY, interrupt)
    assert server.cancelled.wait(5)


# Models and files


def test_a_file_is_sent_once_with_its_progress(
    server: FakeOllama, api: Ollama, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tutor")
    data = b"GGUF" + bytes(3_000_000)
    path, digest = tmp_path / "m.gguf", f"sha256:{hashlib.sha256(data).hexdigest()}"
    path.write_bytes(data)
    assert api.upload_blob(path, digest) is True
    assert server.blobs[digest] == data
    counts = [(r.done, r.total) for r in caplog.records if hasattr(r, "done")]  # type: ignore[attr-defined]
    assert counts == [(1, 3), (2, 3), (3, 3)]
    assert api.upload_blob(path, digest) is False
    assert len(server.asked("POST /api/blobs")) == 1


def test_a_file_that_is_not_what_its_digest_says_is_refused(api: Ollama, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ServiceError, match=r"digest mismatch.*changed while it was sent"):
        api.upload_blob(tmp_path / "m.gguf", f"sha256:{'0' * 64}")


def test_a_file_that_shrinks_while_it_is_sent_is_said_so(api: Ollama, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(8_000_000))
    shrink = logging.Handler()
    shrink.emit = lambda record: path.write_bytes(b"")  # type: ignore[assignment, method-assign]
    logger = logging.getLogger("tutor.engines.ollama.client")
    logger.addHandler(shrink)
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(ArtifactError, match="changed while it was sent"):
            api.upload_blob(path, f"sha256:{'0' * 64}")
    finally:
        logger.removeHandler(shrink)
        logger.setLevel(logging.NOTSET)


def _body(server: FakeOllama, **more: Any) -> dict[str, Any]:
    return {"files": {"m.gguf": next(iter(server.blobs))}, "template": GO_TEMPLATE, **more}


def test_a_model_is_created_when_the_last_event_says_success(server: FakeOllama, api: Ollama) -> None:
    api.create("tutor:new", _body(server, parser="passthrough"))
    assert server.models["tutor:new"].body["parser"] == "passthrough"
    assert [tag.name for tag in api.tags()] == ["tutor:new", "tutor:latest"]


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        (fake.stream({"status": "parsing GGUF"}, {"status": "writing manifest"}), "without success, after 'writing"),
        (fake.stream({"status": "parsing GGUF"}, {"error": 'tensor "a" exceeds file size (3)'}), "may be damaged"),
        (fake.stream({"status": "x"}, end="drop"), "broke"),
        (fake.stream(), "without success, after ''"),
        (fake.status(400, '{"error": "template error: template: :1: unclosed action"}'), "unclosed action"),
    ],
)
def test_a_creation_that_does_not_end_in_success_failed(
    server: FakeOllama, api: Ollama, reply: fake.Reply, what: str
) -> None:
    server.script("POST /api/create", reply)
    with pytest.raises(ServiceError, match=what):
        api.create("tutor:new", _body(server))


def test_a_name_without_a_model_is_no_fault_when_it_is_looked_up(api: Ollama) -> None:
    assert api.show("nope") is None
    with pytest.raises(MissingError):
        api.delete("nope")


def test_a_model_is_copied_unloaded_and_deleted(server: FakeOllama, api: Ollama, engine: OllamaServer) -> None:
    engine.answer(HOLA, GREEDY)
    assert api.loaded() == {"tutor:latest": 0.75}
    api.unload("tutor")
    assert api.loaded() == {}
    api.copy("tutor", "tutor:previous")
    api.delete("tutor:latest")
    assert list(server.models) == ["tutor:previous"]


def test_prompts_are_shown_by_chat_and_by_generate(api: Ollama) -> None:
    expected = "Instrucción: Hola\nRespuesta:"
    assert api.rendered("tutor", "Hola") == expected
    assert api.rendered("tutor", HOLA) == expected


def test_shown_parameters_are_read_as_go_writes_them() -> None:
    text = (
        'num_ctx                        4096\nstop                           "\\nInstrucción:"\nstop    "\\"a\\" b"\n'
    )
    text += "temperature                    1e-05\nuse_mmap    true\nodd    {1 2}"
    expected = {"num_ctx": 4096, "stop": ["\nInstrucción:", '"a" b'], "temperature": 1e-5, "use_mmap": True}
    assert parse_parameters({"parameters": text}) == {**expected, "odd": "{1 2}"}
    assert parse_parameters({}) == {}
