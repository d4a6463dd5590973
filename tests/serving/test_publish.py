"""Publishing against a fake server: every build is proven before it is served, and can be rolled back."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import fake_ollama as fake
from support.fake_ollama import FakeOllama, write_gguf
from support.published import SYSTEM, make_stages

from tutor.artifacts.hashing import file_sha256
from tutor.artifacts.lock import locked
from tutor.artifacts.manifest import find_damage
from tutor.artifacts.stage_folder import writing
from tutor.cli import summary
from tutor.engines.ollama.client import Ollama, connect
from tutor.errors import ArtifactError, GateError, LockError, RecipeError, ServiceError, TutorError
from tutor.prompt import GO_TEMPLATE, STOPS
from tutor.recipe.settings import OllamaSettings, Recipe
from tutor.serving import compare, promote, publish
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
from tutor.stages.modelfile import stage as modelfile
from tutor.stages.modelfile.spec import ModelSpec

PARAMETERS = {"num_ctx": 4096, "num_predict": 515, "temperature": 0.003, "seed": 42, "stop": list(STOPS)}
R1 = "{% for m in messages %}<think></think>{% endfor %}"


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    with fake.running() as running:
        yield running


@pytest.fixture
def api(server: FakeOllama) -> Iterator[Ollama]:
    with connect(server.host, silent=2, pause=0.01) as connection:
        yield connection


@pytest.fixture
def model(tmp_path: Path) -> Model:
    path = tmp_path / "gguf" / "tutor-Q8_0.gguf"
    write_gguf(path)
    settings = {"template": GO_TEMPLATE, "system": SYSTEM, "parameters": PARAMETERS}
    return Model("tutor", "Q8_0", {path.name: path}, {}, settings)


def hashes(model: Model) -> dict[Path, str]:
    return {path: file_sha256(path) for path in model.paths}


def put(model: Model, api: Ollama, **settings: Any) -> dict[str, Any]:
    return publish_build(replace(model, settings={**model.settings, **settings}), hashes(model), api)


def served(server: FakeOllama) -> str:
    """The system text that `latest` has."""
    return str(server.models["tutor:latest"].body["system"])


# Publishing


def test_a_model_is_published_under_its_build_and_as_latest(server: FakeOllama, api: Ollama, model: Model) -> None:
    result = put(model, api)
    assert result["published"]
    assert result["created"]
    assert result["gpu_share"] == 0.75
    assert sorted(server.models) == sorted([result["tag"], "tutor:latest"])
    assert server.models["tutor:latest"].digest == server.models[result["tag"]].digest
    body = server.asked("POST /api/create")[0]
    assert body["files"] == {"tutor-Q8_0.gguf": f"sha256:{next(iter(hashes(model).values()))}"}
    assert {key: body[key] for key in model.settings} == model.settings


def test_the_file_is_looked_up_before_it_is_sent(server: FakeOllama, api: Ollama, model: Model) -> None:
    put(model, api)
    order = [where for where, _ in server.requests]
    assert order.index("HEAD /api/blobs") < order.index("POST /api/blobs") < order.index("POST /api/create")
    put(model, api, system="otro")
    assert len(server.asked("POST /api/blobs")) == 1, "another system text needs no second upload"


def test_the_name_latest_comes_after_show_prompts_and_an_answer(server: FakeOllama, api: Ollama, model: Model) -> None:
    put(model, api)
    order = [where for where, _ in server.requests]
    create, copy = order.index("POST /api/create"), order.index("POST /api/copy")
    between = order[create:copy]
    assert {"POST /api/show", "POST /api/chat", "POST /api/generate"} <= set(between)
    asked = [body for body in server.asked("POST /api/chat") if "_debug_render_only" not in body]
    assert len(asked) == 1
    assert asked[0]["options"]["temperature"] == 0.0


def test_the_same_build_is_published_once(server: FakeOllama, api: Ollama, model: Model) -> None:
    first = put(model, api)
    server.requests.clear()
    again = put(model, api)
    assert again["published"] is False
    assert again["build"] == first["build"]
    assert {where for where, _ in server.requests} == {"GET /api/version", "POST /api/show", "GET /api/tags"}


def test_a_build_is_what_decides_the_answers_and_not_its_file_names(model: Model, tmp_path: Path) -> None:
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


def test_a_build_altered_on_the_server_is_made_again(server: FakeOllama, api: Ollama, model: Model) -> None:
    tag = put(model, api)["tag"]
    server.models[tag].body["system"] = "cambiado"
    result = put(model, api)
    assert result["created"]
    assert served(server) == SYSTEM


def test_a_build_whose_proof_was_interrupted_is_proven_again(server: FakeOllama, api: Ollama, model: Model) -> None:
    tag = put(model, api)["tag"]
    del server.models["tutor:latest"]  # as after a kill between create and copy
    server.order.remove("tutor:latest")
    server.requests.clear()
    result = put(model, api)
    assert result["published"]
    assert not result["created"]
    assert server.asked("POST /api/generate"), "its prompts were compared"
    assert server.models["tutor:latest"].digest == server.models[tag].digest


def test_the_model_that_was_latest_frees_its_memory_first(server: FakeOllama, api: Ollama, model: Model) -> None:
    put(model, api)
    server.loaded = ["tutor:latest", "other:latest"]
    put(model, api, system="dos")
    assert "tutor:latest" not in server.loaded
    assert "other:latest" in server.loaded


@pytest.mark.parametrize(("theirs", "ours"), [("Tutor", "tutor"), ("tutor", "Tutor")])
def test_a_name_in_another_case_is_the_same_model(
    server: FakeOllama, api: Ollama, model: Model, theirs: str, ours: str
) -> None:
    put(replace(model, name=theirs), api)
    model = replace(model, name=ours)
    assert put(model, api)["published"] is False
    assert put(model, api, system="dos")["published"]
    assert [(row["latest"], row["previous"]) for row in list_builds(api, ours)] == [(True, False), (False, True)]


# What stops it


def test_the_gguf_with_r1s_template_is_refused_with_the_reason(server: FakeOllama, api: Ollama, model: Model) -> None:
    put(model, api)
    write_gguf(next(iter(model.files.values())), chat_template=R1)
    with pytest.raises(GateError, match=r"template is .*<think>.*took the GGUF's own chat template.*convert again"):
        put(model, api)
    assert len(server.models) == 2, "the bad build is gone"
    assert served(server) == SYSTEM


def test_a_parser_keeps_ollama_from_choosing_the_ggufs_template(api: Ollama, model: Model) -> None:
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
def test_a_template_that_renders_otherwise_is_refused(
    server: FakeOllama, api: Ollama, model: Model, template: str
) -> None:
    with pytest.raises(GateError, match="prompted otherwise than it was trained") as caught:
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
        ({"details": None}, "family is None"),
    ],
)
def test_what_show_says_otherwise_is_named(
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


def test_a_model_without_an_answer_is_refused(server: FakeOllama, api: Ollama, model: Model) -> None:
    server.pieces = [" ", "\n"]
    with pytest.raises(GateError, match="with nothing"):
        put(model, api)
    assert server.models == {}


@pytest.mark.parametrize(
    ("path", "reply"),
    [
        ("POST /api/create", fake.stream({"status": "writing manifest"})),
        ("POST /api/create", fake.stream({"status": "x"}, end="drop")),
        ("POST /api/generate", fake.status(500, '{"error": "llama-server process has terminated: killed"}')),
        ("POST /api/copy", fake.status(500, '{"error": "no space left on device"}')),
        ("POST /api/chat", fake.stream(fake.chunk(" la"), end="drop")),
    ],
)
def test_latest_is_untouched_by_a_server_that_fails(
    server: FakeOllama, api: Ollama, model: Model, path: str, reply: fake.Reply
) -> None:
    put(model, api)
    server.script(path, reply)
    with pytest.raises(ServiceError):
        put(model, api, system="dos")
    assert served(server) == SYSTEM
    assert len([name for name in server.models if name not in ("tutor:latest", "tutor:previous")]) == 1


def test_ctrl_c_while_it_is_proven_takes_the_build_back(
    server: FakeOllama, api: Ollama, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(record: logging.LogRecord) -> bool:
        if record.getMessage().endswith(": success"):
            raise KeyboardInterrupt
        return True

    caplog.set_level(logging.INFO, "tutor")
    caplog.handler.addFilter(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            put(model, api)
    finally:
        caplog.handler.removeFilter(interrupt)
    assert server.models == {}


def test_a_server_that_dies_while_it_is_proven_is_the_fault_that_is_told(
    server: FakeOllama, api: Ollama, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    gone = [fake.hang_up] * 5
    server.script("POST /api/generate", *gone)
    server.script("POST /api/show", None, None, *gone)
    with pytest.raises(ServiceError, match="broke"):
        put(model, api)
    assert "is still on the server" in caplog.text


def test_a_build_that_is_served_already_is_not_deleted_when_a_newer_server_shows_it_otherwise(
    server: FakeOllama, api: Ollama, model: Model
) -> None:
    tag = put(model, api)["tag"]
    server.capabilities = ["completion", "tools"]
    with pytest.raises(GateError, match="capabilities"):
        put(model, api)
    assert sorted(server.models) == sorted([tag, "tutor:latest"])


def test_a_truncated_gguf_is_refused_by_the_server_too(server: FakeOllama, api: Ollama, model: Model) -> None:
    path = next(iter(model.files.values()))
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ServiceError, match=r"exceeds file size.*damaged"):
        put(model, api)
    assert server.models == {}


def test_an_old_server_is_refused_before_anything_is_sent(server: FakeOllama, api: Ollama, model: Model) -> None:
    server.version = "0.29.3"
    with pytest.raises(ServiceError, match="too old"):
        put(model, api)
    assert [where for where, _ in server.requests] == ["GET /api/version"]


def test_a_server_that_does_not_show_prompts_is_warned_about(
    server: FakeOllama, api: Ollama, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    server.shows_prompts = False
    assert put(model, api)["prompts"] == 0
    assert "does not return its prompts" in caplog.text


# Back and forth


def test_a_rollback_serves_what_latest_was_and_a_second_one_takes_it_back(
    server: FakeOllama, api: Ollama, model: Model
) -> None:
    first, second = put(model, api, system="uno"), put(model, api, system="dos")
    assert served(server) == "dos"
    assert rollback(api, "tutor")["build"] == first["build"]
    assert served(server) == "uno"
    assert rollback(api, "tutor")["build"] == second["build"]
    assert served(server) == "dos"


def test_a_build_that_is_published_again_becomes_latest_and_the_other_one_previous(
    server: FakeOllama, api: Ollama, model: Model
) -> None:
    put(model, api, system="uno")
    put(model, api, system="dos")
    again = put(model, api, system="uno")
    assert again["published"]
    assert not again["created"]
    assert served(server) == "uno"
    rollback(api, "tutor")
    assert served(server) == "dos"


def test_a_model_that_was_not_ours_can_be_gone_back_to(server: FakeOllama, api: Ollama, model: Model) -> None:
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


def test_nothing_to_go_back_to_is_said(api: Ollama, model: Model) -> None:
    with pytest.raises(RecipeError, match="has no previous build of tutor"):
        rollback(api, "tutor")
    put(model, api)
    with pytest.raises(RecipeError, match="has no previous build"):
        rollback(api, "tutor")


def test_any_build_can_be_promoted_by_the_beginning_of_its_hash(server: FakeOllama, api: Ollama, model: Model) -> None:
    builds = [put(model, api, system=text)["build"] for text in ("uno", "dos", "tres")]
    serve_as_latest(api, "tutor", f"tutor:{find_build(api, 'tutor', builds[0][:6])}")
    assert served(server) == "uno"
    assert find_build(api, "tutor") == builds[2], "without a name, the newest"
    serve_as_latest(api, "tutor", f"tutor:{builds[2]}")
    assert served(server) == "tres"
    rows = list_builds(api, "tutor")
    assert [row["build"] for row in rows] == builds[::-1]
    assert [(row["latest"], row["previous"]) for row in rows] == [(True, False), (False, False), (False, True)]


def test_a_build_that_is_not_there_or_not_the_only_one_is_refused(api: Ollama, model: Model) -> None:
    with pytest.raises(RecipeError, match="none: run tutor publish"):
        find_build(api, "tutor", "abc")
    builds = [put(model, api, system=text)["build"] for text in ("uno", "dos")]
    with pytest.raises(RecipeError, match=f"known: {builds[1]}, {builds[0]}"):
        find_build(api, "tutor", "zzz")
    with pytest.raises(RecipeError, match="2 builds of tutor"):
        find_build(api, "tutor", "")


def test_two_names_do_not_mix(server: FakeOllama, api: Ollama, model: Model) -> None:
    lora = put(replace(model, name="tutor-lora"), api, system="otro")
    merged = put(model, api)
    assert [row["build"] for row in list_builds(api, "tutor")] == [merged["build"]]
    assert [row["build"] for row in list_builds(api, "tutor-lora")] == [lora["build"]]


def test_a_copy_that_did_not_take_is_a_fault(server: FakeOllama, api: Ollama, model: Model) -> None:
    tag = put(model, api, system="uno")["tag"]
    put(model, api, system="dos")
    server.script("POST /api/copy", None, lambda handler: handler.empty(200))
    with pytest.raises(GateError, match=f"latest is not {tag}"):
        serve_as_latest(api, "tutor", tag)


# From a build folder


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "small.toml"
    return Recipe(system=SYSTEM, ollama=OllamaSettings(quantization="Q8_0"), path=path)


@pytest.fixture
def build(recipe: Recipe, tmp_path: Path) -> Path:
    """gguf/ and model/ as their stages leave them, around a fake GGUF."""
    make_stages(recipe, tmp_path / "build")
    return tmp_path / "build"


def test_what_the_modelfile_stage_wrote_is_published(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    result = publish.publish(recipe, build, host=server.host)
    assert json.loads((build / "small/model/published.json").read_text("utf-8")) == result
    assert served(server) == SYSTEM
    assert publish.publish(recipe, build, host=server.host)["published"] is False
    assert json.loads((build / "small/model/published.json").read_text("utf-8")) == result
    assert not find_damage(build / "small/model", content=True)


def test_the_request_says_what_modelfile_says_about_the_same_spec(recipe: Recipe, build: Path) -> None:
    model = read_model(build / "small/model", "Q8_0")
    settings = modelfile.ollama_parameters(recipe.generate.model_dump(), recipe.seed, STOPS)
    (gguf,) = model.paths
    body = modelfile.create_body(ModelSpec("tutor", gguf, GO_TEMPLATE, settings, system=SYSTEM), {gguf: "sha256:x"})
    assert body == {"files": {"tutor-Q8_0.gguf": "sha256:x"}, **model.settings}


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1500]), "has 1500 bytes instead of 2000"),
        (lambda path: path.write_bytes(bytes(2000)), "has another content"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_gguf_never_reaches_the_server(
    server: FakeOllama, recipe: Recipe, build: Path, damage: Any, what: str
) -> None:
    damage(build / "small/gguf/tutor-Q8_0.gguf")
    with pytest.raises(ArtifactError, match=what):
        publish.publish(recipe, build, host=server.host)
    assert {where for where, _ in server.requests} <= {"GET /api/version"}


def test_a_model_of_other_settings_or_another_gguf_is_refused(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    other = recipe.model_copy(update={"system": "otro"})
    with pytest.raises(ArtifactError, match=r"another recipe\.system; run: tutor run --until modelfile"):
        publish.publish(other, build, host=server.host)
    with writing(build / "small/gguf", "convert", {}) as (out, _):
        write_gguf(out / "tutor-Q8_0.gguf", size=3000)
    with pytest.raises(ArtifactError, match=r"another input\.convert"):
        publish.publish(recipe, build, host=server.host)


def test_without_the_stages_the_command_that_runs_them_is_named(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="tutor run --until modelfile"):
        publish.publish(recipe, tmp_path / "nothing")


def test_a_build_folder_in_use_is_not_published(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    with locked(build / "small"), pytest.raises(LockError):
        publish.publish(recipe, build, host=server.host)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": "x", "files": 3}'])
def test_a_damaged_request_is_an_artifacts_fault(tmp_path: Path, text: str) -> None:
    (tmp_path / "create.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"create\.json"):
        read_model(tmp_path, "Q8_0")


def test_without_a_server_publishing_is_refused(recipe: Recipe, build: Path) -> None:
    with pytest.raises(TutorError, match="no Ollama at") as caught:
        publish.publish(recipe, build, host="127.0.0.1:1", wait=0.2)
    assert caught.value.code == 6


# What a person reads


def test_a_person_reads_what_was_published_and_what_comes_next(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    lines = publish.published_lines(publish.publish(recipe, build, host=server.host))
    assert "7 prompts as in training" in lines[0]
    assert "Q8_0 -> Ollama" in lines[-2]
    assert lines[-1] == "Next: ollama run tutor"
    assert publish.published_lines(publish.publish(recipe, build, host=server.host))[0].startswith("Nothing to do")


def test_a_person_reads_which_build_is_served(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    assert publish.build_lines(publish.published_builds(recipe, host=server.host)) == [
        "Nothing is published: run tutor publish"
    ]
    first = publish.publish(recipe, build, host=server.host)
    changed = recipe.model_copy(update={"system": "otro"})
    make_stages(changed, build)
    second = publish.publish(changed, build, host=server.host)
    lines = publish.build_lines(publish.published_builds(recipe, host=server.host))
    assert [line.split()[0] for line in lines] == [second["tag"], first["tag"]]
    assert [line.split()[-1] for line in lines] == ["latest", "previous"]
    assert publish.rollback(recipe, host=server.host)["build"] == first["build"]
    assert promote.promote(recipe, build, second["build"], host=server.host)["build"] == second["build"]


# Asking the published model


@pytest.fixture
def prompts(recipe: Recipe, build: Path) -> list[dict[str, Any]]:
    """Three prompts, as the data stage leaves them."""
    rows = [{"instruction": f"¿Qué es {thing}?", "category": "tipos"} for thing in ("any", "never", "void")]
    with writing(build / "small/data", "data", {}) as (out, _):
        (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        (out / "train.jsonl").write_text(json.dumps({"instruction": "¿?", "response": "Sí."}) + "\n", "utf-8")
    return rows


def evaluated(server: FakeOllama, recipe: Recipe, build: Path) -> dict[str, Any]:
    return compare.evaluate_published(recipe, build, host=server.host)


def test_every_prompt_is_asked_greedily_and_judged_once(
    server: FakeOllama, recipe: Recipe, build: Path, prompts: list[dict[str, Any]]
) -> None:
    publish.publish(recipe, build, host=server.host)
    server.requests.clear()
    result = evaluated(server, recipe, build)
    assert result["ran"]
    assert result["all"]["n"] == 3
    assert result["all"]["stopped"]["n"] == 3
    assert result["as_llama_server"] is None
    assert any("100 %" in line for line in summary.verdict_lines(result)), "shown as the evaluate stage's result is"
    asked = server.asked("POST /api/chat")[1:]
    assert [body["messages"][-1]["content"] for body in asked] == [row["instruction"] for row in prompts]
    assert {body["options"]["temperature"] for body in asked} == {0.0}
    server.requests.clear()
    assert evaluated(server, recipe, build) == {**result, "ran": False}
    assert not server.asked("POST /api/chat")


def test_another_build_under_the_same_name_is_asked_again(
    server: FakeOllama, recipe: Recipe, build: Path, prompts: list[dict[str, Any]]
) -> None:
    publish.publish(recipe, build, host=server.host)
    evaluated(server, recipe, build)
    server.models["tutor:latest"].digest = "0" * 64
    assert evaluated(server, recipe, build)["ran"]


def test_answers_that_llama_server_gives_too_are_counted(
    server: FakeOllama, recipe: Recipe, build: Path, prompts: list[dict[str, Any]]
) -> None:
    publish.publish(recipe, build, host=server.host)
    theirs = ["".join(server.pieces), " otra", None]
    rows = [{"answers": {"tutor": {"text": text}}} for text in theirs]
    (build / "small/eval").mkdir()
    (build / "small/eval/answers.json").write_text(json.dumps(rows))
    assert evaluated(server, recipe, build)["as_llama_server"] == {"same": 1, "of": 3}


def test_a_cut_answer_is_no_whole_answer_and_an_aborted_one_is_recorded(
    server: FakeOllama, recipe: Recipe, build: Path, prompts: list[dict[str, Any]]
) -> None:
    publish.publish(recipe, build, host=server.host)
    cut = {"done": True, "done_reason": "length", "eval_count": 1}
    server.script(
        "POST /api/chat", None, fake.stream(fake.chunk(" x"), cut), fake.stream(*[fake.chunk(" la")] * 31), None, None
    )
    result = evaluated(server, recipe, build)
    assert result["all"]["errors"] == 1
    assert result["all"]["stopped"]["n"] == 1
    rows = json.loads((build / "small/eval-ollama/answers.json").read_text("utf-8"))
    assert rows[0]["answers"]["ollama"]["finish"] == "length"
    assert "repeated one token" in rows[1]["answers"]["ollama"]["error"]


def test_a_model_deleted_while_it_is_asked_leaves_its_answers_for_the_next_run_and_no_half_evaluation(
    server: FakeOllama, recipe: Recipe, build: Path, prompts: list[dict[str, Any]]
) -> None:
    publish.publish(recipe, build, host=server.host)

    def delete(handler: fake.Handler) -> None:
        server.models.clear()
        handler.error(404, "model 'tutor' not found")

    there = dict(server.models)
    server.script("POST /api/chat", None, None, delete)
    with pytest.raises(ServiceError):
        evaluated(server, recipe, build)
    assert {path.name for path in (build / "small").glob("eval-ollama*")} == {
        "eval-ollama.checkpoints",
        "eval-ollama.log",
    }
    server.models.update(there)
    server.requests.clear()
    assert evaluated(server, recipe, build)["all"]["errors"] == 0
    asked = [body["messages"][-1]["content"] for body in server.asked("POST /api/chat")[1:]]
    assert asked == [row["instruction"] for row in prompts[1:]]
    assert {path.name for path in (build / "small").glob("eval-ollama*")} == {"eval-ollama", "eval-ollama.log"}
