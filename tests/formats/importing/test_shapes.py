"""formats/importing/shapes.py, and with it formats/importing/messages.py: rows of other formats as tutor's own, and
rows that are refused."""

from typing import Any

import pytest

from tutor.formats.importing.names import TUTOR, Options, Recognised
from tutor.formats.importing.shapes import convert
from tutor.formats.rows.json_values import RowError

PAIR = {"instruction": "¿Qué es?", "response": "Un tipo."}
ASK, REPLY = {"role": "user", "content": "¿Qué es?"}, {"role": "assistant", "content": "Un tipo."}
SYSTEM = {"role": "system", "content": "Sé breve."}
HUMAN, GPT = {"from": "human", "value": "¿Qué es?"}, {"from": "gpt", "value": "Un tipo."}
CALL = {"from": "function_call", "value": "{}"}


def part(text: str, key: str = "text") -> list[dict[str, str]]:
    return [{"type": "text", key: text}]


def marked(*weights: Any) -> dict[str, Any]:
    """Turns of which each answer has a weight."""
    return {"messages": [each for weight in weights for each in (ASK, {**REPLY, "weight": weight})]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        pytest.param(PAIR, PAIR, id="own"),
        pytest.param({"instruction": "¿Qué es?", "output": "Un tipo."}, PAIR, id="Alpaca"),
        pytest.param({"instruction": "¿Qué es?", "input": "", "output": "Un tipo."}, PAIR, id="Alpaca-empty-input"),
        pytest.param(
            {"instruction": "Explica:", "input": "let x", "output": "Un tipo."},
            {"instruction": "Explica:\n\nlet x", "response": "Un tipo."},
            id="Alpaca-input",
        ),
        pytest.param(
            {"instruction": "¿Y?", "input": "", "output": "Sí.", "history": [["¿Qué es?", "Un tipo."]]},
            {"messages": [ASK, REPLY, {"role": "user", "content": "¿Y?"}, {"role": "assistant", "content": "Sí."}]},
            id="Alpaca-history",
        ),
        pytest.param(
            {"instruction": "¿Qué es?", "output": "Un tipo.", "system": "Sé breve.", "history": []},
            {"messages": [SYSTEM, ASK, REPLY]},
            id="Alpaca-system",
        ),
        pytest.param({**PAIR, "context": "let x"}, {**PAIR, "instruction": "¿Qué es?\n\nlet x"}, id="Dolly"),
        pytest.param({"conversations": [HUMAN, GPT]}, PAIR, id="ShareGPT"),
        pytest.param({"conversations": [HUMAN, GPT], "system": "", "tools": "[]"}, PAIR, id="ShareGPT-no-tools"),
        pytest.param(
            {"conversations": [HUMAN, GPT], "system": "Sé breve."}, {"messages": [SYSTEM, ASK, REPLY]}, id="beside"
        ),
        pytest.param({"conversations": [ASK, {"role": "bot", "content": "Un tipo."}]}, PAIR, id="roles-elsewhere"),
        pytest.param({"messages": [SYSTEM, ASK, REPLY]}, {"messages": [SYSTEM, ASK, REPLY]}, id="OpenAI"),
        pytest.param({"messages": [{**SYSTEM, "content": None}, ASK, REPLY]}, PAIR, id="empty-system"),
        pytest.param({"messages": [{**ASK, "content": part("¿Qué es?")}, REPLY]}, PAIR, id="parts"),
        pytest.param({"messages": [ASK, {**REPLY, "content": part("Un tipo.", "value")}]}, PAIR, id="parts-value"),
        pytest.param({"prompt": "¿Qué es?", "messages": [ASK, REPLY]}, PAIR, id="repeated-question"),
        pytest.param({"conversation": [{"input": "¿Qué es?", "output": "Un tipo."}]}, PAIR, id="pairs-of-texts"),
        pytest.param({"problem": "¿Qué es?", "solution": "Un tipo."}, PAIR, id="problem-solution"),
        pytest.param({"prompt": "¿Qué es?", "completion": "Un tipo."}, PAIR, id="prompt-completion"),
        pytest.param({"prompt": [ASK], "completion": [REPLY]}, PAIR, id="prompt-completion-messages"),
        pytest.param({"Question": "¿Qué es?", "Answer": "Un tipo."}, PAIR, id="question-answer"),
        pytest.param({"input": "¿Qué es?", "output": "Un tipo."}, PAIR, id="input-output"),
        pytest.param(
            {"query": "¿Qué es?", "response": "Un tipo.", "tema": "tipos", "id": 0},
            {**PAIR, "topic": "tipos", "id": 0},
            id="labels",
        ),
        pytest.param(
            {"question": "¿Qué es?", "answer": "<think>\nVeamos.\n</think>\n\nUn tipo."},
            {**PAIR, "reasoning": "Veamos."},
            id="think",
        ),
        pytest.param({"question": "¿Qué es?", "answer": "<think>\n\n</think>\n\nUn tipo."}, PAIR, id="empty-think"),
        pytest.param({**PAIR, "response": "<think>a</think>Un tipo."}, {**PAIR, "reasoning": "a"}, id="own-think"),
        pytest.param(
            {"messages": [ASK, {**REPLY, "reasoning_content": "a"}]}, {**PAIR, "reasoning": "a"}, id="reasoning-key"
        ),
        pytest.param(
            {"messages": [ASK, {**REPLY, "content": [{"type": "thinking", "thinking": "a"}, *part("Un tipo.")]}]},
            {**PAIR, "reasoning": "a"},
            id="reasoning-part",
        ),
        pytest.param({"prompt": "¿Qué es?", "response": "Un tipo.", "thinking": "a"}, {**PAIR, "reasoning": "a"}),
        pytest.param(
            {"messages": [{**SYSTEM, "loss_weight": 0.0}, {**ASK, "loss_weight": 0.0}, {**REPLY, "loss_weight": 1.0}]},
            {"messages": [SYSTEM, ASK, REPLY]},
            id="marks-as-trained",
        ),
        pytest.param(marked(1, 0), PAIR, id="turn-behind-the-last-trained-one"),
    ],
)  # fmt: skip
def test_row_of_each_format_is_converted(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert convert(row, Options(), Recognised()) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pair"),
        ({"chosen_messages": [ASK, REPLY], "rejected_messages": [ASK, REPLY]}, "preference pair"),
        ({"question": "a", "answer": "b", "solution": "c"}, "answer and solution could both be the answer"),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, "preference pair"),
        ({"messages": [ASK, REPLY], "label": False}, r"for KTO \(label\)"),
        ({"instruction": "a", "output": "b", "kto_tag": True}, r"for KTO \(kto_tag\)"),
        ({"text": "Érase una vez."}, "plain text for pre-training"),
        ({"messages": [ASK, REPLY], "images": ["a.jpg"]}, r"images, sound or video, which are not trained \(images\)"),
        ({"messages": [{**ASK, "content": [{"type": "image_url"}]}, REPLY]}, r"messages\[0\] \(user\) .*\(image_url\)"),
        ({"conversations": [HUMAN, CALL, GPT]}, r"conversations\[1\] \(function_call\) holds tool calls"),
        ({"conversations": [HUMAN, {"from": "observation", "value": "3"}]}, r"\(observation\) holds tool calls"),
        ({"messages": [ASK, {**REPLY, "content": None, "tool_calls": [{}]}]}, r"\(assistant\) holds tool calls"),
        ({"conversations": [HUMAN, GPT], "tools": '[{"name": "f"}]'}, "holds tool calls.*declares tools"),
        ({"messages": [ASK, {"role": "narrator", "content": "a"}]}, r"messages\[1\] \(narrator\) has an unknown role"),
        ({"messages": [{"text": "a"}]}, r"messages\[0\] has the keys text"),
        ({"messages": ["a"]}, r"messages\[0\] is a text, not an object"),
        ({"question": "a", "answer": ["b", "c"]}, "answer is a list, not a text"),
        ({"messages": "a"}, "messages is a text, not a list"),
        ({"messages": [ASK, {**REPLY, "content": 3}]}, "the number 3, not a text"),
        ({"messages": [{**ASK, "content": [{"type": "poem"}]}]}, "unknown type 'poem'"),
        ({"prompt": "a", "question": "b", "answer": "c"}, "question and prompt could both be the question"),
        ({"messages": [ASK, REPLY], "prompt": "a"}, "messages and prompt: which to train is not clear"),
        ({"a": 1, "b": 2}, "found key a, b; expected instruction,response or"),
        ({"question": "a", "answer": "<think>b"}, "opens <think> and does not close it"),
        ({"question": "a", "answer": "<think>b</think>c", "reasoning": "d"}, "two reasonings"),
        ({"messages": [SYSTEM, ASK, REPLY], "system": "Otro."}, "two system texts"),
        ({"messages": [{**ASK, "train": True}, REPLY]}, r"\(user\) has train = True: only answers are trained"),
        ({"messages": [ASK, {**REPLY, "weight": 0.5}]}, "weight = 0.5"),
        (marked(0), "every answer is marked as not trained"),
        (marked(0, 1), "answer 1 is marked as not trained"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"history\[0\] is not a pair"),
    ],
)
def test_row_that_cannot_be_trained_is_refused_by_name(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        convert(row, Options(), Recognised())


def test_marks_are_taken_where_the_recipe_trains_the_last_answer() -> None:
    row = marked(0, 1)
    assert convert(row, Options(loss="last"), Recognised()) == {"messages": [ASK, REPLY, ASK, REPLY]}
    with pytest.raises(RowError, match="marked as not trained"):
        convert(marked(0, 1, 1), Options(loss="last"), Recognised())


def test_map_names_the_columns_whatever_else_a_row_holds() -> None:
    options, recognised = Options({"question": "P", "answer": "R", "category": "T"}), Recognised()
    row = {"P": "¿Qué es?", "R": "Un tipo.", "T": 3, "prompt": "no", "label": True}
    assert convert(row, options, recognised) == {**PAIR, "category": "3"}
    assert recognised.dropped == {"prompt": 1, "label": 1}
    with pytest.raises(RowError, match="lacks 'R', which --map names; found P"):
        convert({"P": "a"}, options, recognised)


def test_named_format_leaves_out_rows_of_another() -> None:
    assert convert(
        {"instruction": "¿Qué es?", "output": "Un tipo.", "prompt": "x"}, Options(format="alpaca"), Recognised()
    )
    for name, row in (("alpaca", {"question": "a", "answer": "b"}), ("openai", {"conversations": [HUMAN, GPT]})):
        with pytest.raises(RowError, match=name):
            convert(row, Options(format=name), Recognised())


def test_format_of_each_row_is_counted() -> None:
    recognised = Recognised("JSON Lines")
    for row in (PAIR, {"conversations": [{**HUMAN, "markdown": "x"}, GPT]}, {"messages": [ASK, REPLY]}, PAIR):
        convert(row, Options(), recognised)
    assert recognised.formats == {TUTOR: 3, "ShareGPT (conversations)": 1}
    assert recognised.dropped == {"markdown of messages": 1}
    assert recognised.describe().startswith(f"JSON Lines; 3 rows as {TUTOR}, 1 rows as")


def test_key_in_place_of_one_that_is_written_is_counted() -> None:
    recognised = Recognised()
    row = {"conversations": [HUMAN, GPT], "response": "Otro.", "answer": "Otro."}
    assert convert(row, Options(), recognised) == {**PAIR, "answer": "Otro."}
    assert recognised.dropped == {"response": 1}


def test_key_without_a_meaning_is_left_for_the_rows_check() -> None:
    row = {"question": "¿Qué es?", "answer": "Un tipo.", "source": "web", "empty": ""}
    assert convert(row, Options(), Recognised()) == {**PAIR, "source": "web"}
