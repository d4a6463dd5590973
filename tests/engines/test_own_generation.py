"""engines/own_generation.py: sampling that a base states, Ollama's where it does not, room for a thought."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.models.chat_templates import CHATML, OPENS
from support.models.gguf_bytes import facts

from tutor.engines.own_generation import ANSWER_TOKENS, THOUGHT_TOKENS, own_generation
from tutor.engines.protocol import TOP_K
from tutor.formats.models.own_prompt import read_own_prompt
from tutor.recipe.settings import Recipe


def asked(folder: Path, template: str = CHATML, stated: dict[str, Any] | None = None, **generate: Any) -> Any:
    """The settings for a base of these files."""
    (folder / "model").mkdir()
    (folder / "base.json").write_text(json.dumps(asdict(facts())), "utf-8")
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    if stated is not None:
        (folder / "model" / "generation_config.json").write_text(json.dumps(stated), "utf-8")
    own = read_own_prompt(folder)
    return own_generation(folder, Recipe.model_validate({"seed": 7, "generate": generate}), thinks=own.thinks)


@pytest.mark.parametrize("stated", [None, {}, {"eos_token_id": 2}, {"do_sample": False, "temperature": 0.1}])
def test_base_without_sampling_is_asked_as_ollama_does(tmp_path, stated):
    found = asked(tmp_path, stated=stated)
    assert (found.temperature, found.top_p, found.top_k, found.repetition_penalty) == (0.8, 0.9, TOP_K, 1.0)
    assert (found.seed, found.stops, found.repeatable) == (7, (), True)


def test_stated_sampling_is_used_and_completed(tmp_path):
    found = asked(tmp_path, stated={"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05})
    assert (found.temperature, found.top_p, found.top_k, found.repetition_penalty) == (0.6, 0.9, 20, 1.05)


@pytest.mark.parametrize(
    ("template", "tokens", "expected"),
    [(CHATML, 515, ANSWER_TOKENS), (CHATML, 3000, 3000), (OPENS, 515, ANSWER_TOKENS + THOUGHT_TOKENS)],
)
def test_thought_has_room_beside_the_answer(tmp_path, template, tokens, expected):
    assert asked(tmp_path, template, max_new_tokens=tokens).max_new_tokens == expected
