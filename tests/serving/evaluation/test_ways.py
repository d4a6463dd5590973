"""serving/evaluation/ways.py: what the base is asked, in which context, and which ways are left out."""

from pathlib import Path
from typing import Any

import pytest

from tutor.prompt.messages import row_messages
from tutor.recipe.settings import Recipe
from tutor.serving.evaluation.ways import Room, Way, base_ways, fit, system_text

TRAINING = [
    {"instruction": f"¿Qué es {name}?", "response": "Un guiso lento. " * 6, "category": "ab"[n % 2]}
    for n, name in enumerate(
        ("cocido", "fabada", "gazpacho", "salmorejo", "pisto", "escudella", "caldereta", "puchero")
    )
]
PROMPTS = [{"instruction": f"¿Cuánto tarda {name}?", "category": "a"} for name in ("pisto", "fabada")]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe().model_copy(update={"path": tmp_path / "small.toml"})


def words(way: Way, row: Any) -> int:
    return sum(len(message["content"].split()) for message in row_messages(row, way.system))


def test_ways_ask_every_prompt_with_more_and_more_help(recipe: Recipe) -> None:
    ways = base_ways(recipe, PROMPTS, TRAINING, "Sé breve.")
    assert [way.name for way in ways] == [
        "base",
        "base + system text",
        "base + 1 example",
        "base + 3 examples",
        "base + 5 examples",
        "base + 1 similar row",
        "base + 3 similar rows",
        "base + 5 similar rows",
    ]
    asked = [[row_messages(row, way.system) for row in way.prompts] for way in ways]
    assert [len(each[0]) for each in asked] == [1, 2, 3, 7, 11, 3, 7, 11]
    for conversations in asked:
        last = [conversation[-1]["content"] for conversation in conversations]
        assert last == [prompt["instruction"] for prompt in PROMPTS]
    similar = [conversation[8]["content"] for conversation in asked[-1]]
    assert similar == ["¿Qué es pisto?", "¿Qué es fabada?"], "the most similar row stands next to the question"


def test_few_training_rows_are_all_shown(recipe: Recipe) -> None:
    names = [way.name for way in base_ways(recipe, PROMPTS, TRAINING[:4], "Sé breve.")]
    assert names[-4:] == ["base + 1 example", "base + 3 examples", "base + 1 similar row", "base + 3 similar rows"]


def test_way_whose_longest_prompt_does_not_fit_is_left_out(recipe: Recipe) -> None:
    ways = base_ways(recipe, PROMPTS, TRAINING, "Sé breve.")
    longest = max(words(ways[3], row) for row in ways[3].prompts)
    kept, left_out = fit(ways, Room(answer=300, context=256, limit=300 + longest), words)
    assert [way.name for way in kept] == [
        "base",
        "base + system text",
        "base + 1 example",
        "base + 3 examples",
        "base + 3 similar rows",
    ]
    assert set(left_out) == {"base + 5 examples", "base + 5 similar rows"}
    assert "an answer up to 300, more than the base's context of" in left_out["base + 5 examples"]
    assert [way.context for way in kept] == [min(512, 300 + longest)] * 5


def test_base_alone_is_asked_in_any_case(recipe: Recipe) -> None:
    kept, left_out = fit(base_ways(recipe, PROMPTS, TRAINING, "Sé breve."), Room(300, 256, 256), words)
    assert [(way.name, way.context) for way in kept] == [("base", 256)]
    assert len(left_out) == 7


def test_system_text_is_the_recipes_or_the_form_of_the_rows(recipe: Recipe) -> None:
    assert system_text(recipe, TRAINING) == "Answer the question directly, in about 20 words, and stop there."
    code = [{**row, "response": f"{row['response']}\n\n```ts\nlet a = 1;\n```"} for row in TRAINING[:5]]
    assert system_text(recipe, [*code, *TRAINING[5:]]).endswith("Show code in one fenced block marked ts.")
    assert system_text(recipe.model_copy(update={"system": "Eres cocinero."}), TRAINING) == "Eres cocinero."
