"""The prompt format: equal bytes for every engine, equal ids for training, and a name for each fault of a row."""

import json
import random
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from support.fakes.ollama import CAPABILITY_WORDS
from support.processes.command import ROOT, environment
from support.prompts import PIECES, texts

from tutor.prompt.encoding import encode
from tutor.prompt.messages import Message, conversation, display_text, trim
from tutor.prompt.tutor_format import BOS_PREFIX, CUE, GO_TEMPLATE, STOPS, chat_template, completion, render


def talk(system: str, turns: Sequence[str]) -> list[Message]:
    """Alternating user and assistant turns, after a system text where one is given."""
    roles = ("user", "assistant")
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    return opening + [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)]


conversations = st.builds(talk, st.just("") | texts, st.lists(texts, min_size=1, max_size=6))


JINJA = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
"""Jinja with the options of transformers and llama.cpp."""


def jinja(messages: Sequence[Message], *, add_bos: bool = False) -> str:
    """The text that the tokenizer's template renders."""
    template = JINJA.from_string(chat_template(add_bos=add_bos))
    return template.render(messages=messages, bos_token="<BOS>", add_generation_prompt=True)


def ollama_turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The values of Ollama's legacy loop: a turn ends where its place for the next text is taken."""
    turns = [{"System": "", "Prompt": "", "Response": ""}]
    for message in messages:
        last = turns[-1]
        if (message["role"] == "system" and (last["Prompt"] or last["Response"])) or (
            message["role"] == "user" and last["Response"]
        ):
            turns.append({"System": "", "Prompt": "", "Response": ""})
        name = {"system": "System", "user": "Prompt", "assistant": "Response"}[message["role"]]
        turns[-1][name] = message["content"]
    return turns


def go(template: str, values: Mapping[str, str]) -> str:
    """Render fields and plain ifs as Go's text/template does; GO_TEMPLATE may use nothing else."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    out, visible = [], [True]
    for place, part in enumerate(parts):
        if place % 2 == 0:
            out.append(part if all(visible) else "")
        elif part == "end":
            visible.pop()
        elif part.startswith("if ."):
            visible.append(bool(values[part.removeprefix("if .")]))
        else:
            assert re.fullmatch(r"\.[A-Z][a-z]+", part), f"this evaluator does not know {part!r}"
            out.append(values[part[1:]] if all(visible) else "")
    assert visible == [True]
    return "".join(out)


def ollama(messages: Sequence[Message]) -> str:
    """The prompt of Ollama's legacy form: the template once a turn, the last one cut after .Response."""
    *before, last = ollama_turns(messages)
    head, response, _ = GO_TEMPLATE.partition("{{ .Response }}")
    return "".join(go(GO_TEMPLATE, turn) for turn in before) + go(head + response, last)


# The text


@pytest.mark.parametrize(
    ("given", "trained"),
    [
        ("    return x;\n  y;\n", "    return x;\n  y;"),
        ("\n \n\treturn x;", "\treturn x;"),
        ("\n  return x;", "  return x;"),
        (" Un tipo.\n  Dos.", "Un tipo.\n  Dos."),
        ("\u00a0Un tipo.", "Un tipo."),
        ("\n\nUn tipo.", "Un tipo."),
    ],
)
def test_indentation_of_an_answer_is_trained_and_shown(given, trained, tokenizer):
    assert completion(given) == f" {trained}"
    assert trim(trained) == trained
    assert display_text(completion(given) + "\n") == display_text(f"\n{trained}") == trained
    row = encode(tokenizer, "¿Cómo?", given)
    assert tokenizer.decode(row.ids[row.n_prompt : -1], clean_up_tokenization_spaces=False) == f" {trained}"


def test_prompt_of_a_question_is_as_specified():
    assert render(conversation("¿Qué es any?")) == "Instrucción: ¿Qué es any?\nRespuesta:"
    assert render(conversation("¿Y?", "Sé breve.")) == "Sé breve.\n\nInstrucción: ¿Y?\nRespuesta:"
    assert completion("Un tipo.\n") == " Un tipo."
    assert display_text(" Un tipo.\n") == "Un tipo."
    several = talk("", ["a", " b", "c"])
    assert render(several) == "Instrucción: a\nRespuesta: b\n\nInstrucción: c\nRespuesta:"


@given(conversations)
@example(talk("", ["{{ .System }}", "{{ end }}", "x"]))
@example(talk("\n", ["\n", "\n", "\n"]))
def test_templates_of_all_engines_render_equal_bytes(messages):
    expected = render(messages)
    assert jinja(messages) == expected
    assert ollama(messages) == expected
    assert jinja(messages, add_bos=True) == "<BOS>" + expected


@pytest.fixture(scope="module")
def go_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("go") is None:
        pytest.skip("needs go, which is not on PATH")
    program = tmp_path_factory.mktemp("go") / "render"
    source = ROOT / "tests" / "support" / "go_template" / "main.go"
    offline = environment(GOTOOLCHAIN="local", GOFLAGS="-mod=mod", GOPROXY="off")
    subprocess.run(["go", "build", "-o", program, source], check=True, env=offline)
    return program


def test_go_template_engine_renders_equal_bytes(go_program):
    dice = random.Random(7)
    batch = []
    for _ in range(1000):
        some = ["".join(dice.choices(PIECES, k=dice.randint(1, 5))) for _ in range(dice.randint(1, 7))]
        batch.append(talk(dice.choice(["", dice.choice(PIECES)]), some))
    job = {"template": GO_TEMPLATE, "turns": [ollama_turns(messages) for messages in batch]}
    done = subprocess.run([go_program], input=json.dumps(job).encode(), capture_output=True, check=True)
    assert json.loads(done.stdout) == [render(messages) for messages in batch]


def test_templates_hold_no_capability_word_of_ollama():
    for template in (chat_template(add_bos=True), chat_template(add_bos=False), GO_TEMPLATE):
        assert not [word for word in CAPABILITY_WORDS if word in template]


def test_chat_template_has_bos_at_its_start():
    assert chat_template(add_bos=True) == BOS_PREFIX + chat_template(add_bos=False)
    assert "bos_token" not in chat_template(add_bos=False)


@given(texts)
def test_stop_string_ends_an_answer_before_a_next_question(question):
    assert STOPS[0] in render(talk("", ["a", "b", question]))
    assert all(stop not in completion("Una respuesta.") + CUE for stop in STOPS)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "needs a question"),
        ([{"role": "system", "content": "s"}], "needs a question"),
        ([{"role": "system", "content": ""}, *conversation("a")], "leave it out"),
        ([{"role": "assistant", "content": "a"}], "turn 1 must be from the user, got 'assistant'"),
        (talk("", ["a"]) * 2, "turn 2 must be from the assistant, got 'user'"),
        (talk("s", ["a", "b"]) * 2, "turn 3 must be from the user, got 'system'"),
        ([{"role": "tool", "content": "a"}], "got 'tool'"),
        (talk("", [""]), r"turn 1 \(user\) is empty"),
        (talk("", ["a", "", "b"]), r"turn 2 \(assistant\) is empty"),
    ],
)
def test_render_of_turns_that_ollama_drops_or_joins_raises(messages, expected):
    with pytest.raises(ValueError, match=expected):
        render(messages)
