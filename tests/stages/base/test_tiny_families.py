"""stages/base/tiny_families.py, tiny_sentencepiece.py and tiny_templates.py: tiny models that transformers loads."""

import json
from pathlib import Path

import pytest
from support.models.families import FAMILIES, VOCABULARY, family_folder
from support.models.tiny_models import tensors

from tutor.formats.architectures import ARCHITECTURES
from tutor.recipe.settings import Recipe
from tutor.stages.base.stage import facts_of
from tutor.stages.base.template import prompt_facts
from tutor.stages.base.tiny_families import make_family

transformers = pytest.importorskip("transformers")


def test_every_family_of_the_table_has_a_tiny_model() -> None:
    assert {family.model_type for family in FAMILIES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_model_loads_and_its_template_holds_the_texts(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = family_folder(tmp_path_factory, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == ARCHITECTURES[FAMILIES[name].model_type].class_name
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY > len(tokenizer)
    messages = [{"role": "user", "content": "¿Qué es 3?"}, {"role": "assistant", "content": "Un número."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert 0 < text.index("¿Qué es 3?") < text.index("Un número.")
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_another_seed_changes_weights_and_no_other_file(tmp_path: Path) -> None:
    one, two = (make_family(tmp_path / str(seed), "qwen2", "uno dos tres", seed) for seed in (1, 2))
    assert not tensors(one)["model.norm.weight"].equal(tensors(two)["model.norm.weight"])
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((one / name).read_text("utf-8")) == json.loads((two / name).read_text("utf-8"))


@pytest.mark.parametrize(
    ("name", "reasoning"), [(name, each) for name, family in FAMILIES.items() for each in family.reasonings]
)
def test_template_fits_each_reasoning_that_it_names(
    tmp_path_factory: pytest.TempPathFactory, name: str, reasoning: str
) -> None:
    folder = family_folder(tmp_path_factory, name)
    recipe = Recipe.model_validate({"prompt": "base", "reasoning": reasoning})
    assert prompt_facts(recipe, folder, facts_of(folder, "path:x", "model"))["reasoning"] == reasoning
