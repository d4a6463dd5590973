"""stages/data/normal_form.py: what is one question, and what tells two apart."""

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from tutor.stages.data.normal_form import _SIGNS, _sign, normalise, plain_words


def test_typing_variants_have_one_normal_form() -> None:
    question = "¿Qué es una «unión», y cómo se escribe?"
    normal = "que es una union y como se escribe"
    assert normalise(question) == normal
    assert normalise("Que es una union y como se escribe") == normal
    assert normalise("  QUÉ ES UNA UNIÓN…\n¡Y cómo se escribe!") == normal
    assert normalise("¿Qué\u200b es una “unión” y cómo\u00a0se escribe?") == normal
    assert normalise("Que es una u\u00adnión y cómo se escribe") == normal
    assert normalise("ﬁle № １") == normalise("file no 1")
    assert normalise("e\u0301xito") == normalise("éxito")


def test_punctuation_in_code_changes_the_normal_form() -> None:
    assert normalise("¿Qué hace `?.`?") != normalise("¿Qué hace `??`?")
    assert normalise("```ts\nlet x: T[];\n```") != normalise("```ts\nlet x: T;\n```")
    assert normalise("¿Qué es `keyof`?") == normalise("Que es keyof")
    assert normalise("???") != normalise("!!!")
    assert normalise("कि") != normalise("की")


ONE_QUESTION = [
    ["¿Cuánto es 7+3?", "cuanto es 7 + 3", "¿Cuánto es 7 +3?"],
    ["¿Cuánto es 7-3?", "¿cuánto es 7 − 3", "¿Cuánto es 7–3?"],
    ["¿Cuánto es 7*3?", "¿Cuánto es 7×3?"],
    ["¿Cuánto es 7/3?", "¿Cuánto es 7÷3?"],
    ["valor de -5", "¿Valor de −5?"],
    ["valor de 5", "¿Valor de «5»?"],
    ["¿Qué es C?", "que es c", "¿Qué es **C**?", "**¿Qué es C?**", "# ¿Qué es C?", "- ¿Qué es C ?"],
    ["¿Qué es C++?", "¿Qué es C ++?", "¿Qué es `C++`?".lower()],
    ["¿Qué es C#?", "que es c# ?"],
    ["¿Qué hace?", "¿Que hace ?", "qué hace...", "Qué hace??", "Qué hace !"],
    ["¿Qué hace ???", "¿Qué hace ??", "¿Qué hace `??`?", "¿Qué hace «??»?", 'qué hace "??"'],
    ["¿Qué hace ?.?", "¿Qué hace `?.`?", "qué hace ?."],
    ["¿Qué hace ...?", "¿Qué hace `...`?"],
    ["a?.b", "`a?.b`", "a ?. b"],
    ["a!.b", "`a!.b`"],
    ["a.b", "a b"],
    ["a ?? b", "a??b"],
    ["a === b", "`a === b`"],
    ["a == b"],
    ["i++", "`i++`"],
    ["i--"],
    ["i", "_i_", "*i*"],
    ["¿Qué es <div>?", "que es `<div>`"],
    ["¿Qué es </div>?"],
    ["¿Qué es div?"],
    ["¿Qué es string[]?", "que es `string[]`"],
    ["¿Qué es string?", "que es `string`", "QUE ES STRING"],
    ["¿Qué es `String`?"],
    ["la versión ^1.2"],
    ["la versión ~1.2"],
    ["re-exportar", "Re exportar"],
    ["TypeScript - ¿qué es?", "TypeScript: ¿qué es?", "typescript — que es", "+ typescript, qué es"],
]
"""Spellings of one question a list; two lists are two questions."""


def test_operators_and_case_of_code_tell_questions_apart() -> None:
    found = {}
    for spellings in ONE_QUESTION:
        forms = {normalise(text) for text in spellings}
        assert len(forms) == 1, spellings
        assert found.setdefault(forms.pop(), spellings) is spellings


def test_normal_form_of_many_signs_needs_linear_work() -> None:
    looked_at = []

    class Text(str):
        def __getitem__(self, place: Any) -> str:
            looked_at.append(len(super().__getitem__(place)))
            return super().__getitem__(place)

    for match in _SIGNS.finditer(Text("a - b+c ?. " * 100)):
        _sign(match)
    assert max(looked_at) <= 8


def test_plain_words_have_no_operators() -> None:
    assert plain_words("¿Cuánto es 7+3?") == plain_words("cuanto es 7/3") == "cuanto es 7 3"
    assert plain_words("¿Qué hace `A?.b`?") == "que hace a?.b"


SPANISH = st.text("aábcñüZÁ ¿?¡!,.«»-\n\t·0 9", max_size=40)


@given(SPANISH)
@example("0? -0")  # a mark between two numbers
def test_normal_form_is_stable_and_ignores_case_and_ends(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert normalise(text.upper()) == normalise(text.lower()) == once
    closed = text.rstrip(" ?\n\t") + "?"  # `a ??` is an operator
    assert normalise(f"\n¿{closed}  ") == normalise(closed) or not any(sign.isalnum() for sign in text)


@given(st.text())
def test_normal_form_is_one_line_and_empty_only_for_blanks(text: str) -> None:
    assert normalise(text).split() == [word for word in normalise(text).split(" ") if word]
    assert bool(normalise(text)) == bool(text.replace("\u0345", "").split())
