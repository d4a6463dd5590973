"""formats/models/own_prompt.py: prompts equal those of transformers; the files in which a base states its template."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
from support.models.chat_templates import CHATML, OPENS
from support.models.families import family_folder
from support.models.tiny_models import base_stage, edit, tiny_folder
from support.shared import copied

from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import read_facts
from tutor.formats.models.own_prompt import read_own_prompt
from tutor.prompt.messages import Message, conversation
from tutor.prompt.own_format import OwnFormat
from tutor.stages.base.tiny_model import CHAT_TEMPLATE, EOS

TURNS: list[Message] = [
    *conversation("¿Qué es <b>?"),
    {"role": "assistant", "content": "Un elemento."},
    *conversation("¿Y <i>?"),
]


def require_same_ids(base: Path, own: OwnFormat) -> None:
    """Compare prompts with those of transformers, as ids: whether BOS is text or the tokenizer's, there is one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(read_facts(base)[1])
    for messages in (conversation("¿Qué es una interfaz?"), TURNS):
        asked: Any = [dict(message) for message in messages]
        expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert tokenizer(own.render(messages))["input_ids"] == list(expected)


@pytest.fixture
def model(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tiny_folder(tmp_path_factory), tmp_path / "model")


@pytest.mark.parametrize("name", ["tiny", "qwen3", "gemma3_text"])
def test_prompts_equal_those_of_transformers(name, tmp_path, tmp_path_factory):
    folder = tiny_folder(tmp_path_factory) if name == "tiny" else family_folder(tmp_path_factory, name)
    base = base_stage(folder, tmp_path / "base")
    require_same_ids(base, read_own_prompt(base))


def test_prompts_of_the_demos_base_equal_those_of_transformers(demo_base):
    own = read_own_prompt(demo_base)
    require_same_ids(demo_base, own)
    assert own.render(conversation("Hola")).endswith("<|im_start|>user\nHola<|im_end|>\n<|im_start|>assistant\n")
    assert (own.end_id, own.thinks) == (2, False)


def test_original_template_opens_its_thought(model, tmp_path):
    own = read_own_prompt(base_stage(model, tmp_path / "base"))
    assert (own.template, own.opened, own.tokens["eos_token"]) == (CHAT_TEMPLATE, True, EOS)


def test_template_is_found_where_transformers_finds_it(model, tmp_path):
    base = base_stage(model, tmp_path / "base")
    edit(model / "tokenizer_config.json", chat_template=[{"name": "default", "template": CHATML}])
    assert read_own_prompt(base).template == CHATML
    (model / "chat_template.jinja").write_text(OPENS, "utf-8")
    assert read_own_prompt(base).template == OPENS


def test_base_without_a_template_is_asked_in_plain_text(model, tmp_path):
    edit(model / "tokenizer_config.json", drop="chat_template")
    assert read_own_prompt(base_stage(model, tmp_path / "base")).render(conversation("Hola")) == "Hola"


def test_special_token_with_properties_is_its_text(model, tmp_path):
    base = base_stage(model, tmp_path / "base")
    edit(model / "tokenizer_config.json", eos_token={"content": "<e>", "special": True}, drop="bos_token")
    own = read_own_prompt(base)
    config = json.loads((tmp_path / "base" / "base.json").read_text("utf-8"))
    assert own.tokens["eos_token"] == "<e>"
    assert own.tokens["bos_token"] == "<｜begin▁of▁sentence｜>", f"of id {config['bos']}"


def test_unusable_template_raises_with_the_folder(model, tmp_path):
    base = base_stage(model, tmp_path / "base")
    edit(model / "tokenizer_config.json", chat_template="{% if %}")
    with pytest.raises(ArtifactError, match=r"model: the base's chat template refuses .*; the base cannot be asked"):
        read_own_prompt(base)
