"""The prompt format: equal bytes for every engine, equal ids for training, and a name for each fault of a row."""

import json
import random
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from support.fakes.ollama import CAPABILITY_WORDS
from support.models.small_tokenizer import BOS, EOS, SENTENCES, make_tokenizer
from support.processes.command import ROOT, environment

from tutor.errors import DataError
from tutor.prompt import (
    BOS_PREFIX,
    CUE,
    GO_TEMPLATE,
    STOPS,
    Encoded,
    Message,
    adds_bos,
    audit,
    chat_template,
    completion,
    conversation,
    display_text,
    encode,
    render,
    trim,
)

PIECES = (
    *("¿Qué es una interfaz?", "ñandú", "ÁÉÍÓÚ ü", "👩‍💻🇪🇸", "e\u0301", "«comillas»", '"""', "'", "\\n", "\\"),
    *("```ts\nlet x: number = 1;\n```", "if (a < b && c > d) {\n\treturn `${a}`;\n}", "<b>&amp;</b>", "array[0][1]"),
    *("{{ .Prompt }}", "{{ messages }}", "{% raw %}", "{# nota #}", "{{", "}}", "[[ x ]]", "%}", "{%- endfor -%}"),
    *("<｜User｜>", "<｜end▁of▁sentence｜>", "<|im_end|>", "</think>", "<think>", "<tool_call>", "[INST]"),
    *(
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "  ",
        "\u00a0",
        "\u2028",
        "\x00",
        "\nInstrucción: otra",
        "\nRespuesta:",
        "Respuesta:",
    ),
)
texts = st.lists(st.sampled_from(PIECES) | st.text(), min_size=1).map("".join).filter(bool)


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


# Ids and loss


def served(tokenizer: Any, question: str, system: str = "") -> list[int]:
    """The ids that an engine sends: the tokenized rendered text."""
    return list(tokenizer(render(conversation(question, system)))["input_ids"])


@given(system=st.sampled_from(["", "Eres un tutor."]), question=texts, answer=texts.filter(str.strip))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_encoded_row_is_served_prompt_then_answer_then_eos(tokenizer, system, question, answer):
    row = encode(tokenizer, question, answer, system)
    prompt = served(tokenizer, question, system)
    assert row.ids[: row.n_prompt] == prompt
    assert row.mask == [0] * len(prompt) + [1] * (len(row.ids) - len(prompt))
    assert row.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.ids[row.n_prompt : -1]) == f" {trim(answer)}"


def test_encoded_row_has_one_bos_if_the_tokenizer_adds_bos(tokenizer):
    row = encode(tokenizer, "¿Qué es any?", "Un tipo.", "Eres un tutor.")
    assert row.ids.count(tokenizer.bos_token_id) == int(adds_bos(tokenizer))
    assert row.ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("system", ["", "Eres un tutor."])
def test_apply_chat_template_returns_the_trained_ids(tokenizer, system):
    tokenizer.chat_template = chat_template(add_bos=adds_bos(tokenizer))
    for question in (*SENTENCES, "{{ bos_token }} 👩‍💻"):
        messages = conversation(question, system)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        row = encode(tokenizer, question, "Sí.", system)
        assert list(ids) == row.ids[: row.n_prompt]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == (BOS if adds_bos(tokenizer) else "") + render(messages)


words = st.lists(st.sampled_from(" ".join(SENTENCES).split()), min_size=1).map(" ".join)


@given(question=words, answer=words | words.map(lambda text: f"```ts\n{text}\n```"))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_encoded_row_has_the_tokens_of_the_whole_text(tokenizer, question, answer):
    """A served prompt and its answer have the tokens of the text tokenized in one piece."""
    whole = tokenizer(render(conversation(question)) + completion(answer))["input_ids"]
    assert encode(tokenizer, question, answer).ids[:-1] == whole


def test_encode_without_an_eos_token_raises():
    made = make_tokenizer(add_bos=True)
    made.eos_token = None
    with pytest.raises(DataError, match="has no EOS token"):
        encode(made, "a", "b")


def test_adds_bos_measures_the_tokenizer_not_its_config():
    made = make_tokenizer(add_bos=False)
    made.init_kwargs["add_bos_token"] = True
    assert not adds_bos(made)


# The audit


def test_audit_of_an_encoded_row_finds_no_fault(tokenizer):
    for question in SENTENCES:
        assert audit(encode(tokenizer, question, "Sí."), served(tokenizer, question), tokenizer) == []


MISSING = "EOS is not supervised at the end"
OTHER = "the served prompt is not a prefix of the row"


