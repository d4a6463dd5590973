"""serving/evaluation/baselines.py and `tutor baselines`: ways without training, asked to fake servers."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.fakes.llamacpp_answers import ENGLISH, SPANISH, read_requests, write_base
from support.files import write_rows
from support.outputs.evaluations import PROMPTS

from tutor.artifacts.stage_folder import writing
from tutor.cli import summary
from tutor.errors import RecipeError
from tutor.pipeline.cleaning import clean
from tutor.pipeline.registry import BY_NAME
from tutor.recipe.settings import Recipe
from tutor.serving.evaluation.baselines import run_baselines
from tutor.stages.evaluate import stage
from tutor.stages.report.baselines import baseline_lines

TRAINING = [
    {"instruction": f"¿Qué es el tipo {name} en Rust?", "response": f"Fila de {name}.{SPANISH}", "line": place}
    for place, name in enumerate(("u8", "i32", "f64", "char", "str", "bool"), 1)
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<fin>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WAYS = ["base", "base + system text", "base + 1 example", "base + 3 examples", "base + 3 similar rows", "tutor"]
CONFIG = {"num_attention_heads": 2, "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(seed=5).model_copy(update={"path": tmp_path / "small.toml"})


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A build folder with rows, a base with a template, and GGUF files that configure the fake servers."""
    folder = tmp_path / "build" / "small"
    with writing(folder / "data", "data", {}) as (out, _):
        write_rows(out / "prompts.jsonl", PROMPTS)
        write_rows(out / "train.jsonl", TRAINING)
        write_rows(out / "held_out.jsonl", [{"instruction": "¿Secreta?", "response": "Fila apartada."}])
    with writing(folder / "base", "base", {}) as (out, _):
        write_base(out)
        write_model(out / "model")
    with writing(folder / BY_NAME["convert"].folder, "convert", {}) as (out, _):
        for name, text in (("base", ENGLISH), ("tutor", SPANISH)):
            model = {"text": text, "requests": str(tmp_path / f"{name}.requests"), "crashes_on": "", "times": 1}
            (out / f"{name}-Q4_K_M.gguf").write_text(json.dumps(model), "utf-8")
    return tmp_path / "build"


def write_model(folder: Path) -> None:
    """Add a template and a configuration to the model of a base."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "chat_template": TEMPLATE}), "utf-8")
    config = {**CONFIG, "vocab_size": 257, "max_position_embeddings": 2048, "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def asked(tmp_path: Path, model: str) -> list[str]:
    """The prompts of all requests for an answer, without those that warm an engine up."""
    requests: list[dict[str, Any]] = read_requests(tmp_path / f"{model}.requests")
    return [each["prompt"] for each in requests if each.get("n_predict", 1) > 1]


@pytest.mark.slow
@pytest.mark.usefixtures("llamacpp")
def test_ways_are_asked_compared_and_stored(
    recipe: Recipe, build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "SERVERS", 1)
    found = run_baselines(recipe, build)
    assert list(found["ways"]) == WAYS
    assert found["decision"]["outcome"] == "tune"
    assert [(each["before"], each["after"]) for each in found["differences"]][-1] == ("base + 3 similar rows", "tutor")
    assert [way["all"]["n"] for way in found["ways"].values()] == [8] * 6
    lines = baseline_lines(found)
    assert lines[-1].startswith("  Best: tutor (8 of 8, ")
    assert "fine-tuning pays" in lines[-1]
    said = next(line for line in lines if "left out: base + 5 examples: its longest prompt has" in line)
    assert said.endswith("more than the base's context of 2,048")
    # The examples are training rows: no row that was held out is shown, and no question of another prompt.
    base, tutor = asked(tmp_path, "base"), asked(tmp_path, "tutor")
    assert (len(base), len(tutor)) == (40, 8)
    assert not any("Fila apartada" in prompt for prompt in base)
    assert sorted(prompt.count("Fila de ") for prompt in base) == sorted([0, 0, 1, 3, 3] * 8)
    assert all(sum(each["instruction"] in prompt for each in PROMPTS) == 1 for prompt in base)
    assert all(prompt.endswith("\n\nResponde en español.<fin><|assistant|>") for prompt in base)
    assert all(prompt.startswith("Instrucción: ") for prompt in tutor)
    # Stored, and a way is asked again only where it has changed.
    assert run_baselines(recipe, build)["ran"] is False
    assert run_baselines(recipe, build, "Sé breve.")["ran"] is True
    again = asked(tmp_path, "base")[40:]
    assert len(again) == 8
    assert all(prompt.startswith("<|system|>Sé breve.<fin>") for prompt in again)
    assert "baselines" in summary.collect(recipe, build)
    # A comparison with another tutor is shown nowhere.
    with writing(build / "small" / "gguf", "convert", {"another": 1}) as (out, _):
        (out / "tutor-Q4_K_M.gguf").write_text("another", "utf-8")
    assert "baselines" not in summary.collect(recipe, build)
    clean(recipe, build, ("evaluate",))
    assert not list((build / "small").glob("eval*"))


def test_comparison_without_a_converted_base_is_refused(recipe: Recipe, build: Path) -> None:
    changed = recipe.model_copy(update={"convert": recipe.convert.model_copy(update={"base": False})})
    with pytest.raises(RecipeError, match=r"convert\.base = false"):
        run_baselines(changed, build)
