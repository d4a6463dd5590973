"""serving/evaluation/temporary_model.py and published.py: the untuned base beside the tutor, on a fake server."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.fakes import ollama as fake
from support.fakes.ollama import FakeOllama
from support.files import write_rows
from support.models.gguf_bytes import facts
from support.outputs.published import make_recipe, make_stages, write_data

from tutor.errors import ServiceError
from tutor.pipeline.registry import BY_NAME
from tutor.recipe.settings import Recipe
from tutor.serving import promote
from tutor.serving.evaluation.published import evaluate_published
from tutor.stages.report.stage import gather
from tutor.stages.report.view import view

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
QUESTIONS = ("¿Qué es any?", "¿Qué es never?")
REPHRASED = "Explícame any."
ENGLISH, SPANISH = " It is a type that the compiler never checks.", " Es un tipo que el compilador no comprueba nunca."
BASE = "tutor-untuned:temporary"


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_rows(tmp_path / "words.jsonl", [{"original": QUESTIONS[0], "instruction": REPHRASED}])
    found = make_recipe(tmp_path)
    return found.model_copy(
        update={"evaluate": found.evaluate.model_copy(update={"paraphrases": "words.jsonl"}), "system": ""}
    )


@pytest.fixture
def build(recipe: Recipe, tmp_path: Path) -> Path:
    """A build folder whose convert stage has made the base too, and whose base has a chat template of its own."""
    build = make_stages(recipe, tmp_path / "build", base=TEMPLATE)
    base = build / "small" / "base"
    (base / "model").mkdir(parents=True)
    (base / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}), "utf-8")
    (base / "base.json").write_text(json.dumps({**asdict(facts()), "model": "model"}), "utf-8")
    write_data(recipe, build, QUESTIONS)
    return build


@pytest.fixture
def server(server: FakeOllama, recipe: Recipe, build: Path) -> FakeOllama:
    """A server with the published tutor, which answers in Spanish, and whose base answers in English."""
    promote.publish_and_promote(recipe, build, host=server.host)
    server.requests.clear()
    server.reply_to = lambda prompt: [(ENGLISH if "<|user|>" in prompt else SPANISH, -0.1)]
    return server


def test_base_is_asked_both_ways_and_deleted(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    result = evaluate_published(recipe, build, host=server.host)
    assert list(result["models"]) == ["base", "base-as-tutor", "tutor"]
    assert [(each["before"], each["after"]) for each in result["differences"]] == [
        ("base", "tutor"),
        ("base-as-tutor", "tutor"),
    ]
    spanish = {name: model["all"]["language"]["n"] for name, model in result["models"].items()}
    assert spanish == {"base": 0, "base-as-tutor": 2, "tutor": 2}
    assert result["paraphrases"]["n"] == 1
    raw = [body["prompt"] for body in server.bodies("POST /api/generate") if body.get("raw")]
    assert {prompt for prompt in raw if "any" in prompt} == {
        f"<|user|>{QUESTIONS[0]}\n\nResponde en español.<|assistant|>",
        f"Instrucción: {QUESTIONS[0]}\nRespuesta:",
    }
    created = [body["model"] for body in server.bodies("POST /api/create")]
    assert created == [BASE], "one upload for both ways"
    assert BASE not in server.models
    assert set(server.loaded) == set()


def test_second_evaluation_asks_and_sends_nothing(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    first = evaluate_published(recipe, build, host=server.host)
    server.requests.clear()
    assert evaluate_published(recipe, build, host=server.host) == {**first, "ran": False}
    asked = {name for name, _ in server.requests}
    assert not asked & {"POST /api/chat", "POST /api/generate", "POST /api/create", "HEAD /api/blobs"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ServiceError("lost")])
def test_interrupted_evaluation_leaves_no_base(
    server: FakeOllama, recipe: Recipe, build: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        assert BASE in server.models
        raise error

    monkeypatch.setattr("tutor.serving.evaluation.published.serve", fail)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ServiceError):
        evaluate_published(recipe, build, host=server.host)
    assert BASE not in server.models
    monkeypatch.undo()
    assert evaluate_published(recipe, build, host=server.host)["ran"]


def test_base_that_cannot_be_deleted_is_named(
    server: FakeOllama, recipe: Recipe, build: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.script("DELETE /api/delete", fake.status(500, '{"error": "disk"}'))
    evaluate_published(recipe, build, host=server.host)
    assert f"ollama rm {BASE}" in caplog.text


def test_report_shows_base_tutor_and_paraphrases(server: FakeOllama, recipe: Recipe, build: Path) -> None:
    evaluate_published(recipe, build, host=server.host)
    (build / "small" / "parity" / "manifest.json").unlink()  # a fake one, without figures
    outputs = gather(recipe, {name: build / "small" / name for name in ("data", *BY_NAME["report"].reads)})
    found = view(outputs)
    assert list(found["verdicts"]["models"]) == ["base", "base-as-tutor", "tutor"]
    assert found["paraphrases"]["n"] == 1
    assert [row["original"] for row in outputs.paraphrased] == [QUESTIONS[0]]
