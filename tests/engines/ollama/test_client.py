"""engines/ollama/client.py with a fake server on a loopback socket."""

import hashlib
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fakes import ollama as fake
from support.fakes.ollama import FakeOllama
from support.processes.command import ROOT, environment

from tutor.engines.ollama import client as client_module
from tutor.engines.ollama.client import Ollama, connect
from tutor.engines.ollama.engine import OllamaServer
from tutor.engines.ollama.protocol import (
    MissingError,
    UnreachableError,
)
from tutor.engines.protocol import Generation
from tutor.errors import ArtifactError, ServiceError
from tutor.prompt.messages import conversation
from tutor.prompt.tutor_format import GO_TEMPLATE

GREEDY = Generation(max_new_tokens=24, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=7)
HOLA = conversation("Hola")


def test_package_is_imported_despite_odd_variables(server: FakeOllama) -> None:
    """The package makes a client at its import: another parser of OLLAMA_HOST, proxies and certificates that fail."""
    code = "from tutor.engines.ollama.client import connect\nwith connect(':%d') as api: print(api.version())"
    odd = {"OLLAMA_HOST": "x:port", "ALL_PROXY": "socks5://x", "no_proxy": "[::1]", "SSL_CERT_FILE": "/nowhere"}
    run = [sys.executable, "-c", code % server.server_port]
    done = subprocess.run(run, cwd=ROOT, env=environment(**odd), capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0.33.0-rc2\n", "")


def test_proxies_of_environment_are_not_used(server: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with connect(server.host) as api:
        assert api.version() == "0.33.0-rc2"
        assert api.tags()[0].name == "tutor:latest"


def test_no_server_raises_at_once_with_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it waits {seconds} s to ask again"))
    with (
        pytest.raises(
            UnreachableError, match=r"no Ollama at http://127.0.0.1:1 \(Connection refused\); start it"
        ) as caught,
        connect("127.0.0.1:1") as api,
    ):
        api.version()
    assert caught.value.code == 6


def test_every_call_without_server_raises_unreachable() -> None:
    with connect("127.0.0.1:1") as api:
        calls = (
            api.tags,
            api.loaded,
            lambda: api.show("x"),
            lambda: api.copy("x", "y"),
            lambda: api.has_blob("sha256:0"),
            lambda: next(api.chat({})),
            lambda: api.create("x", {}),
        )
        for call in calls:
            with pytest.raises(UnreachableError):
                call()


class Clock:
    """A clock that only `sleep` advances; each sleep calls `when_slept` with the number of sleeps."""

    def __init__(self, when_slept: Callable[[int], object] = lambda _: None) -> None:
        self.slept: list[float] = []
        self.when_slept = when_slept

    def monotonic(self) -> float:
        return 1000.0 + sum(self.slept)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.when_slept(len(self.slept))


def test_wait_ready_returns_when_server_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    started: list[FakeOllama] = []

    def start(sleeps: int) -> None:
        if sleeps == 2:
            started.append(FakeOllama(port))
            threading.Thread(target=started[0].serve_forever, args=(0.01,), daemon=True).start()

    clock = Clock(start)
    monkeypatch.setattr(client_module, "time", clock)
    with connect(f"127.0.0.1:{port}") as api:
        assert api.wait_ready(10) == "0.33.0-rc2"
    assert clock.slept == [0.5, 0.5]
    started[0].shutdown()
    started[0].server_close()


def test_wait_ready_without_server_raises_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests at 0, 0.5 and 1 s of 1.25; a fourth would be too late."""
    clock = Clock()
    monkeypatch.setattr(client_module, "time", clock)
    with connect("127.0.0.1:1") as api, pytest.raises(UnreachableError):
        api.wait_ready(1.25)
    assert clock.slept == [0.5, 0.5]


def test_server_that_listens_has_seconds_to_answer(server: FakeOllama, api: Ollama) -> None:
    def late(handler: fake.Handler) -> None:
        time.sleep(0.4)
        handler.json({"version": "0.33.0"})

    server.script("GET /api/version", late)
    assert api.wait_ready(0) == "0.33.0"


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
def test_other_program_at_the_address_is_reported(server: FakeOllama, api: Ollama, reply: fake.Reply) -> None:
    server.script("GET /api/version", reply)
    with pytest.raises(
        ServiceError, match=rf"the server at {server.host} is not Ollama|the answer of Ollama at {server.host} to GET"
    ) as caught:
        api.wait_ready(5)
    assert "--host" in str(caught.value)


@pytest.mark.parametrize("path", ["GET /api/tags", "GET /api/ps"])
@pytest.mark.parametrize("text", ["<html>", "[]", '"text"', '{"models": 3}', "{"])
def test_malformed_answer_raises_service_error(server: FakeOllama, api: Ollama, path: str, text: str) -> None:
    server.script(path, fake.status(200, text))
    with pytest.raises(ServiceError, match="Ollama"):
        api.tags() if "tags" in path else api.loaded()


def test_error_body_with_bare_number_raises_service_error(server: FakeOllama, api: Ollama) -> None:
    server.script("POST /api/copy", fake.status(500, "12"))
    with pytest.raises(ServiceError):
        api.copy("a", "b")


def test_silent_server_raises_after_timeout(server: FakeOllama, api: Ollama) -> None:
    server.script("GET /api/tags", fake.hang)
    with pytest.raises(ServiceError, match="does not answer"):
        api.tags()


def test_closed_connection_raises_service_error(server: FakeOllama, api: Ollama) -> None:
    server.script("POST /api/show", fake.hang_up)
    with pytest.raises(ServiceError, match="broke"):
        api.show("tutor")


# Retries


@pytest.mark.parametrize("code", [429, 503])
def test_busy_server_gets_request_again_until_it_answers(server: FakeOllama, engine: OllamaServer, code: int) -> None:
    busy = fake.status(code, '{"error": "server busy, please try again.  maximum pending requests exceeded"}')
    server.script("POST /api/chat", busy, busy, busy, None)
    assert engine.answer(HOLA, GREEDY).finish == "eos"
    assert len(server.bodies("POST /api/chat")) == 4


def test_server_staying_busy_raises_after_five_tries(server: FakeOllama, engine: OllamaServer) -> None:
    server.script("POST /api/chat", *[fake.status(503, '{"error": "server busy, please try again."}')] * 9)
    with pytest.raises(ServiceError, match=r"\(503\): server busy.*try again later"):
        engine.answer(HOLA, GREEDY)
    assert len(server.bodies("POST /api/chat")) == 5


def test_other_errors_are_not_retried(server: FakeOllama, engine: OllamaServer) -> None:
    server.script("POST /api/chat", fake.status(500, '{"error": "boom"}'))
    with pytest.raises(ServiceError, match=r"\(500\): boom"):
        engine.answer(HOLA, GREEDY)
    assert len(server.bodies("POST /api/chat")) == 1


# Models and files


def test_file_is_uploaded_once_with_progress(
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
    assert len(server.bodies("POST /api/blobs")) == 1


def test_file_with_wrong_digest_is_refused(api: Ollama, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ServiceError, match=r"digest mismatch.*changed while it was sent"):
        api.upload_blob(tmp_path / "m.gguf", f"sha256:{'0' * 64}")


def test_file_shrinking_during_upload_raises_artifact_error(api: Ollama, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(8_000_000))
    shrink = logging.Handler()
    shrink.emit = lambda record: path.write_bytes(b"")  # type: ignore[assignment, method-assign]
    logger = logging.getLogger("tutor.engines.ollama.transport")
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


def test_model_is_created_on_event_success(server: FakeOllama, api: Ollama) -> None:
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
def test_creation_without_success_raises_service_error(
    server: FakeOllama, api: Ollama, reply: fake.Reply, what: str
) -> None:
    server.script("POST /api/create", reply)
    with pytest.raises(ServiceError, match=what):
        api.create("tutor:new", _body(server))


def test_show_of_missing_model_returns_none(api: Ollama) -> None:
    assert api.show("nope") is None
    with pytest.raises(MissingError):
        api.delete("nope")


def test_model_is_copied_unloaded_and_deleted(server: FakeOllama, api: Ollama, engine: OllamaServer) -> None:
    engine.answer(HOLA, GREEDY)
    assert api.loaded() == {"tutor:latest": 0.75}
    api.unload("tutor")
    assert api.loaded() == {}
    api.copy("tutor", "tutor:previous")
    api.delete("tutor:latest")
    assert list(server.models) == ["tutor:previous"]


def test_rendered_prompts_of_chat_and_generate_are_equal(api: Ollama) -> None:
    expected = "Instrucción: Hola\nRespuesta:"
    assert api.rendered("tutor", "Hola") == expected
    assert api.rendered("tutor", HOLA) == expected
