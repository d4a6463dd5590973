"""serving/builds.py with the template of a base, which the server itself renders, against the fake server."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fakes import ollama as fake
from support.fakes.ollama import FakeOllama, write_gguf
from support.models.chat_templates import CHATML, FACTS
from support.outputs.published import SYSTEM

from tutor.artifacts.hashing import file_sha256
from tutor.engines.ollama.client import Ollama
from tutor.errors import GateError, ServiceError
from tutor.prompt.template_analysis import analyse_template
from tutor.serving.builds import Model, publish_build


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A Qwen2 whose file has the template of its base, as training has fixed it."""
    prompt = analyse_template(CHATML, FACTS, where="base", reasoning="none")
    path, written = tmp_path / "tutor-Q8_0.gguf", prompt.chat_template(add_bos=True)
    write_gguf(path, chat_template=written, family="qwen2")
    settings = {"system": SYSTEM, "parameters": {"num_ctx": 4096, "seed": 42}}
    return Model("tutor", "Q8_0", {path.name: path}, {}, settings, prompt, "qwen2", written)


def put(model: Model, api: Ollama) -> dict[str, Any]:
    return publish_build(model, {path: file_sha256(path) for path in model.paths}, api)


def test_template_of_the_base_is_served_without_ours(server: FakeOllama, api: Ollama, model: Model) -> None:
    result = put(model, api)
    assert (result["published"], result["prompts"]) == (True, 7)
    assert "template" not in server.bodies("POST /api/create")[0]
    assert put(model, api)["created"] is False


def test_template_that_ollama_replaces_is_refused(server: FakeOllama, api: Ollama, model: Model) -> None:
    known = fake.KNOWN["chatml"][0]
    write_gguf(next(iter(model.files.values())), chat_template=known, family="qwen2")
    with pytest.raises(GateError, match=r"template is .*range .Messages.*Ollama took it for 'chatml'"):
        put(replace(model, own_template=known), api)
    assert server.models == {}, "the refused build is deleted"


def test_file_of_another_family_is_refused(server: FakeOllama, api: Ollama, model: Model) -> None:
    with pytest.raises(GateError, match=r"family is 'qwen2' instead of 'llama'"):
        put(replace(model, family="llama"), api)
    assert server.models == {}


def test_older_server_renders_no_template_of_a_base(server: FakeOllama, api: Ollama, model: Model) -> None:
    server.version = "0.29.1"
    with pytest.raises(ServiceError, match=r"0\.30 or newer is needed: older ones do not render the chat template in"):
        put(model, api)
