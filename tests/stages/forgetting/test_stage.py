"""stages/forgetting/stage.py: general texts scored by fake programs, and the figures."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.fakes.llamacpp_answers import write_base
from support.files import write_rows

from tutor.errors import ArtifactError
from tutor.recipe.settings import Recipe
from tutor.stages.forgetting.stage import drift, run

TEXTS = [
    {"text": "a b", "language": "es" if number < 6 else "en", "kind": "poem" if number < 8 else "code"}
    for number in range(12)
]


def test_drift_is_by_text_and_language_and_more_is_worse() -> None:
    base = [2.0 + number / 10 for number in range(12)]
    found = drift({"base": base, "tutor": [loss + 0.5 for loss in base]}, TEXTS, 7)
    assert (found["conclusion"], found["n"], found["difference"]) == ("worse", 12, 0.5)
    assert found["perplexity"]["tutor"] / found["perplexity"]["base"] == pytest.approx(math.exp(0.5), rel=1e-3)
    assert {name: entry["n"] for name, entry in found["languages"].items()} == {"en": 6, "es": 6}
    assert found["languages"]["es"]["perplexity"]["base"] < found["languages"]["en"]["perplexity"]["base"]
    assert {name: entry["n"] for name, entry in found["kinds"].items()} == {"code": 4, "poem": 8}
    assert (found["kinds"]["poem"]["conclusion"], found["kinds"]["poem"]["low"]) == ("worse", 0.5)
    assert (found["kinds"]["code"]["conclusion"], found["kinds"]["code"]["low"]) == ("no difference shown", None)
    plain = [{"text": "a b", "language": "es"}] * 12
    assert drift({"base": base, "tutor": base}, plain, 7)["kinds"] == {}
    assert drift({"base": base, "tutor": base}, TEXTS, 7)["conclusion"] == "no difference shown"
    json.dumps(drift({"base": [9e9] * 12, "tutor": base}, TEXTS, 7), allow_nan=False)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """The folders that the stage reads, and general.jsonl beside them."""
    made = {name: tmp_path / name for name in ("base", "convert", "ladder")}
    made["convert"].mkdir()
    write_base(made["base"])
    for name, logprob in (("base", -2.0), ("tutor", -3.0)):
        (made["convert"] / f"{name}-Q4_K_M.gguf").write_text(
            json.dumps({"logprob": logprob, "requests": str(tmp_path / f"{name}.requests")}), "utf-8"
        )
    write_rows(tmp_path / "general.jsonl", [{"text": f"Texto número {n}.", "language": "es"} for n in range(7)])
    return made


def recipe(folder: Path, **sections: Any) -> Recipe:
    return Recipe.model_validate({"seed": 5, **sections}).model_copy(update={"path": folder / "r.toml"})


NAMED = {"evaluate": {"general": "general.jsonl"}}


@pytest.mark.usefixtures("llamacpp")
def test_texts_are_scored_by_base_and_tutor(inputs: dict[str, Path], tmp_path: Path) -> None:
    results = run(recipe(tmp_path, **NAMED), inputs, tmp_path)
    general = results["general"]
    assert (general["n"], general["difference"], general["conclusion"]) == (7, 1.0, "worse")
    assert general["tokens"] == 7 * len("Texto número 1.".encode())
    text = "general texts: perplexity 7.39 before and 20.09 after tuning (7 texts): worse"
    assert results["findings"] == [{"conclusion": "worse", "text": text}]
    (inputs["convert"] / "base-Q4_K_M.gguf").unlink()
    with pytest.raises(ArtifactError, match=r"base-Q4_K_M\.gguf is missing; run: tutor convert"):
        run(recipe(tmp_path, **NAMED), inputs, tmp_path)


@pytest.mark.parametrize(
    ("sections", "why"), [({}, "general is not set"), ({**NAMED, "convert": {"base": False}}, "base = false")]
)
def test_without_texts_or_base_nothing_is_scored(
    inputs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, sections: dict[str, Any], why: str
) -> None:
    caplog.set_level("INFO")
    assert run(recipe(tmp_path, **sections), inputs, tmp_path) == {"general": None, "findings": []}
    assert why in caplog.text