@pytest.mark.parametrize(
    ("breach", "expected"),
    [
        (lambda ids, mask, eos: (ids[:-1], mask[:-1]), [MISSING]),
        (lambda ids, mask, eos: (ids, [*mask[:-1], 0]), [MISSING]),
        (lambda ids, mask, eos: (ids, [on and int(i != eos) for i, on in zip(ids, mask, strict=True)]), [MISSING]),
        (lambda ids, mask, eos: ([*ids, 5], [*mask, 1]), [MISSING]),
        (lambda ids, mask, eos: ([*ids, 5], [*mask, 0]), [MISSING]),
        (lambda ids, mask, eos: ([*ids, eos], [*mask, 1]), ["EOS is supervised more than once"]),
        (lambda ids, mask, eos: (ids, [*mask[:-2], 0, 1]), ["part of the completion carries no loss"]),
        (lambda ids, mask, eos: (ids, [0] * len(mask)), ["no token carries loss"]),
        (lambda ids, mask, eos: ([], []), ["no token carries loss"]),
        (lambda ids, mask, eos: (ids, [1] * len(mask)), [OTHER]),
        (lambda ids, mask, eos: ([*ids[:3], 5, *ids[3:]], [0, *mask]), [OTHER]),
        (lambda ids, mask, eos: (ids[:2] + ids[3:], mask[1:]), [OTHER]),
    ],
    ids=[
        *("EOS cut away", "EOS masked", "EOS masked as pad", "something behind EOS", "padding behind EOS", "EOS twice"),
        *("a hole", "all masked", "no ids", "loss on the prompt", "a token more", "a token less"),
    ],
)
def test_audit_names_each_fault_of_a_row(tokenizer, breach, expected):
    row = encode(tokenizer, "¿Qué es any?", "Un tipo que lo es todo.")
    assert 5 not in row.ids[:4]
    found = audit(
        Encoded(*breach(row.ids, row.mask, tokenizer.eos_token_id)), served(tokenizer, "¿Qué es any?"), tokenizer
    )
    assert found == expected


def test_audit_names_a_wrong_number_of_bos(tokenizer):
    row = encode(tokenizer, "a", "b")
    prompt = served(tokenizer, "a")
    expected = int(adds_bos(tokenizer))
    doubled = Encoded([tokenizer.bos_token_id, *row.ids], [0, *row.mask])
    assert audit(doubled, prompt, tokenizer) == [f"{expected + 1} BOS tokens instead of {expected}", OTHER]
    # A trainer and an engine that both add one BOS too many agree with each other.
    assert audit(doubled, [tokenizer.bos_token_id, *prompt], tokenizer) == [
        f"{expected + 1} BOS tokens instead of {expected}"
    ]
    if expected:
        without = Encoded(row.ids[1:], row.mask[1:])
        assert audit(without, prompt, tokenizer) == ["0 BOS tokens instead of 1", OTHER]
    in_text = encode(tokenizer, f"¿Qué es {BOS}?", "Nada.")
    assert audit(in_text, served(tokenizer, f"¿Qué es {BOS}?"), tokenizer) == [
        f"{expected + 1} BOS tokens instead of {expected}"
    ]


@pytest.mark.parametrize("add_bos", [True, False])
def test_audit_finds_eos_masked_as_padding(add_bos):
    """SmolLM2 and the tiny model pad with EOS: the language-model collator of transformers then masks every EOS."""
    made = make_tokenizer(add_bos=add_bos, pad=EOS)
    row = encode(made, "a", "b")
    assert audit(row, served(made, "a"), made) == []
    masked = [0 if token == made.pad_token_id else on for token, on in zip(row.ids, row.mask, strict=True)]
    assert audit(Encoded(row.ids, masked), served(made, "a"), made) == [MISSING]


class Fixed:
    """A tokenizer whose BOS and EOS are one token with the id 0, as in GPT-NeoX."""

    bos_token_id = eos_token_id = 0

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(sign) for sign in text]}


def test_audit_counts_a_token_that_is_bos_and_eos_as_both():
    row = encode(Fixed(), "a", "b")
    prompt = served(Fixed(), "a")
    assert audit(row, prompt, Fixed()) == []
    assert audit(Encoded([*row.ids, 0], [*row.mask, 1]), prompt, Fixed()) == ["EOS is supervised more than once"]
    assert "2 BOS tokens instead of 1" in audit(Encoded([0, *row.ids], [0, *row.mask]), prompt, Fixed())
