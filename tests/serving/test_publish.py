"""serving/publish.py against a fake server: from a build folder to a build."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.fakes.ollama import FakeOllama, write_gguf
from support.outputs.published import SYSTEM, make_stages

from tutor.artifacts.lock import locked
from tutor.artifacts.manifest import find_damage
from tutor.artifacts.stage_folder import writing
from tutor.errors import ArtifactError, LockError, TutorError
from tutor.prompt import GO_TEMPLATE, STOPS
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
    second = promote.publish_and_promote(changed, build, host=server.host)
    lines = publish.build_lines(publish.published_builds(recipe, host=server.host))
    assert [line.split()[0] for line in lines] == [second["tag"], first["tag"]]
    assert [line.split()[-1] for line in lines] == ["latest", "previous"]
    assert publish.rollback(recipe, host=server.host)["build"] == first["build"]
    assert promote.promote(recipe, build, second["build"], host=server.host)["build"] == second["build"]
