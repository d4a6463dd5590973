"""prompt/base_format.py and jinja.py: the base's template renders as in transformers, answers continue its prompts."""

import importlib.util
import json
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.chat_templates import BOS, CHATML, EOS, FACTS, MODES, OPENS, SUPPORTED, SWITCH, TRIMS
from support.prompts import texts

from tutor.prompt.base_format import BaseFormat
from tutor.prompt.format import SplitAnswer
from tutor.prompt.jinja import TemplateError, calls_clock, literal, render_template, template_names
from tutor.prompt.messages import Message
from tutor.prompt.template_analysis import analyse_template

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
QUESTION: Message = {"role": "user", "content": "¿Qué?"}
ANSWER: Message = {"role": "assistant", "content": " Un tipo. \n", "reasoning": "\nPienso.\n"}
TALK: list[Message] = [QUESTION, {"role": "assistant", "content": "Un tipo."}, {"role": "user", "content": "¿Y?"}]
SYSTEM: Message = {"role": "system", "content": "Sé breve."}


def base_format(template: str, reasoning: Any = "none") -> BaseFormat:
    return analyse_template(template, FACTS, where="base", reasoning=reasoning)


FORMATS = {" ".join(names): base_format(template, names[1]) for names, template in SUPPORTED.items()}
every_format = pytest.mark.parametrize("prompt", FORMATS.values(), ids=FORMATS)


def rendered_by_transformers(template: str, messages: list[Message], **given_: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    found, _ = render_jinja_template([messages], chat_template=template, **given_)
    return str(found[0])


# The renderer


@needs_transformers
@pytest.mark.parametrize("template", sorted(set(SUPPORTED.values())))
@pytest.mark.parametrize("generates", [True, False])
@pytest.mark.parametrize("switch", [{}, {"enable_thinking": False}])
def test_templates_render_as_transformers_renders_them(template, generates, switch):
    given_ = {"add_generation_prompt": generates, "bos_token": BOS, "eos_token": EOS, **switch}
    last: Message = {"role": "assistant", "content": "Fin.", "reasoning_content": "Pienso."}
    for messages in ([QUESTION], TALK, [*TALK, last]):
        expected = rendered_by_transformers(template, messages, **given_)
        variables = {**given_, "tools": None, "documents": None}
        assert render_template(template, messages, day=date.today(), **variables) == expected


@needs_transformers
@given(st.dictionaries(texts, texts | st.integers() | st.lists(texts)))
@settings(max_examples=20)
def test_tojson_and_sandbox_render_as_in_transformers(value):
    template = (
        "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% break %}{% endfor %}{{ x | tojson }}"
    )
    assert render_template(template, [value], x=value) == rendered_by_transformers(template, [value], x=value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "Expected an expression"),
        ("{{ raise_exception('sin sistema') }}", "sin sistema"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "no attribute _x"),
        ("{{ messages.append(1) }}", "attribute 'append' of 'list' object is unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ strftime_now('%Y') }}", "'strftime_now' is undefined"),
    ],
)
def test_template_that_fails_gives_its_reason(template, reason):
    with pytest.raises(TemplateError, match=reason):
        render_template(template, [QUESTION])


def test_names_and_clock_of_a_template_are_found():
    assert {"messages", "enable_thinking", "strftime_now"} <= template_names(MODES)
    assert "today" in template_names(MODES)
    assert calls_clock(MODES)
    assert not calls_clock(CHATML)
    with pytest.raises(TemplateError):
        template_names("{% if %}")
    assert render_template("{{ %s }}" % literal('a"\\\n<>ñ'), []) == 'a"\\\n<>ñ'  # noqa: UP031


# Prompts and completions


@every_format
def test_prompt_and_completion_are_the_served_text(prompt):
    """What is trained is what the template writes, up to the end token, but for the thought of a last answer."""
    whole = BOS * (prompt.add_bos and prompt.writes_bos)
    whole += prompt.render([QUESTION]) + prompt.completion(ANSWER) + prompt.end
    message = {**ANSWER, "content": "Un tipo.", "reasoning": "Pienso."}
    if prompt.reasoning != "rows":
        del message["reasoning"]
    written = render_template(prompt.template, [QUESTION, message], add_generation_prompt=False)
    assert [text.strip() for text in (whole, written) if "Un tipo." not in text] == []
    if prompt.tags == ("", "") or "reasoning_content" in prompt.template:
        assert written.startswith(whole)


def test_prompt_of_each_template_ends_as_specified():
    ends = {name: prompt.render([QUESTION]).rpartition("¿Qué?")[2] for name, prompt in FORMATS.items()}
    assistant = "<|im_end|>\n<|im_start|>assistant\n"
    assert ends["CHATML none"] == ends["SWITCH rows"] == ends["MODES rows"] == assistant
    assert ends["SWITCH none"] == ends["SWITCH empty"] == f"{assistant}<think>\n\n</think>\n\n"
    assert ends["MODES none"] == f"{assistant}<think>\n\n</think>\n"
    assert ends["OPENS empty"] == "<｜Assistant｜><think>\n\n</think>"
    assert ends["OPENS rows"] == "<｜Assistant｜><think>\n"
    assert ends["BLANKS none"] == " [/INST]"


