"""serving/builds.py against a fake server: a build is checked before it is served, and can be rolled back."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fakes import ollama as fake
from support.fakes.ollama import FakeOllama, write_gguf
from support.outputs.published import SYSTEM

from tutor.artifacts.hashing import file_sha256
from tutor.engines.ollama.client import Ollama
from tutor.errors import ArtifactError, GateError, RecipeError, ServiceError
from tutor.prompt.tutor_format import GO_TEMPLATE, STOPS
from tutor.serving import builds
from tutor.serving.builds import (
    Model,
    build_id,
    find_build,
    list_builds,
    publish_build,
    read_model,
    rollback,
    serve_as_latest,
)

PARAMETERS = {"num_ctx": 4096, "num_predict": 515, "temperature": 0.003, "seed": 42, "stop": list(STOPS)}


R1 = "{% for m in messages %}<think></think>{% endfor %}"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    path = tmp_path / "gguf" / "tutor-Q8_0.gguf"
    write_gguf(path)
    settings = {"template": GO_TEMPLATE, "system": SYSTEM, "parameters": PARAMETERS}
    return Model("tutor", "Q8_0", {path.name: path}, {}, settings)


PROOFS: dict[tuple[str, str], dict[str, str]] = {}
"""Last check of each build on each host."""


def hashes(model: Model) -> dict[Path, str]:
    return {path: file_sha256(path) for path in model.paths}


def put(model: Model, api: Ollama, **settings: Any) -> dict[str, Any]:
    """Publish a model with these settings, and serve a new build as `latest`."""
    changed = replace(model, settings={**model.settings, **settings})
    result = publish_build(changed, hashes(model), api, last_proof=lambda *where: PROOFS.get(where, {}))
    if result["published"]:
        PROOFS[result["build"], api.host] = {name: result[name] for name in ("version", "digest")}
        serve_as_latest(api, model.name, result["tag"])
    return result


def served(server: FakeOllama) -> str:
    """The system text that `latest` has."""
    return str(server.models["tutor:latest"].body["system"])


# Creating and checking


def test_model_is_published_under_its_build_and_latest(server: FakeOllama, api: Ollama, model: Model) -> None:
    result = put(model, api)
    assert result["published"]
    assert result["created"]
    assert result["gpu_share"] == 0.75
    assert sorted(server.models) == sorted([result["tag"], "tutor:latest"])
    assert server.models["tutor:latest"].digest == server.models[result["tag"]].digest
    body = server.bodies("POST /api/create")[0]
    assert body["files"] == {"tutor-Q8_0.gguf": f"sha256:{next(iter(hashes(model).values()))}"}
    assert {key: body[key] for key in model.settings} == model.settings


def test_file_is_looked_up_before_it_is_uploaded(server: FakeOllama, api: Ollama, model: Model) -> None:
    put(model, api)
    order = [where for where, _ in server.requests]
    assert order.index("HEAD /api/blobs") < order.index("POST /api/blobs") < order.index("POST /api/create")
    put(model, api, system="otro")
    assert len(server.bodies("POST /api/blobs")) == 1, "another system text needs no second upload"


def test_new_build_is_checked_and_not_served(server: FakeOllama, api: Ollama, model: Model) -> None:
    result = publish_build(model, hashes(model), api)
    assert list(server.models) == [result["tag"]]
    order = [where for where, _ in server.requests]
    assert "POST /api/copy" not in order
    after = order[order.index("POST /api/create") :]
    assert {"POST /api/show", "POST /api/chat", "POST /api/generate"} <= set(after)
    asked = [body for body in server.bodies("POST /api/chat") if "_debug_render_only" not in body]
    assert len(asked) == 1
    assert asked[0]["options"]["temperature"] == 0.0


def test_same_build_is_published_once(server: FakeOllama, api: Ollama, model: Model) -> None:
    first = put(model, api)
    server.requests.clear()
    again = put(model, api)
    assert again["published"] is False
    assert again["build"] == first["build"]
    assert {where for where, _ in server.requests} == {"GET /api/version", "POST /api/show", "GET /api/tags"}


def test_build_id_depends_on_content_and_not_on_file_names(model: Model, tmp_path: Path) -> None:
    before = build_id(model, hashes(model))
    moved = tmp_path / "elsewhere" / "other.gguf"
    write_gguf(moved)
    assert build_id(replace(model, files={"other.gguf": moved}), {moved: file_sha256(moved)}) == before
    write_gguf(moved, size=3000)
    changes = [
        build_id(replace(model, files={"other.gguf": moved}), {moved: file_sha256(moved)}),
        build_id(replace(model, adapters={"lora.gguf": moved}), {**hashes(model), moved: "0" * 64}),
        *(build_id(replace(model, settings={**model.settings, key: "x"}), hashes(model)) for key in model.settings),
    ]
    assert len({before, *changes}) == 1 + len(changes)
    assert len(before) == 12


def test_build_altered_on_the_server_is_created_again(server: FakeOllama, api: Ollama, model: Model) -> None:
    tag = put(model, api)["tag"]
    server.models[tag].body["system"] = "cambiado"
    result = put(model, api)
    assert result["created"]
    assert served(server) == SYSTEM


def test_build_with_interrupted_checks_is_checked_again(server: FakeOllama, api: Ollama, model: Model) -> None:
    tag = put(model, api)["tag"]
    del server.models["tutor:latest"]  # as after a kill between create and copy
    server.order.remove("tutor:latest")
    server.requests.clear()
    result = put(model, api)
    assert result["published"]
    assert not result["created"]
    assert server.bodies("POST /api/generate"), "its prompts were compared"
    assert server.models["tutor:latest"].digest == server.models[tag].digest


def test_model_that_is_latest_is_unloaded_first(server: FakeOllama, api: Ollama, model: Model) -> None:
    put(model, api)
    server.loaded = ["tutor:latest", "other:latest"]
    put(model, api, system="dos")
    assert "tutor:latest" not in server.loaded
    assert "other:latest" in server.loaded


@pytest.mark.parametrize(("theirs", "ours"), [("Tutor", "tutor"), ("tutor", "Tutor")])
def test_name_in_another_case_is_the_same_model(
    server: FakeOllama, api: Ollama, model: Model, theirs: str, ours: str
) -> None:
    put(replace(model, name=theirs), api)
    model = replace(model, name=ours)
    assert put(model, api)["published"] is False
    assert put(model, api, system="dos")["published"]
    assert [(row["latest"], row["previous"]) for row in list_builds(api, ours)] == [(True, False), (False, True)]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": "x", "files": 3}'])
def test_damaged_create_body_is_an_artifact_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "create.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"create\.json"):
        read_model(tmp_path, "Q8_0")


# Refusals


def test_gguf_with_the_r1_template_is_refused_with_a_reason(server: FakeOllama, api: Ollama, model: Model) -> None:
    put(model, api)
    write_gguf(next(iter(model.files.values())), chat_template=R1)
    with pytest.raises(GateError, match=r"template is .*<think>.*uses the GGUF's own chat template.*convert again"):
        put(model, api)
    assert len(server.models) == 2, "the refused build is deleted"
    assert served(server) == SYSTEM


def test_parser_keeps_ollama_from_the_template_of_the_gguf(api: Ollama, model: Model) -> None:
    write_gguf(next(iter(model.files.values())), chat_template=R1)
    assert put(model, api, parser="passthrough")["published"]


@pytest.mark.parametrize(
    "template",
    [
        GO_TEMPLATE.replace("Respuesta:", "Respuesta: "),
        GO_TEMPLATE.replace("\n\n{{ end }}", "\n{{ end }}"),
        "{{ .Prompt }}",
        GO_TEMPLATE.removesuffix("\n"),
    ],
)
def test_template_that_renders_another_prompt_is_refused(
    server: FakeOllama, api: Ollama, model: Model, template: str
) -> None:
    with pytest.raises(GateError, match="gets another prompt than in training") as caught:
        put(model, api, template=template)
    assert caught.value.code == 8
    assert server.models == {}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"system": "otro"}, "system is 'otro' instead of"),
        ({"template": "{{ .Prompt }}"}, "template is '{{ .Prompt }}' instead of"),
        ({"parameters": "temperature 0.8"}, "parameters is {'temperature': 0.8} instead of"),
        ({"capabilities": ["completion", "tools"]}, "capabilities is"),
        ({"details": {"family": "gemma2", "quantization_level": "Q8_0"}}, "family is 'gemma2' instead of 'llama'"),
        ({"details": {"family": "llama", "quantization_level": "Q4_K_M"}}, "quantization is 'Q4_K_M' instead of"),
    ],
)
def test_mismatch_in_show_is_named(
    server: FakeOllama, api: Ollama, model: Model, change: dict[str, Any], what: str
) -> None:
    right = {
        "template": GO_TEMPLATE,
        "system": SYSTEM,
        "parameters": "\n".join(f"{k} {json.dumps(v)}" for k, v in PARAMETERS.items() if k != "stop")
        + f"\nstop {json.dumps(STOPS[0])}",
        "capabilities": ["completion"],
        "details": {"family": "llama", "quantization_level": "Q8_0"},
    }
    server.script("POST /api/show", None, fake.status(200, json.dumps(right | change)))
    with pytest.raises(GateError) as caught:
        put(model, api)
    assert what in caught.value.message
    assert server.models == {}


def test_model_without_an_answer_is_refused(server: FakeOllama, api: Ollama, model: Model) -> None:
    server.pieces = [" ", "\n"]
    with pytest.raises(GateError, match="returns an empty answer"):
        put(model, api)
    assert server.models == {}


@pytest.mark.parametrize(
    ("path", "reply"),
    [
        ("POST /api/create", fake.stream({"status": "writing manifest"})),
        ("POST /api/create", fake.stream({"status": "x"}, end="drop")),
        ("POST /api/generate", fake.status(500, '{"error": "llama-server process has terminated: killed"}')),
        ("POST /api/chat", fake.stream(fake.chunk(" la"), end="drop")),
    ],
)
def test_latest_is_unchanged_when_the_server_fails(
    server: FakeOllama, api: Ollama, model: Model, path: str, reply: fake.Reply
) -> None:
    put(model, api)
    server.script(path, reply)
    with pytest.raises(ServiceError):
        put(model, api, system="dos")
    assert served(server) == SYSTEM
    assert len([name for name in server.models if name not in ("tutor:latest", "tutor:previous")]) == 1


class Interrupted(logging.Filter):
    """Raise KeyboardInterrupt at a message."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        if self.text in record.getMessage():
            raise KeyboardInterrupt
        return True


