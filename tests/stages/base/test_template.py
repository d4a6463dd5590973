"""stages/base/template.py and end_token.py: a base's template against its own tokenizer and weights."""

import logging
from pathlib import Path
from typing import Any

import pytest
from support.models.chat_templates import MODES, OPENS, SWITCH
from support.models.tiny_models import edit, recipe, tensors
from support.shared import copied

torch = pytest.importorskip("torch")
from safetensors.torch import save_file
from support.models.families import family_folder

from tutor.errors import ArtifactError, RecipeError
from tutor.formats.models.model_folder import load_tokenizer
from tutor.prompt.base_format import BaseFormat
from tutor.prompt.encoding import RowEncoder, audit
from tutor.stages.base.end_token import FACTOR, check_end_row
from tutor.stages.base.stage import facts_of
from tutor.stages.base.template import prompt_facts

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")
ENDS = ("<|eot_id|>", "<|im_end|>", "<|im_end|>", "</s>", "<end_of_turn>")
EMBEDDING = "model.embed_tokens.weight"
ROW = {
    "history": [{"role": "user", "content": "¿Qué es?"}, {"role": "assistant", "content": "Un tipo.\n"}],
    "instruction": "¿Y la unión?",
    "response": " Otro tipo.",
}


def found_in(model: Path, **top: Any) -> BaseFormat:
    asked = recipe(model / "r.toml").model_copy(update={"prompt": "base", "system": "", **top})
    return BaseFormat.from_json(prompt_facts(asked, model, facts_of(model, "path:x", "model")))


def folder_of(factory: pytest.TempPathFactory, name: str) -> Path:
    """A copy of a family's tiny model."""
    return copied(family_folder(factory, name), factory.mktemp("changed") / "model")


@pytest.mark.parametrize(("name", "end"), list(zip(FAMILIES, ENDS, strict=True)))
def test_template_of_a_family_is_trained_as_served(tmp_path_factory, name, end):
    model = family_folder(tmp_path_factory, name)
    prompt, tokenizer = found_in(model), load_tokenizer(model)
    assert (prompt.end, prompt.end_id) == (end, tokenizer.convert_tokens_to_ids(end))
    encoded = RowEncoder(tokenizer, prompt, "Sé breve.").encode(ROW)
    assert sum(len(row.answers()) for row in encoded) == 2
    for row in encoded:
        served = row.ids[: row.n_prompt]
        assert audit(row, served, tokenizer, prompt) == []
        assert row.ids[-1] == prompt.end_id
    template = prompt.chat_template(add_bos=prompt.add_bos)
    talk = [{"role": "system", "content": "Sé breve."}, {"role": "user", "content": "¿Qué es?"}]
    applied = tokenizer.apply_chat_template(talk, chat_template=template, add_generation_prompt=True, return_dict=False)
    assert encoded[0].ids[: encoded[0].n_prompt] == list(applied)


def test_thoughts_of_rows_are_supervised(tmp_path_factory):
    model = folder_of(tmp_path_factory, "qwen3")
    edit(model / "tokenizer_config.json", chat_template=SWITCH)
    prompt, tokenizer = found_in(model, reasoning="rows"), load_tokenizer(model)
    [first, last] = RowEncoder(tokenizer, prompt).encode({**ROW, "reasoning": "Pienso."})
    assert tokenizer.decode(last.answers()[0][1]) == "<think>\nPienso.\n</think>\n\nOtro tipo.<|im_end|>"
    assert tokenizer.decode(first.answers()[0][1]) == "<think>\n\n</think>\n\nUn tipo.<|im_end|>"
    assert tokenizer.decode(last.answers()[0][0]).endswith(
        "assistant\nUn tipo.<|im_end|>\n"
        + tokenizer.decode(tokenizer("<|im_start|>user\n¿Y la unión?<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    )


def test_recipe_that_does_not_fit_the_template_is_refused(model):
    edit(model / "tokenizer_config.json", chat_template=OPENS)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(RecipeError, match='set reasoning = "empty"'):
        found_in(model)
    assert found_in(model, reasoning="empty").end == "<｜end▁of▁sentence｜>"
    edit(model / "tokenizer_config.json", chat_template=OPENS.replace("{{ ns.system }}", ""))
    with pytest.raises(RecipeError, match="remove system"):
        found_in(model, reasoning="empty", system="Sé breve.")


@pytest.mark.parametrize("found", [None, "", {"tool_use": OPENS}])
def test_base_without_a_chat_template_is_refused(model, found):
    given = [{"name": name, "template": text} for name, text in found.items()] if isinstance(found, dict) else found
    edit(model / "tokenizer_config.json", chat_template=given)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ArtifactError, match=r'has no chat template.*set prompt = "tutor"'):
        found_in(model)


def test_default_template_of_several_is_used(model):
    given = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": OPENS}]
    edit(model / "tokenizer_config.json", chat_template=given)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    assert found_in(model, reasoning="rows").template.endswith(OPENS)


def test_prompt_of_the_tutor_needs_no_template(model):
    assert prompt_facts(recipe(model / "r.toml"), model, facts_of(model, "path:x", "model")) == {}


def test_fixed_date_is_reported(tmp_path_factory, caplog):
    model = folder_of(tmp_path_factory, "smollm3")
    edit(model / "tokenizer_config.json", chat_template=MODES)
    with caplog.at_level(logging.INFO):
        found_in(model)
    assert "its prompts name the date, which is 2024-07-26 in training and in serving" in caplog.text


# The rows of the end-of-turn token


def change_row(model: Path, tensor: str, change: Any) -> None:
    weights = tensors(model)
    change(weights[tensor])
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tensor", [EMBEDDING, "lm_head.weight"])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows, row: rows[row].zero_(), "the norm of row {row} is 0"),
        (lambda rows, row: rows[row].fill_(float("nan")), "the norm of row {row} is nan"),
        (lambda rows, row: rows[row].mul_(4 * FACTOR), "the median of all "),
        (lambda rows, row: rows[row].div_(4 * FACTOR), "the median of all "),
        (lambda rows, row: rows[row].copy_(1.01 * rows[9]), "row {row} is the same as row 9"),
    ],
    ids=["zero", "nan", "large", "small", "equal"],
)
def test_end_token_that_was_never_trained_is_refused(tmp_path_factory, tensor, change, expected):
    model = folder_of(tmp_path_factory, "llama")
    prompt = found_in(model)
    change_row(model, tensor, lambda rows: change(rows, prompt.end_id))
    with pytest.raises(ArtifactError) as caught:
        check_end_row(model, prompt)
    assert f"was never trained on <|eot_id|>, with which its chat template ends an answer ({tensor}: " in str(
        caught.value
    )
    assert expected.format(row=prompt.end_id) in str(caught.value)
    assert caught.value.hint == 'name the instruction-tuned model as base, or set prompt = "tutor"'


def test_other_rows_may_be_untrained(tmp_path_factory):
    model = folder_of(tmp_path_factory, "qwen2")
    prompt = found_in(model)
    change_row(model, EMBEDDING, lambda rows: rows[:700].zero_())
    check_end_row(model, prompt)
