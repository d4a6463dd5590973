"""engines/ollama/transport.py: keys, redirects, limits, encodings, TLS, and names that do not exist."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fakes import ollama as fake
from support.fakes.ollama import FakeOllama

from tutor.engines.ollama import client as client_module
from tutor.engines.ollama import protocol
from tutor.engines.ollama.client import Ollama, connect
from tutor.engines.ollama.engine import OllamaServer
from tutor.engines.ollama.protocol import UnreachableError
from tutor.engines.ollama.transport import MIB, Limit
from tutor.engines.protocol import Generation
from tutor.errors import ServiceError
from tutor.prompt.messages import conversation

SHORT = Generation(max_new_tokens=4, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=7)
HOLA = conversation("Hola")


def call_everything(api: Ollama, path: Path) -> None:
    """Make every request that the client has."""
    api.version()
    api.tags()
    api.loaded()
    api.show("tutor")
    api.rendered("tutor", "Hola")
    api.load("tutor")
    api.copy("tutor", "tutor:new")
    OllamaServer(api, "tutor").answer(HOLA, SHORT)
    api.unload("tutor:new")
    api.delete("tutor:new")
    path.write_bytes(b"GGUF")
    with contextlib.suppress(ServiceError):  # of another digest
        api.upload_blob(path, f"sha256:{'0' * 64}")
    with contextlib.suppress(ServiceError):  # without files
        api.create("tutor:made", {})


def test_key_in_the_environment_is_sent_on_no_call(
    server: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "geheim")
    with connect(server.host) as api:
        call_everything(api, tmp_path / "m.gguf")
    assert {where for where, _ in server.requests} >= {"POST /api/blobs", "DELETE /api/delete", "GET /api/ps"}
    assert len(server.headers) == len(server.requests)
    assert not any("geheim" in value for headers in server.headers for value in headers.values())


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("GET /api/version", lambda api: api.version()),
        ("GET /api/tags", lambda api: api.tags()),
        ("POST /api/show", lambda api: api.show("tutor")),
        ("POST /api/copy", lambda api: api.copy("tutor", "x")),
        ("DELETE /api/delete", lambda api: api.delete("tutor")),
        ("POST /api/generate", lambda api: api.unload("tutor")),
        ("POST /api/chat", lambda api: next(api.chat({}))),
        ("HEAD /api/blobs", lambda api: api.has_blob("sha256:0")),
    ],
)
@pytest.mark.parametrize("code", [301, 307, 308])
def test_redirect_to_another_host_is_refused_and_named(
    server: FakeOllama, api: Ollama, where: str, call: Callable[[Ollama], object], code: int
) -> None:
    with fake.running() as other:
        server.script(where, fake.status(code, "", headers={"Location": f"{other.host}/api"}))
        with pytest.raises(ServiceError, match=rf"it redirects to {other.host}/api") as caught:
            call(api)
        assert caught.value.code == 6
        assert other.requests == []


# Limits


def sent_slowly(data: bytes, pause: float) -> fake.Reply:
    """Send bytes one at a time, as the answer with its headers."""

    def reply(handler: fake.Handler) -> None:
        handler.close_connection = True
        with contextlib.suppress(OSError):
            for byte in data:
                handler.connection.sendall(bytes([byte]))
                time.sleep(pause)

    return reply


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 200 OK\r\nX: " + b"y" * 9000, b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n" + b" " * 9000]
)
def test_answer_that_drips_ends_at_its_deadline(
    server: FakeOllama, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(client_module, "QUICK_SECONDS", 0.3)
    server.script("GET /api/version", sent_slowly(data, 0.01))
    server.script("GET /api/tags", sent_slowly(data, 0.01))
    with connect(server.host, silent=10) as api:
        with pytest.raises(ServiceError, match=r"did not end its answer within 0\.2 s"):
            api.version(0.2)
        with pytest.raises(ServiceError, match=r"did not end its answer within 0\.3 s"):
            api.tags()


def test_stream_that_drips_events_ends_at_its_deadline(server: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "TOKEN_SECONDS", 0.01)
    server.script("POST /api/chat", fake.stream(*[fake.chunk(" a")] * 500, pause=0.02))
    with connect(server.host, silent=0.3) as api, pytest.raises(ServiceError, match=r"within 0\.34 s"):
        OllamaServer(api, "tutor").answer(HOLA, SHORT)


def test_endless_answer_ends_at_its_size(server: FakeOllama, api: Ollama) -> None:
    server.script("GET /api/tags", fake.status(200, " " * (9 * MIB)))
    with pytest.raises(ServiceError, match="did not end its answer within 8 MiB"):
        api.tags()


def test_endless_stream_ends_at_its_size(
    server: FakeOllama, engine: OllamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "STREAM_BYTES", MIB)
    server.script("POST /api/chat", fake.stream(*[fake.chunk(" a" * 1000)] * 2000))
    with pytest.raises(ServiceError, match="did not end its answer within 1 MiB"):
        engine.answer(HOLA, SHORT)


def test_line_without_end_is_refused_early(server: FakeOllama, engine: OllamaServer) -> None:
    server.script("POST /api/chat", fake.stream(*[b"x" * 4096] * 12_000))  # 49 MB
    with pytest.raises(ServiceError, match=f"a line has more than {protocol.MAX_LINE_BYTES} bytes"):
        engine.answer(HOLA, SHORT)
    assert server.cancelled.wait(5), "the connection is closed before the end"


def test_limit_of_an_answer_has_defaults() -> None:
    assert Limit() == Limit(60.0, 8 * MIB)


@pytest.mark.parametrize("encoding", ["gzip", "br", "x"])
def test_encoded_answer_is_refused(server: FakeOllama, api: Ollama, encoding: str) -> None:
    server.script("GET /api/tags", fake.status(200, "{}", headers={"Content-Encoding": encoding}))
    with pytest.raises(ServiceError, match=f"encoded as '{encoding}'"):
        api.tags()
    assert server.headers[-1]["Accept-Encoding"] is None


# Names and TLS


def message_of(host: str) -> str:
    """The error of a request to a host; it is no absence."""
    with connect(host) as api, pytest.raises(ServiceError) as caught:
        api.version()
    assert not isinstance(caught.value, UnreachableError)
    assert caught.value.code == 6
    return str(caught.value)


def test_unknown_host_is_named_and_is_no_absence() -> None:
    assert "Ollama's host 'host.invalid' cannot be found" in message_of("host.invalid:80")


def test_https_to_a_server_without_tls_names_the_other_scheme(server: FakeOllama) -> None:
    address = server.host.removeprefix("http://")
    message = message_of(f"https://{address}")
    assert f"TLS to https://{address} fails" in message
    assert f"has the address http://{address}" in message


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that no authority signed, with its key."""
    if not (program := shutil.which("openssl")):
        pytest.skip("no openssl here")
    folder = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    out = ["-keyout", folder / "all.pem", "-out", folder / "certificate.pem"]
    subprocess.run([program, "req", *kind, *names, *out], check=True, capture_output=True)
    with (folder / "all.pem").open("ab") as file:
        file.write((folder / "certificate.pem").read_bytes())
    return folder / "all.pem"


