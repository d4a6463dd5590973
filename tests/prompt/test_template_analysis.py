"""prompt/template_analysis.py, thoughts.py, fixed_template.py: what is found in a template, refused and fixed."""

from dataclasses import replace
from datetime import date
from typing import Any

import pytest
from support.models.chat_templates import (
    BLANKS,
    BOS,
    CHATML,
    DEFAULT_SYSTEM,
    ENDS_TWICE,
    EOS,
    FACTS,
    MODES,
    NO_SYSTEM,
    OPENS,
    SUPPORTED,
    SWITCH,
    TRIMS,
)

from tutor.errors import ArtifactError, RecipeError, TutorError
from tutor.prompt.base_format import BaseFormat
from tutor.prompt.fixed_template import COMMENT, fix_template
from tutor.prompt.jinja import render_template
from tutor.prompt.messages import Message
from tutor.prompt.template_analysis import analyse_template

QUESTION: Message = {"role": "user", "content": "¿Qué?"}
TALK: list[Message] = [QUESTION, {"role": "assistant", "content": "Un tipo."}, {"role": "user", "content": "¿Y?"}]


def analyse(template: str, reasoning: Any = "none", system: str = "") -> BaseFormat:
    return analyse_template(template, FACTS, where="base", reasoning=reasoning, system=system)


def failure(template: str, reasoning: Any = "none", system: str = "", facts: Any = FACTS) -> TutorError:
    with pytest.raises((ArtifactError, RecipeError)) as caught:
        analyse_template(template, facts, where="base", reasoning=reasoning, system=system)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("template", "end", "blanks"),
    [
        (CHATML, "<|im_end|>", ("", "")),
        (OPENS.replace("<think>\n", ""), EOS, ("", "")),
        (NO_SYSTEM, "<end_of_turn>", ("", "")),
        (BLANKS, EOS, (" ", " ")),
        (ENDS_TWICE, "<|end|>", ("", "")),
        (
            CHATML.replace("'<|im_end|>\n'", "('' if loop.last and message.role == 'assistant' else '<|im_end|>\n')"),
            "<|im_end|>",
            ("", ""),
        ),
    ],
)
def test_end_token_and_blanks_of_an_answer_are_found(template, end, blanks):
    found = analyse(template)
    assert (found.end, found.end_id, found.lead, found.tail) == (end, FACTS.added[end], *blanks)


def test_longest_token_at_the_end_of_an_answer_counts():
    longer = replace(FACTS, added={**FACTS.added, "<|im_end|>\n": 7, "<": 8})
    assert analyse_template(CHATML, longer, where="base", reasoning="none").end_id == 7


def test_place_for_a_system_text_is_found():
    assert {analyse(template).system for template in (CHATML, DEFAULT_SYSTEM, BLANKS, TRIMS)} == {True}
    assert not analyse(NO_SYSTEM).system
    assert not analyse(CHATML.replace("message in messages", "message in messages if message.role != 'system'")).system
    refused = failure(NO_SYSTEM, system="Sé breve.")
    assert isinstance(refused, RecipeError)
    assert "no place for one (System role not supported); remove system" in str(refused)
    assert analyse(CHATML, system="Sé breve.").system


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for %}", "cannot be used: Expected an expression"),
        (CHATML.replace("'<|im_end|>\n'", "'\n\n'"), r"ends an answer with '\n\n', which is no token of its tokenizer"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "changes questions: 'Pregunta <1>"),
        (CHATML.replace("message['content']", "message['content'] | e"), "changes questions"),
        (
            CHATML.replace("message['content']", "message['content'].replace('Una', 'La')"),
            "changes answers: 'Una respuesta",
        ),
        (
            CHATML.replace("message in messages", "message in messages[-1:] if add_generation_prompt"),
            "changes questions",
        ),
        (CHATML.replace("in messages", "in messages[-2:]"), "changes earlier turns: 'Otra pregunta.' is not in"),
        (
            CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>tutor\n'"),
            r"'<|im_end|>\n<|im_start|>assistant\n' in a conversation, '<|im_end|>\n<|im_start|>tutor\n' in a prompt",
        ),
        (
            CHATML.replace("<|im_start|>assistant\n'", "<|im_start|>assistant\n' + ('>' if messages[1] else '')"),
            r"ends a later prompt with '<|im_end|>\n<|im_start|>assistant\n>', the first with",
        ),
        (
            CHATML.replace("assistant\n'", "assistant\n' + ('>' if messages[0].role == 'system' else '')"),
            "ends a prompt with a system text in another way",
        ),
        ("{{ bos_token }}" * 2 + CHATML, f"writes {BOS} twice"),
        ("{{ now }}" + CHATML, None),
        ("{{ tools is defined }}" + CHATML, "depends on what an engine passes to it: 'False<|im_start|>"),
        ("{{ pad_token is defined }}" + CHATML, None),
        ("{{ strftime_now('%' + 'd') }}" + CHATML, "it computes the format of today's date"),
        ("{{ raise_exception('no') }}" + CHATML, "cannot be used: no"),
        ("Llama a strftime_now('%Y').\n" + CHATML, 'cannot have fixed values: \'Llama a "2024"'),
    ],
)
def test_template_that_cannot_be_served_as_trained_is_refused(template, expected):
    if expected is None:
        assert analyse(template)
        return
    refused = failure(template)
    assert isinstance(refused, ArtifactError)
    assert expected in str(refused)
    assert refused.hint == 'set prompt = "tutor", or name another base'


