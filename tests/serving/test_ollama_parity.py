"""serving/ollama_parity.py: a model in Ollama is compared with the served GGUF, before it is latest and later."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.fakes import ollama as fake
from support.fakes.ollama import FakeOllama
from support.outputs.parity import write_parity
from support.outputs.published import SYSTEM, make_stages

from tutor.artifacts.disk import remove
from tutor.artifacts.layout import BuildFolder
from tutor.artifacts.manifest import require_stage
from tutor.artifacts.stage_folder import writing
from tutor.cli import summary
from tutor.errors import ArtifactError, GateError
from tutor.recipe.settings import Recipe
from tutor.serving import promote, publish
from tutor.serving.build_records import read_record
from tutor.serving.ollama_parity import read_reference
from tutor.stages.parity.gate import parity_table

REFUSAL = {"message": "F16 -> Q8_0 (quantize) diverges in its tokens: «code»", "hint": "most likely: x"}
"""Result of a parity stage whose gate refused."""


# Before publishing


def test_model_refused_by_the_gate_is_not_published(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    write_parity(recipe, build, refused=REFUSAL)
    with pytest.raises(GateError, match="diverges in its tokens"):
        promote.publish_and_promote(recipe, build, host=server.host)
    assert server.requests == []


def test_model_without_a_parity_stage_is_not_published(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    remove(build / "small/parity")
    with pytest.raises(ArtifactError, match="parity is not there; run: tutor run --until parity"):
        promote.publish_and_promote(recipe, build, host=server.host)
    make_stages(recipe, build)
    with writing(build / "small/gguf", "convert", {}) as (out, _):
        fake.write_gguf(out / "tutor-Q8_0.gguf", size=3000)
    with pytest.raises(ArtifactError, match=r"was made of another input\.convert"):
        promote.publish_and_promote(recipe, build, host=server.host)
    assert server.requests == []


UNCHECKED = "base + adapter -> merged: 16 GB are needed, 3 GB are free"


def test_hand_off_that_memory_forbade_stops_publishing(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    write_parity(recipe, build, missing="16 GB are needed, 3 GB are free")
    with pytest.raises(GateError, match=r"not compared, so not proven: base \+ adapter -> .*publish --unchecked"):
        promote.publish_and_promote(recipe, build, host=server.host)
    with pytest.raises(GateError, match="not proven"):
        promote.publish_and_promote(recipe, build, host=server.host, force=True)
    assert server.requests == []


def test_unchecked_publication_is_recorded_for_ever(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    write_parity(recipe, build, missing="16 GB are needed, 3 GB are free")
    result = promote.publish_and_promote(recipe, build, host=server.host, unchecked=True)
    assert result["not_checked"] == [UNCHECKED]
    assert f"UNCHECKED by the parity gate, as the record says: {UNCHECKED}" in publish.published_lines(result)
    folder = BuildFolder(build, recipe.name)
    record = read_record(folder, result["build"])
    assert record["proven"] is False
    (entry,) = record["unchecked"]
    assert entry["not_compared"] == [UNCHECKED]
    collected = summary.collect(recipe, build)
    lines = summary.summary_lines({**collected, "stages": {"parity": collected["stages"]["parity"]}}, "x.toml")
    assert f"  NOT PROVEN, published unchecked: {UNCHECKED}" in lines
    with pytest.raises(GateError, match="is not proven: it was published unchecked: base"):
        promote.promote(recipe, build, host=server.host)
    write_parity(recipe, build)  # compared on another machine
    server.version = "0.33.1"
    promote.publish_and_promote(recipe, build, host=server.host)
    record = read_record(folder, result["build"])
    assert (record["proven"], record["unchecked"]) == (True, [entry])
    assert promote.promote(recipe, build, host=server.host)["promotion"]["overrode"] == []


def test_model_is_compared_before_it_is_latest(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    result = promote.publish_and_promote(recipe, build, host=server.host)
    assert result["parity"]["state"] == "same"
    figures = {check["name"]: check["figures"] for check in result["parity"]["checks"]}
    assert figures["prompt"]["equal"] == figures["prompt"]["of"] == len(read_reference(build / "small/parity").seen)
    assert figures["greedy answer"]["agreed"] == figures["greedy answer"]["steps"] > 40
    assert any("Q8_0 -> Ollama" in line for line in publish.published_lines(result))
    order = [where for where, body in server.requests if not (body and "_debug_render_only" in body)]
    assert max(place for place, where in enumerate(order) if where == "POST /api/chat") < order.index("POST /api/copy")


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (
            lambda server: setattr(server, "reply_to", lambda _: [(" Otra", -0.1)]),
            "greedy answer.*' Una'.* and ' Otra'",
        ),
        (lambda server: setattr(server, "reply_to", lambda _: [(" Una", -2.1)]), "log-probabilities.*-0.10 and -2.10"),
        (lambda server: setattr(server, "counts", lambda prompt: 1 + len(prompt.split())), r"tokens: .*\d+ tokens and"),
    ],
    ids=["another model", "other weights", "a second BOS"],
)
def test_model_with_other_answers_in_ollama_is_refused(
    server: FakeOllama, recipe: Recipe, build: Path, spoil: Any, what: str
) -> None:
    spoil(server)
    with pytest.raises(GateError, match=rf"Q8_0 -> Ollama \(publish\) diverges in its {what}"):
        promote.publish_and_promote(recipe, build, host=server.host)
    assert server.models == {}


def test_server_without_rendered_prompts_compares_tokens(
    server: FakeOllama, recipe: Recipe, build: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.shows_prompts = False
    result = promote.publish_and_promote(recipe, build, host=server.host)
    figures = {check["name"]: check["figures"] for check in result["parity"]["checks"]}
    assert figures["prompt"]["of"] == 0
    assert figures["tokens"]["equal"] == figures["tokens"]["of"] > 5
    assert "only their numbers of tokens are compared" in caplog.text


# Later, with the served model


def test_served_model_can_be_compared_again(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    promote.publish_and_promote(recipe, build, host=server.host)
    for _ in range(2):
        result = publish.compare_published(recipe, build, host=server.host)
        assert [item["state"] for item in result["hand_offs"]] == ["same"]
        assert "refused" not in result
    assert require_stage(build / "small/parity-ollama", "parity-ollama").results == result


def test_replaced_model_is_found_by_its_digest(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    promote.publish_and_promote(recipe, build, host=server.host)
    replaced = server.models["tutor:latest"]
    server.models["tutor:latest"] = fake.Model({**replaced.body, "system": "x"}, replaced.facts, replaced.blob)
    result = publish.compare_published(recipe, build, host=server.host)
    assert "someone created or copied another model" in result["refused"]["hint"]
    assert "digest" in result["refused"]["message"]
    assert "another model" in "\n".join(parity_table(result["hand_offs"]))


def test_replaced_model_without_a_digest_is_found_by_answers(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    promote.publish_and_promote(recipe, build, host=server.host)
    (build / "small/model/published.json").unlink()
    assert "refused" not in publish.compare_published(recipe, build, host=server.host)
    server.reply_to = lambda _: [(" Otra", -0.1), (" cosa", -0.1)]
    assert "greedy answer" in publish.compare_published(recipe, build, host=server.host)["refused"]["message"]


@pytest.mark.slow
def test_parity_command_prints_a_table_and_exits_8(
    server: FakeOllama, recipe: Recipe, build: Path, tutor: Any, tmp_path: Path
) -> None:
    path = tmp_path / "small.toml"
    path.write_text(f"system = '{SYSTEM}'\n[ollama]\nquantization = 'Q8_0'\n", "utf-8")
    command = ("parity", "--host", server.host, "-r", path, "-b", build)
    promote.publish_and_promote(recipe, build, host=server.host)
    done = tutor(*command)
    assert (done.returncode, "Q8_0 -> Ollama" in done.stdout) == (0, True), done.stderr
    server.reply_to = lambda _: [(" Otra", -0.1)]
    done = tutor(*command)
    assert done.returncode == 8
    assert "<- diverges" in done.stdout
    assert "Error: Q8_0 -> Ollama (publish) diverges in its greedy answer" in done.stderr
    done = tutor(*command, "--json")
    assert json.loads(done.stdout)["refused"]["message"].startswith("Q8_0 -> Ollama")
