"""serving/publish.py against a fake server: from a build folder to a build."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.fakes.ollama import FakeOllama, Model, write_gguf
from support.outputs.published import SYSTEM, make_stages, write_data

from tutor.artifacts.disk import remove
from tutor.artifacts.lock import locked
from tutor.artifacts.manifest import find_damage
from tutor.artifacts.stage_folder import writing
from tutor.errors import ArtifactError, GateError, LockError, TutorError
from tutor.prompt.tutor_format import GO_TEMPLATE, STOPS
from tutor.recipe.settings import Recipe
from tutor.serving import promote, publish
from tutor.serving.builds import (
    read_model,
)
from tutor.stages.modelfile import stage as modelfile
from tutor.stages.modelfile.spec import ModelSpec


def served(server: FakeOllama) -> str:
    """The system text that `latest` has."""
    return str(server.models["tutor:latest"].body["system"])


def test_output_of_the_modelfile_stage_is_published(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    result = promote.publish_and_promote(recipe, build, host=server.host)
    assert json.loads((build / "small/model/published.json").read_text("utf-8")) == result
    assert served(server) == SYSTEM
    assert promote.publish_and_promote(recipe, build, host=server.host)["published"] is False
    assert json.loads((build / "small/model/published.json").read_text("utf-8")) == result
    assert not find_damage(build / "small/model", content=True)


def test_record_of_the_stack_names_the_image_of_ollama(
    server: FakeOllama, recipe: Recipe, build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTOR_OLLAMA_IMAGE", "ollama/ollama:0.33.3@sha256:ab")
    promote.publish_and_promote(recipe, build, host=server.host)
    record = json.loads((build / "small/model/published.json").read_text("utf-8"))
    assert record["image"] == "ollama/ollama:0.33.3@sha256:ab"


def test_create_body_equals_that_of_the_modelfile_spec(recipe: Recipe, build: Path) -> None:
    model = read_model(build / "small/model", "Q8_0")
    settings = modelfile.ollama_parameters(recipe.generate.model_dump(), recipe.seed, STOPS)
    (gguf,) = model.paths
    body = modelfile.create_body(ModelSpec("tutor", gguf, GO_TEMPLATE, settings, system=SYSTEM), {gguf: "sha256:x"})
    assert body == {"files": {"tutor-Q8_0.gguf": "sha256:x"}, **model.settings}


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1500]), "has 1500 bytes instead of 2000"),
        (lambda path: path.write_bytes(bytes(2000)), "has changed since"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_damaged_gguf_is_not_uploaded(server: FakeOllama, recipe: Recipe, build: Path, damage: Any, what: str) -> None:
    damage(build / "small/gguf/tutor-Q8_0.gguf")
    with pytest.raises(ArtifactError, match=what):
        promote.publish_and_promote(recipe, build, host=server.host)
    assert {where for where, _ in server.requests} <= {"GET /api/version"}


def test_model_of_other_settings_or_another_gguf_is_refused(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    other = recipe.model_copy(update={"system": "otro"})
    with pytest.raises(ArtifactError, match=r"another recipe\.system; run: tutor run --until modelfile"):
        promote.publish_and_promote(other, build, host=server.host)
    with writing(build / "small/gguf", "convert", {}) as (out, _):
        write_gguf(out / "tutor-Q8_0.gguf", size=3000)
    with pytest.raises(ArtifactError, match=r"another input\.convert"):
        promote.publish_and_promote(recipe, build, host=server.host)


def test_publish_without_stages_names_the_command_to_run(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="tutor run --until modelfile"):
        promote.publish_and_promote(recipe, tmp_path / "nothing")


def test_locked_build_folder_is_not_published(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    with locked(build / "small"), pytest.raises(LockError):
        promote.publish_and_promote(recipe, build, host=server.host)


def test_publish_without_a_server_is_refused(recipe: Recipe, build: Path) -> None:
    with pytest.raises(TutorError, match="no Ollama at") as caught:
        promote.publish_and_promote(recipe, build, host="127.0.0.1:1", wait=0.2)
    assert caught.value.code == 6


def test_published_lines_show_the_build_and_the_next_command(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    lines = publish.published_lines(promote.publish_and_promote(recipe, build, host=server.host))
    assert "7 prompts as in training" in lines[0]
    assert "Q8_0 -> Ollama" in lines[-3]
    assert lines[-2] == "no build was in service before: not compared"
    assert lines[-1] == "Next: ollama run tutor"
    assert publish.published_lines(promote.publish_and_promote(recipe, build, host=server.host))[0].startswith(
        "Nothing to do"
    )


def test_build_lines_show_which_build_is_served(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    assert publish.build_lines(publish.published_builds(recipe, host=server.host)) == [
        "Nothing is published: run tutor publish"
    ]
    first = promote.publish_and_promote(recipe, build, host=server.host)
    changed = recipe.model_copy(update={"system": "otro"})
    make_stages(changed, build)
    write_data(changed, build, ["¿Qué es any?"])
    second = promote.publish_and_promote(changed, build, host=server.host)
    lines = publish.build_lines(publish.published_builds(recipe, host=server.host))
    assert [line.split()[0] for line in lines] == [second["tag"], first["tag"]]
    assert [line.split()[-1] for line in lines] == ["latest", "previous"]
    assert publish.rollback(recipe, host=server.host)["build"] == first["build"]
    assert promote.promote(recipe, build, second["build"], host=server.host)["build"] == second["build"]


# Edited inputs


def test_model_of_edited_inputs_is_published_only_by_force(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    """Seen: `tutor publish` after the rows were edited is "Nothing to do", without a word."""
    promote.publish_and_promote(recipe, build, host=server.host)
    server.requests.clear()
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"rank": 4})})
    with pytest.raises(
        ArtifactError, match=r"model of an older state: convert was made of another recipe\.lineage"
    ) as caught:
        promote.publish_and_promote(changed, build, host=server.host)
    assert caught.value.code == 5
    assert "tutor publish --force" in str(caught.value)
    assert server.requests == []
    forced = promote.publish_and_promote(changed, build, host=server.host, force=True)
    assert forced["edited"] == ["convert was made of another recipe.lineage"]
    assert any("Forced although it is of an older state: convert" in line for line in publish.published_lines(forced))


# Another version of the server


def sent(server: FakeOllama) -> set[str]:
    return {where for where, _ in server.requests} & {"POST /api/blobs", "POST /api/create", "POST /api/chat"}


@pytest.mark.parametrize("version", ["0.34.0", "0.0.0"])
def test_other_server_version_is_checked_again_without_upload(
    server: FakeOllama, recipe: Recipe, build: Path, version: str
) -> None:
    """Seen: Ollama went from 0.0.0 to 0.33.0 under the same models, and `publish` had nothing to do."""
    first = promote.publish_and_promote(recipe, build, host=server.host)
    server.version = version
    server.requests.clear()
    again = promote.publish_and_promote(recipe, build, host=server.host)
    assert sent(server) == {"POST /api/chat"}
    assert (again["published"], again["created"], again["build"]) == (True, False, first["build"])
    assert (again["version"], again["checked_before_on"], again["parity"]["state"]) == (version, "0.33.0-rc2", "same")
    assert publish.published_lines(again)[0].startswith("Checked again tutor:")
    assert "last checked on version 0.33.0-rc2" in publish.published_lines(again)[1]
    assert json.loads((build / "small/model/published.json").read_text("utf-8"))["version"] == version
    server.requests.clear()
    assert promote.publish_and_promote(recipe, build, host=server.host)["published"] is False
    assert sent(server) == set()


def test_version_that_answers_otherwise_is_refused_every_time(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    promote.publish_and_promote(recipe, build, host=server.host)
    server.version = "0.34.0"
    server.reply_to = lambda _: [(" Otra", -0.1)]
    for _ in range(2):
        with pytest.raises(GateError, match="diverges in its greedy answer"):
            promote.publish_and_promote(recipe, build, host=server.host)
    server.reply_to = None
    assert promote.publish_and_promote(recipe, build, host=server.host)["published"]


def test_build_without_a_record_of_its_check_is_checked(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    first = promote.publish_and_promote(recipe, build, host=server.host)
    remove(build / "small/served")
    server.requests.clear()
    again = promote.publish_and_promote(recipe, build, host=server.host)
    assert sent(server) == {"POST /api/chat"}
    assert (again["build"], again["created"]) == (first["build"], False)


def test_record_is_of_one_host(recipe: Recipe, build: Path, server: FakeOllama) -> None:
    promote.publish_and_promote(recipe, build, host=server.host)
    other_name = server.host.replace("127.0.0.1", "localhost")
    assert promote.publish_and_promote(recipe, build, host=other_name)["published"]
    for host in (server.host, other_name):
        assert promote.publish_and_promote(recipe, build, host=host)["published"] is False


def test_build_replaced_on_the_server_is_created_again(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    """Its settings are equal: only the digest shows that another file has the tag."""
    first = promote.publish_and_promote(recipe, build, host=server.host)
    theirs = server.models[first["tag"]]
    server.blobs["sha256:" + "0" * 64] = b"another"
    for name in (first["tag"], "tutor:latest"):
        server.models[name] = Model(theirs.body, theirs.facts, "sha256:" + "0" * 64)
    again = promote.publish_and_promote(recipe, build, host=server.host)
    assert (again["created"], again["digest"]) == (True, first["digest"])
    assert server.models["tutor:latest"].blob == theirs.blob