@contextmanager
def ctrl_c_at(text: str, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Expect a Ctrl-C, which is pressed at a message."""
    caplog.set_level(logging.INFO, "tutor")
    caplog.handler.addFilter(made := Interrupted(text))
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        caplog.handler.removeFilter(made)


def test_ctrl_c_during_the_checks_deletes_the_build(
    server: FakeOllama, api: Ollama, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    with ctrl_c_at(": success", caplog):
        put(model, api)
    assert server.models == {}


def test_ctrl_c_during_the_checks_keeps_a_build_proven_before(
    server: FakeOllama, api: Ollama, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    first = put(model, api, system="uno")["tag"]
    put(model, api, system="dos")
    put(model, api, system="tres")  # the first is neither latest nor previous
    before = dict(server.models)
    server.shows_prompts = False
    with ctrl_c_at("does not return its prompts", caplog):
        put(model, api, system="uno")
    assert server.models == before
    assert first in server.models


def test_failed_check_keeps_a_build_proven_before(server: FakeOllama, api: Ollama, model: Model) -> None:
    put(model, api, system="uno")
    put(model, api, system="dos")
    before = dict(server.models)
    server.script("POST /api/generate", fake.status(500, '{"error": "boom"}'))
    with pytest.raises(ServiceError, match="boom"):
        put(model, api, system="uno")
    assert server.models == before


def test_interrupted_creation_keeps_the_build_of_that_name(
    server: FakeOllama, api: Ollama, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    tag = put(model, api)["tag"]
    put(model, api, system="dos")
    server.models[tag].body["system"] = "cambiado"  # created again, and interrupted before the server writes it
    before = dict(server.models)
    server.script("POST /api/create", fake.stream({"status": "parsing GGUF"}, {"status": "x"}, end="drop"))
    with ctrl_c_at("parsing GGUF", caplog):
        put(model, api)
    assert server.models == before


@pytest.mark.parametrize("name", ["user/tutor", "registry.example:5000/team/tutor", "library/tutor"])
def test_model_with_a_namespace_is_published_and_rolled_back(
    server: FakeOllama, api: Ollama, model: Model, name: str
) -> None:
    model = replace(model, name=name)
    put(replace(model, name="tutor.other"), api)
    first, second = put(model, api, system="uno"), put(model, api, system="dos")
    assert first["tag"] == f"{name}:{first['build']}"
    assert [(row["build"], row["latest"]) for row in list_builds(api, name)] == [
        (second["build"], True),
        (first["build"], False),
    ]
    assert find_build(api, name, first["build"][:5]) == first["build"]
    assert rollback(api, name)["build"] == first["build"]
    assert server.models[f"{name}:latest"].body["system"] == "uno"
    with pytest.raises(KeyError):
        server.models["tutor:latest"]


def test_default_namespace_names_the_same_model(api: Ollama, model: Model) -> None:
    build = put(model, api)["build"]
    assert find_build(api, "registry.ollama.ai/library/Tutor") == build


def test_publishing_to_a_server_without_the_gpu_warns(
    server: FakeOllama, api: Ollama, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.gpu_share = 0.0
    assert put(model, api)["gpu_share"] == 0
    assert "GPU" not in caplog.text, "this machine has none"
    monkeypatch.setattr(builds.host, "gpus", lambda: ["a GPU"])
    tag = put(model, api, system="dos")["tag"]
    assert f"Ollama has only 0% of {tag} on it; restart Ollama" in caplog.text


def test_server_death_during_the_checks_is_the_reported_error(
    server: FakeOllama, api: Ollama, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    gone = [fake.hang_up] * 5
    server.script("POST /api/generate", *gone)
    server.script("GET /api/tags", None, None, *gone)
    with pytest.raises(ServiceError, match="broke"):
        put(model, api)
    assert "is still on the server" in caplog.text


def test_served_build_with_a_mismatch_is_not_deleted(server: FakeOllama, api: Ollama, model: Model) -> None:
    tag = put(model, api)["tag"]
    server.capabilities = ["completion", "tools"]
    with pytest.raises(GateError, match="capabilities"):
        put(model, api)
    assert sorted(server.models) == sorted([tag, "tutor:latest"])


def test_truncated_gguf_is_refused_by_the_server(server: FakeOllama, api: Ollama, model: Model) -> None:
    path = next(iter(model.files.values()))
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ServiceError, match=r"exceeds file size.*damaged"):
        put(model, api)
    assert server.models == {}


def test_old_server_is_refused_before_any_upload(server: FakeOllama, api: Ollama, model: Model) -> None:
    server.version = "0.29.3"
    with pytest.raises(ServiceError, match="too old"):
        put(model, api)
    assert [where for where, _ in server.requests] == ["GET /api/version"]


def test_server_without_rendered_prompts_causes_a_warning(
    server: FakeOllama, api: Ollama, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    server.shows_prompts = False
    assert put(model, api)["prompts"] == 0
    assert "does not return its prompts" in caplog.text


# Rollback and promotion


def test_rollback_serves_the_previous_build_and_can_be_undone(server: FakeOllama, api: Ollama, model: Model) -> None:
    first, second = put(model, api, system="uno"), put(model, api, system="dos")
    assert served(server) == "dos"
    assert rollback(api, "tutor")["build"] == first["build"]
    assert served(server) == "uno"
    assert rollback(api, "tutor")["build"] == second["build"]
    assert served(server) == "dos"


def test_build_published_again_becomes_latest(server: FakeOllama, api: Ollama, model: Model) -> None:
    put(model, api, system="uno")
    put(model, api, system="dos")
    again = put(model, api, system="uno")
    assert again["published"]
    assert not again["created"]
    assert served(server) == "uno"
    rollback(api, "tutor")
    assert served(server) == "dos"


def test_rollback_to_a_model_of_another_origin_works(server: FakeOllama, api: Ollama, model: Model) -> None:
    put(model, api, system="uno")
    server.models = {"tutor:latest": server.models["tutor:latest"]}
    server.order = ["tutor:latest"]
    put(model, api, system="dos")
    assert [(bool(row["build"]), row["latest"], row["previous"]) for row in list_builds(api, "tutor")] == [
        (True, True, False),
        (False, False, True),
    ]
    assert rollback(api, "tutor")["build"] is None
    assert served(server) == "uno"


def test_rollback_without_a_previous_build_is_refused(api: Ollama, model: Model) -> None:
    with pytest.raises(RecipeError, match="has no previous build of tutor"):
        rollback(api, "tutor")
    put(model, api)
    with pytest.raises(RecipeError, match="has no previous build"):
        rollback(api, "tutor")


def test_build_is_found_by_the_beginning_of_its_hash(server: FakeOllama, api: Ollama, model: Model) -> None:
    builds = [put(model, api, system=text)["build"] for text in ("uno", "dos", "tres")]
    serve_as_latest(api, "tutor", f"tutor:{find_build(api, 'tutor', builds[0][:6])}")
    assert served(server) == "uno"
    assert find_build(api, "tutor") == builds[2], "without a name, the newest"
    serve_as_latest(api, "tutor", f"tutor:{builds[2]}")
    assert served(server) == "tres"
    rows = list_builds(api, "tutor")
    assert [row["build"] for row in rows] == builds[::-1]
    assert [(row["latest"], row["previous"]) for row in rows] == [(True, False), (False, False), (False, True)]


def test_unknown_or_ambiguous_build_is_refused(api: Ollama, model: Model) -> None:
    with pytest.raises(RecipeError, match="none: run tutor publish"):
        find_build(api, "tutor", "abc")
    builds = [put(model, api, system=text)["build"] for text in ("uno", "dos")]
    with pytest.raises(RecipeError, match=f"known: {builds[1]}, {builds[0]}"):
        find_build(api, "tutor", "zzz")
    with pytest.raises(RecipeError, match="2 builds of tutor"):
        find_build(api, "tutor", "")


def test_builds_of_two_names_are_listed_apart(server: FakeOllama, api: Ollama, model: Model) -> None:
    lora = put(replace(model, name="tutor-lora"), api, system="otro")
    merged = put(model, api)
    assert [row["build"] for row in list_builds(api, "tutor")] == [merged["build"]]
    assert [row["build"] for row in list_builds(api, "tutor-lora")] == [lora["build"]]


def test_copy_without_effect_is_a_gate_error(server: FakeOllama, api: Ollama, model: Model) -> None:
    tag = put(model, api, system="uno")["tag"]
    put(model, api, system="dos")
    server.script("POST /api/copy", None, lambda handler: handler.empty(200))
    with pytest.raises(GateError, match=f"latest is not {tag}"):
        serve_as_latest(api, "tutor", tag)
