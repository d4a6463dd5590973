"""Fixtures of the Ollama client's tests: a fake server with one model, and a client of it."""

import hashlib
from collections.abc import Iterator

import pytest
from support.fakes import ollama as fake
from support.fakes.ollama import FakeOllama

from tutor.engines.ollama.client import Ollama, connect
from tutor.engines.ollama.engine import OllamaServer
from tutor.prompt.tutor_format import GO_TEMPLATE


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
