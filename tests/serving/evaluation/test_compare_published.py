"""serving/evaluation/published.py: the published model is evaluated with a fake server."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.fakes import ollama as fake
from support.fakes.ollama import FakeOllama
from support.outputs.published import write_data

from tutor.cli import verdict_tables
from tutor.errors import ServiceError
from tutor.machine import host
from tutor.recipe.settings import Recipe
from tutor.serving import promote
from tutor.serving.evaluation import published


@pytest.fixture
def prompts(recipe: Recipe, build: Path) -> list[dict[str, Any]]:
    """Three prompts, as the data stage writes them."""
    questions = [f"¿Qué es {thing}?" for thing in ("any", "never", "void")]
    write_data(recipe, build, questions)
    return [{"instruction": question} for question in questions]


def evaluated(server: FakeOllama, recipe: Recipe, build: Path) -> dict[str, Any]:
    return published.evaluate_published(recipe, build, host=server.host)


def test_published_model_is_evaluated_greedily_and_once(
    server: FakeOllama, recipe: Recipe, build: Path, prompts: list[dict[str, Any]]
) -> None:
    promote.publish_and_promote(recipe, build, host=server.host)
    server.requests.clear()
    result = evaluated(server, recipe, build)
    assert result["ran"]
    assert result["all"]["n"] == 3
    assert result["all"]["stopped"]["n"] == 3
    assert result["agreement_with_llama_server"] is None
    lines = verdict_tables.verdict_lines(result)
    assert any("100 %" in line for line in lines), "shown as the evaluate stage's result is"
    asked = server.bodies("POST /api/chat")[1:]
    assert [body["messages"][-1]["content"] for body in asked] == [row["instruction"] for row in prompts]
    assert {body["options"]["temperature"] for body in asked} == {0.0}
    server.requests.clear()
    assert evaluated(server, recipe, build) == {**result, "ran": False}
    assert not server.bodies("POST /api/chat")


def test_evaluation_without_the_gpu_of_this_machine_warns(
    server: FakeOllama,
    recipe: Recipe,
    build: Path,
    prompts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    del prompts  # written
    promote.publish_and_promote(recipe, build, host=server.host)
    caplog.clear()
    monkeypatch.setattr(host, "gpus", lambda: ["a GPU"])
    server.gpu_share = 0.25
    evaluated(server, recipe, build)
    assert "Ollama has only 25% of " in caplog.text
    assert "restart Ollama" in caplog.text


def test_another_build_of_the_same_name_is_evaluated_again(
    server: FakeOllama, recipe: Recipe, build: Path, prompts: list[dict[str, Any]]
) -> None:
    promote.publish_and_promote(recipe, build, host=server.host)
    evaluated(server, recipe, build)
    server.models["tutor:latest"].digest = "0" * 64
    assert evaluated(server, recipe, build)["ran"]


def test_answers_equal_to_llama_server_are_counted(
    server: FakeOllama, recipe: Recipe, build: Path, prompts: list[dict[str, Any]]
) -> None:
    promote.publish_and_promote(recipe, build, host=server.host)
    theirs = ["".join(server.pieces), " otra", None]
    rows = [{"answers": {"tutor": {"text": text}}} for text in theirs]
    (build / "small/eval").mkdir()
    (build / "small/eval/answers.json").write_text(json.dumps(rows))
    assert evaluated(server, recipe, build)["agreement_with_llama_server"] == {"same": 1, "of": 3}


def test_cut_answers_count_and_aborted_ones_are_recorded(
    server: FakeOllama, recipe: Recipe, build: Path, prompts: list[dict[str, Any]]
) -> None:
    promote.publish_and_promote(recipe, build, host=server.host)
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


def test_model_deleted_during_evaluation_keeps_its_answers(
    server: FakeOllama, recipe: Recipe, build: Path, prompts: list[dict[str, Any]]
) -> None:
    promote.publish_and_promote(recipe, build, host=server.host)

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
    asked = [body["messages"][-1]["content"] for body in server.bodies("POST /api/chat")[1:]]
    assert asked == [row["instruction"] for row in prompts[1:]]
    assert {path.name for path in (build / "small").glob("eval-ollama*")} == {"eval-ollama", "eval-ollama.log"}
