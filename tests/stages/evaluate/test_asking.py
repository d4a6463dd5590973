"""stages/evaluate/asking.py: how each model is asked, in values and in words."""

from pathlib import Path
from typing import Any

import pytest
from support.fakes.llamacpp_answers import write_base

from tutor.prompt.tutor_format import TUTOR
from tutor.recipe.settings import Recipe
from tutor.stages.evaluate.asking import asking


def recipe(**settings: Any) -> Recipe:
    return Recipe.model_validate({"seed": 5, **settings})


@pytest.mark.parametrize("model", ["tutor", "base-as-tutor", "adapter"])
def test_all_but_the_base_are_asked_as_the_tutor(tmp_path: Path, model: str) -> None:
    write_base(tmp_path)
    found = asking(recipe(system="Eres un tutor."), tmp_path, model)
    assert (found.prompt, found.system, found.line) == (TUTOR, "Eres un tutor.", "")
    assert found.text == (
        "the tutor's prompt, with the recipe's system text; greedy, repetition penalty 1.15, at most 515 tokens"
    )


def test_base_has_its_template_its_sampling_and_a_line(tmp_path: Path) -> None:
    write_base(tmp_path)
    (tmp_path / "model" / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95}', "utf-8")
    found = asking(recipe(system="Eres un tutor.", data={"language": "pt"}), tmp_path, "base")
    assert (found.system, found.line, found.generation.seed) == ("", "Responde em português.", 5)
    assert found.text == (
        "its own chat template, with «Responde em português.»; temperature 0.6, top_p 0.95, top_k 40, "
        "no repetition penalty, at most 1024 tokens"
    )


def test_base_without_a_template_is_named_so(tmp_path: Path) -> None:
    write_base(tmp_path, template="")
    text = asking(recipe(data={"language": "any"}), tmp_path, "base").text
    assert text.startswith("the plain question, because it has no chat template; temperature 0.8")