def test_completion_of_each_template_is_as_specified():
    written = {name: prompt.completion(ANSWER) for name, prompt in FORMATS.items()}
    assert written["SWITCH rows"] == "<think>\nPienso.\n</think>\n\nUn tipo."
    assert written["MODES rows"] == "<think>\nPienso.\n</think>\nUn tipo."
    assert written["OPENS rows"] == "Pienso.\n</think>\n\nUn tipo."
    assert written["BLANKS none"] == " Un tipo. "
    others = [text for name, text in written.items() if "rows" not in name and "BLANKS" not in name]
    assert set(others) == {"Un tipo."}
    without = {"role": "assistant", "content": "Un tipo."}
    assert FORMATS["SWITCH rows"].completion(without) == "<think>\n\n</think>\n\nUn tipo."
    assert FORMATS["OPENS rows"].completion(without) == "\n</think>\n\nUn tipo."


def test_bos_is_left_to_a_tokenizer_that_adds_it():
    assert FORMATS["OPENS rows"].render([QUESTION]) == "<｜User｜>¿Qué?<｜Assistant｜><think>\n"
    assert FORMATS["OPENS rows"].chat_template(add_bos=True) == FORMATS["OPENS rows"].template
    silent = analyse_template(OPENS, replace(FACTS, add_bos=False), where="base", reasoning="rows")
    assert silent.render([QUESTION]).startswith(f"{BOS}<｜User｜>")
    chatml = FORMATS["CHATML none"]
    assert not chatml.render([QUESTION]).startswith(BOS)
    for add_bos in (True, False):
        written = render_template(chatml.chat_template(add_bos=add_bos), [QUESTION], add_generation_prompt=True)
        assert written == BOS * add_bos + chatml.render([QUESTION])


@every_format
def test_history_is_rendered_without_thoughts_of_earlier_turns(prompt):
    answer = prompt.history(ANSWER)
    assert answer == {"role": "assistant", "content": "Un tipo."}
    assert "Pienso" not in prompt.render([QUESTION, answer, QUESTION])
    assert prompt.render([QUESTION, answer, QUESTION]) == prompt.render([TALK[0], TALK[1], QUESTION])


@every_format
def test_conversation_that_cannot_be_served_is_refused(prompt):
    with pytest.raises(ValueError, match="turn 2 must be from the assistant"):
        prompt.render([QUESTION, QUESTION])
    begun = [QUESTION, {"role": "assistant", "content": "Un"}]
    if prompt.prefill:
        assert prompt.render(begun) == prompt.render([QUESTION]) + "Un"
    else:
        with pytest.raises(ValueError, match="engines continue an answer"):
            prompt.render(begun)
    if prompt.system:
        assert "Sé breve." in prompt.render([SYSTEM, QUESTION])
    else:
        with pytest.raises(ValueError, match="no place for a system text"):
            prompt.render([SYSTEM, QUESTION])


# Generated texts


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("CHATML none", "Un tipo.", ("", "Un tipo.")),
        ("CHATML none", "<think>\na</think>b", ("", "<think>\na</think>b")),
        ("BLANKS none", "  Un\n tipo. ", ("", " Un\n tipo.")),
        ("SWITCH none", "Un tipo.", ("", "Un tipo.")),
        ("SWITCH none", "<think>\na\n</think>\n\nb", ("a", "b")),
        ("SWITCH rows", "<think>\n\n</think>\n\n  b\n", ("", "  b\n")),
        ("SWITCH rows", "\n<think>a", ("a", "")),
        ("SWITCH rows", "sin pensar", ("", "sin pensar")),
        ("OPENS rows", "a\nb\n</think>\n\nc", ("a\nb", "c")),
        ("OPENS rows", "a </think> b </think>", ("a", " b </think>")),
        ("OPENS rows", "a sin fin", ("a sin fin", "")),
        ("OPENS rows", "<think>\na</think>b", ("a", "b")),
        ("OPENS empty", "b", ("", "b")),
        ("OPENS rows", "", ("", "")),
    ],
)
def test_reply_separates_thought_and_answer(name, text, expected):
    assert FORMATS[name].reply(text) == SplitAnswer(*expected)


@every_format
def test_reply_gives_back_what_was_trained(prompt):
    thought = "Pienso." if prompt.reasoning == "rows" else ""
    assert prompt.reply(prompt.completion(ANSWER)) == SplitAnswer(thought, "Un tipo.")


def test_format_is_stored_as_json():
    for prompt in FORMATS.values():
        assert BaseFormat.from_json(json.loads(json.dumps(prompt.to_json()))) == prompt
        assert (prompt.kind, prompt.stops, prompt.go_template) == ("base", (), "")


def test_think_is_sent_where_ollama_finds_tags():
    expected = {"SWITCH rows": True, "OPENS rows": True, "MODES rows": True, "SWITCH none": False, "OPENS empty": False}
    assert {name: FORMATS[name].think for name in expected} == expected
    assert FORMATS["TRIMS none"].think is None


def test_blanks_of_texts_are_the_template_s():
    assert base_format(TRIMS).render([{"role": "user", "content": " a \n"}]).count("\n\na<|eot_id|>") == 1
    assert base_format(SWITCH).render([{"role": "user", "content": " a \n"}]).count("\n a \n<|im_end|>") == 1