# Thoughts


@pytest.mark.parametrize(
    ("template", "reasoning", "expected"),
    [
        (OPENS, "none", """<think>\\n': rows without thoughts would be answers within it; set reasoning = "empty\""""),
        (
            CHATML,
            "empty",
            'needs a template with thoughts, and the chat template of base has none; set reasoning = "none"',
        ),
        (CHATML, "rows", 'reasoning = "rows" needs a template with thoughts'),
        (MODES.replace("<think>\\n\\n</think>\\n", "{#- <think></think> #}"), "empty", "has no switch"),
        (SWITCH.replace("is false", "in [true, false]"), "rows", "end behind a thought"),
    ],
)
def test_reasoning_that_does_not_fit_a_template_is_refused(template, reasoning, expected):
    refused = failure(template, reasoning)
    assert isinstance(refused, RecipeError)
    assert expected in str(refused)


def test_thought_in_an_unknown_form_is_refused():
    refused = failure(SWITCH.replace("'\\n</think>\\n\\n'", "'\\n</think> Final: '"), "rows")
    assert isinstance(refused, ArtifactError)
    assert "in an unknown form" in str(refused)
    assert "'\\n</think> Final: ' behind it" in str(refused)


def test_thought_is_written_as_the_template_shows_it():
    plain = SWITCH.replace("<think>\\n", "<think>").replace("\\n</think>\\n\\n", "</think> ")
    found = analyse(plain, "rows")
    assert (found.opening, found.closing, found.opened) == ("<think>", "</think> ", False)
    opened = analyse(OPENS.replace("<think>\n", "<think>"), "rows")
    assert (opened.opening, opened.closing, opened.opened) == ("\n", "\n</think>\n\n", True)
    assert analyse(OPENS.replace("<think>\n", "<think>"), "empty").render([QUESTION]).endswith("<think>\n\n</think>")


# What is fixed


@pytest.mark.parametrize("names", SUPPORTED)
def test_prompt_is_the_same_whatever_an_engine_passes(names):
    prompt = analyse(SUPPORTED[names], names[1])
    expected = render_template(prompt.template, TALK, add_generation_prompt=True)
    for thinks in (True, False, None):
        for day in (date(2026, 12, 1), date(2027, 1, 2)):
            given = {"enable_thinking": thinks, "date_string": f"{day:%d %b %Y}", "preserve_thinking": True}
            tokens = {"bos_token": "<other>", "eos_token": prompt.end}
            found = render_template(prompt.template, TALK, day=day, add_generation_prompt=True, **given, **tokens)
            assert found == expected


@pytest.mark.parametrize("names", SUPPORTED)
def test_fixed_template_renders_what_the_base_s_renders(names):
    """Without a switch or a date, only the closed thought differs."""
    template, reasoning = SUPPORTED[names], names[1]
    prompt = analyse(template, reasoning)
    given = {"add_generation_prompt": True, "bos_token": BOS, "eos_token": EOS, "enable_thinking": reasoning == "rows"}
    for messages in ([QUESTION], TALK):
        expected = render_template(template, messages, day=date(2024, 7, 26), **given)
        found = render_template(prompt.template, messages, add_generation_prompt=True)
        assert found.removeprefix(expected) == ("\n</think>" if names == ("OPENS", "empty") else "")


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n  ", "{# nota #}\n", "text\n", "{%- if true %}x{% endif %}"])
@pytest.mark.parametrize("finish", ["", "\n", "\n\n", "  \n", " fin", "{% if true %}\n{% endif %}\n", "\r\n"])
def test_blanks_at_both_ends_of_a_template_stay(start, finish):
    template = f"{start}{{% for m in messages %}}\n  {{{{ m.content }}}}\n{{% endfor %}}{finish}"
    expected = render_template(template, TALK, x=1)
    assert render_template(fix_template(template, {"x": True}), TALK) == expected
    assert render_template(fix_template(template, {}), TALK) == expected
    closed = fix_template(template, {}, "\n</think>")
    assert render_template(closed, TALK) == expected
    assert render_template(closed, TALK, add_generation_prompt=True) == expected + "\n</think>"


def test_date_of_a_prompt_is_fixed():
    assert "Today Date: 26 July 2024" in analyse(MODES).render([QUESTION])
    assert "Today Date: 26 Jul 2024" in analyse(TRIMS).render([QUESTION])
    assert "strftime_now(" not in analyse(MODES).template


def test_comment_keeps_ollama_from_knowing_a_template():
    """Ollama replaces a template less than 100 characters away from a known one, and searches for these words."""
    assert len(COMMENT) > 200
    for word in ("tools", "tool_call", "<think>", "</think>", "reasoning_content", "{{", "{%"):
        assert word not in COMMENT
    assert analyse(CHATML).template.startswith(COMMENT)
    assert analyse(CHATML).template.endswith(CHATML)
