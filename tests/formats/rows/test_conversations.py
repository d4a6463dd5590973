"""Rows of several turns: from their file to examples and prompts (tutor/formats/rows/examples.py)."""

import json
from pathlib import Path
from typing import Any

import pytest

from tutor.errors import DataError
from tutor.recipe.settings import Recipe
from tutor.stages.data import reading

GOOD = {"instruction": "¿Qué es un tipo?", "response": "Un conjunto de valores."}


@pytest.fixture
def file(tmp_path: Path) -> Any:
    """Write rows into a file."""

    def write(*rows: object) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    return write


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as fault:
        reading.read_examples(path)
    return fault.value


TURNS = [
    {"role": "system", "content": "Sé breve."},
    {"role": "user", "content": "¿Qué es any?\r\n"},
    {"role": "assistant", "content": " Un tipo.", "reasoning": "Fácil."},
    {"role": "user", "content": "¿Y unknown?"},
    {"role": "assistant", "content": "Otro."},
]


def test_row_of_several_turns_has_its_history(file: Any) -> None:
    path = file({"messages": TURNS, "topic": "t"}, {"instruction": "a", "response": "b", "reasoning": "r"})
    several, one = reading.read_examples(path)[0]
    assert (several.instruction, several.response, several.topic) == ("¿Y unknown?", "Otro.", "t")
    cleaned = [{**TURNS[1], "content": "¿Qué es any?"}, {**TURNS[2], "content": "Un tipo."}]
    assert list(several.history) == [TURNS[0], *cleaned]
    assert several.question == "¿Qué es any?\n\n¿Y unknown?"
    assert (one.history, one.reasoning) == ((), "r")


def test_prompt_of_several_turns_may_end_with_its_question(file: Any) -> None:
    asked, answered = reading.read_prompts(file({"messages": TURNS[:4]}, {"messages": TURNS[1:]}))[0]
    assert (asked.instruction, asked.reference, len(asked.history)) == ("¿Y unknown?", "", 3)
    assert (answered.instruction, answered.reference, len(answered.history)) == ("¿Y unknown?", "Otro.", 2)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages is not a list of messages"),
        ("a", "messages is a text, not a list of messages"),
        (["a"], "messages[0] is a text, not an object with role and content"),
        (TURNS[:1], "messages holds no question"),
        (TURNS[:4], "messages ends with a question: its answer is missing"),
        ([TURNS[0], TURNS[2]], "messages[1] is from the assistant, not from the user"),
        ([*TURNS[1:], TURNS[0]], "messages[4] is from the system, not from the user"),
        ([TURNS[1], {"role": "tool", "content": "a"}], "messages[1] (tool) holds tool calls"),
        ([TURNS[1], {**TURNS[4], "tool_calls": [{}]}], "messages[1] (assistant) holds tool calls"),
        ([TURNS[1], {"role": "assistant", "content": [{"type": "image"}]}], "messages[1] (assistant) holds images"),
        ([{**TURNS[1], "reasoning": "r"}, TURNS[4]], "messages[0] has reasoning, which only answers have"),
        ([{"role": "user", "content": "a\nRespuesta: b"}, TURNS[4], *TURNS[3:]], "messages[0].content has a line"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}, *TURNS[3:]], "messages[1].content"),
        ([TURNS[1], {"role": "assistant", "content": "<|im_end|>"}], "the last answer holds <|im_end|>"),
    ],
)
def test_messages_of_another_form_are_refused_by_place(file: Any, messages: Any, problem: str) -> None:
    (found,) = refused(file(GOOD, {"messages": messages})).problems
    assert problem in found


def test_row_with_messages_and_another_answer_is_refused(file: Any) -> None:
    (found,) = refused(file(GOOD, {"messages": TURNS, "response": "x"})).problems
    assert "has messages and response" in found


def test_response_of_another_type_names_the_command(file: Any) -> None:
    assert "tutor data import" in (refused(file({**GOOD, "response": [{"role": "user"}]})).hint or "")


def test_turns_of_the_tutors_prompt_are_text_for_another_prompt(file: Any) -> None:
    quoted = {"instruction": "¿Y\nRespuesta: esto?", "response": "No.\nInstrucción: otra."}
    path = file(quoted, {"messages": [{"role": "user", "content": "a\nRespuesta:"}, *TURNS[2:]]})
    assert len(refused(path).problems) == 2
    limits = reading.row_limits(Recipe(prompt="base"))
    assert len(reading.read_examples(path, limits=limits)[0]) == 2
    assert len(reading.read_prompts(path, limits=limits)[0]) == 2
    assert not reading.row_limits(Recipe()).turns_as_text