@contextlib.contextmanager
def secured(server: FakeOllama, certificate: Path) -> Iterator[str]:
    """The host of a server with TLS that shares the fake's handler."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with FakeOllama() as running:
        running.socket = context.wrap_socket(running.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"https://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_unknown_certificate_is_named_and_a_known_one_accepted(
    server: FakeOllama, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with secured(server, certificate) as host:
        message = message_of(host)
        assert "its certificate is not trusted (self-signed certificate" in message
        assert "SSL_CERT_FILE" in message
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with connect(host) as api:
            assert api.version() == "0.33.0-rc2"


def test_plain_http_to_a_server_with_tls_names_https(server: FakeOllama, api: Ollama) -> None:
    text = "Client sent an HTTP request to an HTTPS server.\n"  # Go's own answer
    server.script("GET /api/version", fake.status(400, text, "text/plain"))
    with pytest.raises(ServiceError, match="https://NAME:PORT"):
        api.version()


def test_server_that_accepts_no_connection_is_no_absence() -> None:
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(3):  # fill its queue
            waiting = stack.enter_context(socket.socket())
            waiting.settimeout(0)
            waiting.connect_ex(full.getsockname())
        with connect(f"127.0.0.1:{full.getsockname()[1]}") as api, pytest.raises(ServiceError) as caught:
            api.version(0.3)
    assert not isinstance(caught.value, UnreachableError)
    assert "no connection to Ollama" in str(caught.value)
