"""serving/evaluation/examples.py: which training rows an untuned model is shown, and where they stand."""

from typing import Any

import pytest

from tutor.prompt.messages import check_messages, row_messages
from tutor.serving.evaluation.examples import fixed_examples, similar_rows, with_examples


def row(question: str, answer: str, category: str = "", **other: Any) -> dict[str, Any]:
    return {"instruction": question, "response": answer, "category": category, **other}


ROWS = [row(f"¿Qué es el plato {n}?", f"Un guiso de {n} verduras.", "abc"[n % 3]) for n in range(9)]


def test_examples_come_from_each_category_in_turn() -> None:
    chosen = fixed_examples(ROWS, 5, seed=3)
    assert sorted(each["category"] for each in chosen[:3]) == ["a", "b", "c"]
    assert fixed_examples(ROWS[::-1], 5, seed=3) == chosen, "the order of the rows is no choice"
    assert fixed_examples(ROWS, 3, seed=3) == chosen[:3]
    assert fixed_examples(ROWS, 5, seed=4) != chosen
    assert len(fixed_examples(ROWS, 99, seed=3)) == 9


def test_most_similar_rows_come_first() -> None:
    rows = [
        row("¿Cómo se hierve el arroz?", "En agua con sal."),
        row("¿Y el horno?", "A 200 grados para asar un pimiento."),
        row("¿Cómo se asa un pimiento?", "En el horno."),
    ]
    asked = [{"instruction": "¿Cuánto tarda en asarse un pimiento rojo?"}, {"instruction": "arroz"}]
    found = similar_rows(rows, asked, 2, "es")
    assert [[rows.index(each) for each in chosen] for chosen in found] == [[2, 1], [0, 1]]
    assert [len(chosen) for chosen in similar_rows(rows, asked, 9, "es")] == [3, 3]


def test_language_without_blanks_is_searched_by_letter_pairs() -> None:
    rows = [row("塩とは何ですか。", "調味料です。"), row("鍋の洗い方を教えてください。", "水で洗います。")]
    assert similar_rows(rows, [{"instruction": "鉄の鍋はどう洗いますか。"}], 1, "ja") == [[rows[1]]]


@pytest.mark.parametrize("text", ["?", "zzz"])
def test_question_without_a_known_word_gets_the_first_rows(text: str) -> None:
    assert similar_rows(ROWS, [{"instruction": text}], 2, "es") == [ROWS[:2]]
    assert similar_rows([row("!", "?")], [{"instruction": text}], 2, "es") == [[row("!", "?")]]


def test_prompt_with_examples_is_a_conversation() -> None:
    system = {"role": "system", "content": "Eres cocinero."}
    earlier = [{"role": "user", "content": "Hola"}, {"role": "assistant", "content": "Hola."}]
    prompt = {"instruction": "¿Y la sal?", "history": [system, *earlier]}
    example = row("¿Qué es?", "Un guiso.", history=[{"role": "system", "content": "Otra."}], reasoning="Pienso.")
    found = row_messages(with_examples(prompt, [example, ROWS[0]]), "")
    check_messages(found)
    assert [message["content"] for message in found] == [
        "Eres cocinero.",
        *("¿Qué es?", "Un guiso."),
        *(ROWS[0]["instruction"], ROWS[0]["response"]),
        *("Hola", "Hola.", "¿Y la sal?"),
    ]
    assert not any("reasoning" in message for message in found)
