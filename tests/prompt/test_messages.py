"""Rows as messages, and what every format has in common (tutor/prompt/format.py)."""

import pytest

from tutor.prompt.format import end_token, served_messages
from tutor.prompt.messages import check_messages, row_answer, row_messages
from tutor.prompt.tutor_format import TUTOR


def test_messages_of_a_row_are_its_history_and_its_question():
    assert row_messages({"instruction": "a"}, "") == [{"role": "user", "content": "a"}]
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"instruction": "c", "response": "d", "history": history, "reasoning": ""}
    found = row_messages(row, "s")
    assert [each["content"] for each in found] == ["s", "a", "b", "c"]
    check_messages(found)
    assert row_answer(row) == {"role": "assistant", "content": "d"}
    assert row_answer({**row, "reasoning": "r"})["reasoning"] == "r"


def test_served_history_has_the_answers_as_generated():
    served = served_messages(
        TUTOR, row_messages({"instruction": "c", "history": [{"role": "assistant", "content": "b"}]}, "")
    )
    assert [each["content"] for each in served] == [" b", "c"]


@pytest.mark.parametrize("own", [None, 7])
def test_end_of_an_answer_is_the_formats_token_or_eos(own, tokenizer):
    class Ended(type(TUTOR)):
        end_id = own

    assert end_token(Ended(), tokenizer) == (own or tokenizer.eos_token_id)
