"""graders/format.py: each property, and texts that only look like a fault."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.outputs.answers import GOOD

from tutor.graders.format import grade_format, loops


def test_good_answer_has_good_verdicts() -> None:
    verdict = grade_format(GOOD, "eos")
    assert all(verdict.values())
    assert verdict["characters"] == len(GOOD) - 1
    json.dumps(verdict)


def test_each_fault_fails_its_verdict_alone() -> None:
    def faults(text: str, finish: str = "eos") -> set[str]:
        return {name for name, good in grade_format(text, finish).items() if not good}

    assert faults(GOOD, "stop") == {"ended"}
    assert faults(GOOD, "length") == {"stopped", "ended"}
    assert faults("Solo palabras.") == {"code_block"}
    assert faults(" \n") == {"answered", "code_block", "characters"}
    assert faults(GOOD + "\n```ts\nconst a = 1;") == {"fences_closed"}
    assert faults(GOOD + "\nInstrucción: otra") == {"no_leak"}
    assert faults(GOOD + "\n\nUna interfaz define la forma de un objeto." * 4) == {"no_loop"}


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("```ts\na\n```", True),
        ("```\n```", True),
        ("```ts\na\n```\n\nfin", True),
        ("```ts\r\na\r\n```\r\n", True),
        ("~~~~\n~~~\n~~~~", True),
        ("- x\n  ```ts\n  a\n  ```\n- y", True),
        ("> ```\n> a\n> ```", True),
        ("sin código, con `comillas`", True),
        ("```", False),
        ("```ts\na", False),
        ("```ts\na\n\n\n", False),
        ("```ts\na\n```ts\nb", False),
        ("```ts\na\n    ```", False),
        ("~~~~\n~~~", False),
        ("- x\n  ```ts\n  a\n\nfin", False),
    ],
)
def test_fence_is_closed_as_in_commonmark(text: str, closed: bool) -> None:  # noqa: FBT001
    assert grade_format(text, "stop")["fences_closed"] is closed


@given(st.lists(st.sampled_from(["a", "", "const x = 1;", "  ```ts", "~~~"]), max_size=8))
def test_closed_fence_with_any_content_is_closed(lines: list[str]) -> None:
    content = "\n".join(lines)
    assert grade_format(f"````ts\n{content}\n````\nfin", "stop")["fences_closed"]
    assert not grade_format(f"````ts\n{content}", "stop")["fences_closed"]


@pytest.mark.parametrize(
    "text",
    [
        "\nRespuesta: sí",
        "Instrucción: ¿Qué es?",
        "<think>\nVeamos",
        "fin</think>",
        "<｜end▁of▁sentence｜>",
        "<|im_end|>",
        "ya está</s> ",
        "[INST] hola [/INST]",
    ],
)
def test_template_text_and_special_tokens_are_leaks(text: str) -> None:
    assert not grade_format(text, "stop")["no_leak"]


@pytest.mark.parametrize(
    "text",
    [
        "La instrucción: usa `keyof`. Su respuesta: un tipo unión.",
        "type A = Record<string, Array<s>>; const f = <T,>(x: T) => x;",
        "type B =\n  | 'a'\n  | 'b'; if (a < b || c > d) {}",
        "**Respuesta:** depende.",
    ],
)
def test_text_similar_to_template_text_is_no_leak(text: str) -> None:
    assert grade_format(text, "stop")["no_leak"]


@pytest.mark.parametrize(
    "text",
    [
        "la interfaz define " * 6,
        "tipo " * 18,
        "\n".join(f"{letter}. Es una función" for letter in "ABCDEF"),
        "La unión acepta varios tipos de valor a la vez.\n" * 3,
        "\n".join(f"{n}. Los genéricos permiten reutilizar código con tipos." for n in range(1, 6)),
        "```ts\n" + "const a: string = 1;\n" * 8,
        "!" * 60,
        "jajaja" * 40,
    ],
)
def test_degenerate_answer_is_a_loop(text: str) -> None:
    assert loops(text)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "no, no, no y no " * 2,
        "la interfaz define " * 5,
        "tipo " * 17,
        "-" * 200 + "\n" + "=" * 80,
        "| --- " * 40,
        "enum Mes {\n" + "".join(f"  M{n} = {n},\n" for n in range(40)) + "}",
        "if (a) {\n" * 3 + "}\n" * 20,
        "const tabla = [" + ", ".join(str(n) for n in range(60)) + "];",
        " " * 500,
    ],
)
def test_repetitive_code_and_rules_are_no_loop(text: str) -> None:
    assert not loops(text)


def words(count: int) -> str:
    return " ".join(f"palabra{'abcdefghij'[n // 10 % 10]}{n}" for n in range(count))


def test_loop_has_three_repetitions_and_eighteen_words() -> None:
    assert loops(f"Dice: {words(6)} {words(6)} {words(6)}")
    assert not loops(f"Dice: {words(6)} {words(6)} {words(5)}")
    assert not loops(f"{words(9)} {words(9)}")


def test_repeated_unit_of_more_than_120_words_is_no_loop() -> None:
    assert loops(f"{words(120)} " * 3)
    assert not loops(f"{words(121)} " * 3)


@given(st.text(max_size=300), st.sampled_from(["eos", "stop", "length"]))
def test_any_text_gets_every_verdict(text: str, finish: str) -> None:
    assert set(grade_format(text, finish)) == set(grade_format("", "stop"))
