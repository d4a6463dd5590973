"""graders/language.py: prose of a language, other languages, too little prose."""

import pytest
from support.outputs.answers import GOOD

from tutor.graders.language import is_in_language, prose


def test_prose_has_no_code_and_no_identifiers() -> None:
    words = "Usa `keyof T` o Array<number> (por ejemplo) con miVariable y fs.readFile."
    assert prose(words + "\n\n```ts\nconst x = 1;\n```\n\n    more()") == "Usa o (por ejemplo) con y"


def test_spanish_answer_with_english_code_is_spanish() -> None:
    code = "```ts\n// the user asked for the list of all the books\nexport function getBooks(): Book[] {}\n```\n"
    assert is_in_language(GOOD, "es")[0]
    assert is_in_language(code * 10 + GOOD, "es")[0]


@pytest.mark.parametrize(
    "text",
    [
        "An interface describes the shape of an object and the type of each property.",
        "Uma interface descreve a forma de um objeto e diz quais propriedades ele tem.",
        "Un'interfaccia descrive la forma di un oggetto e dice quali proprietà ha.",
        "Une interface décrit la forme d'un objet et le type de chacune de ses propriétés.",
        "Una interfície descriu la forma d'un objecte i diu quines propietats té.",
    ],
)
def test_other_languages_are_not_spanish(text: str) -> None:
    assert is_in_language(text, "es") == (False, pytest.approx(0, abs=0.2))


@pytest.mark.parametrize(
    "text", ["", "Sí.", "¿Qué es una interfaz?", "```ts\nconst nombre = 'una interfaz en español';\n```", "`a` `b` `c`"]
)
def test_too_little_prose_is_not_spanish(text: str) -> None:
    assert is_in_language(text, "es") == (False, 0.0)


def test_answer_with_english_thinking_first_is_not_spanish() -> None:
    thinking = "Okay, so the user is asking about interfaces. I need to explain what they are and give an example. "
    assert not is_in_language(thinking * 2 + "Una interfaz es un contrato.", "es")[0]


SENTENCES = {
    "de": "Eine Schnittstelle legt fest, welche Eigenschaften ein Objekt hat und welchen Typ jede von ihnen hat.",
    "en": "An interface describes the shape of an object and the type of each property.",
    "es": GOOD,
    "pt": "Uma interface descreve a forma de um objeto e diz quais propriedades ele tem.",
    "zh": "接口`A`规定了对象具有哪些属性,以及每个属性的类型是什么,array2数组也是如此。",
    "ja": "インターフェースは、オブジェクトがどのようなプロパティを持つかを定める契約です。",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_prose_is_in_its_own_language_alone(language: str) -> None:
    assert [name for name, text in SENTENCES.items() if is_in_language(text, language)[0]] == [language]


def test_identifiers_end_at_words_of_a_language_without_blanks() -> None:
    assert prose("使用foo.bar方法。", "zh") == "使用 方法 。"
    assert is_in_language("使用。", "zh") == (False, 0.0)
