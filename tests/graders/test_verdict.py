"""graders/verdict.py: the demands of each kind of prompt, and the reasons of a failure; graders/labels.py."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes.command import ROOT

from tutor.formats.markdown import fenced_blocks
from tutor.graders.labels import LABELS
from tutor.graders.typescript.install import is_installed
from tutor.graders.verdict import are_in_language, grade

PROSE = "Una interfaz describe la forma de un objeto: qué propiedades tiene y de qué tipo es cada una."
ENGLISH = "An interface describes the shape of an object and all of its properties, one by one."
GOOD = f" {PROSE}\n\n```ts\ninterface A {{}}\n```"
ASKS = "¿Qué es una interfaz en TypeScript y cuándo conviene usarla?"


def prompt(expect: dict[str, Any] | None = None, question: str = ASKS, code: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"instruction": question, "category": "definicion", "code": list(code), "expect": expect or {}}


def answer(text: str = GOOD, finish: str = "eos") -> dict[str, Any]:
    return {"text": text, "finish": finish, "tokens": 515}


def reasons(prompt: dict[str, Any], text: str = GOOD, finish: str = "eos") -> list[str]:
    record = grade([prompt], [answer(text, finish)])[0]
    assert record["passed"] is not bool(record["reasons"])
    json.dumps(record, allow_nan=False)
    found: list[str] = record["reasons"]
    return found


def test_prompt_without_expectation_demands_form_and_spanish() -> None:
    assert reasons(prompt()) == []
    assert reasons(prompt(), f" {ENGLISH}") == ["its prose is not Spanish (confidence 0.00)"]
    assert reasons(prompt(), finish="length") == ["it was cut at 515 tokens"]
    assert reasons(prompt(), f" {PROSE}\n\n```ts\nlet a;") == ["a code fence stays open"]
    assert reasons(prompt(), f" {PROSE} " * 4) == ["it repeats itself"]
    assert reasons(prompt(), f"<think>\n{PROSE}") == ["it shows template text, a thinking tag or a special token"]
    assert reasons(prompt(), " \n")[0] == "it is empty"


def test_reference_with_code_demands_code_without_expectation() -> None:
    python = f"{PROSE}\n\n```python\nx = 1\n```"
    asked = [{**prompt(), "reference": python}, {**prompt(), "reference": PROSE}]
    asked.append({**prompt({"code": False}), "reference": python})
    records = grade(asked, [answer(f" {PROSE}")] * 3)
    assert [record["reasons"] for record in records] == [["it has no code, and its reference has some"], [], []]
    assert [record["verdicts"]["reference_code"] for record in records] == [False, True, False]
    assert grade(asked[:1], [answer(python)])[0]["passed"]
    assert "reference_code" not in grade(asked[1:2], [answer()])[0]["verdicts"]
    assert records[1]["verdicts"]["chrf"] > 99 > records[0]["verdicts"]["chrf"]


def test_prompts_in_other_language_do_not_demand_the_language() -> None:
    english = prompt(question="What is an interface, and when should one be used instead of a type alias?")
    assert not are_in_language([english], "es")
    assert reasons(english, f" {ENGLISH}") == []
    record = grade([english], [answer(f" {ENGLISH}")])[0]
    assert record["verdicts"]["language"] is False, "the verdict is counted, but not demanded"


def test_language_of_the_recipe_is_demanded_any_is_not() -> None:
    asked = [prompt(question="What is an interface, and when should one be used instead of a type alias?")]
    (spanish,) = grade(asked, [answer()], language="en")
    assert spanish["reasons"] == ["its prose is not English (confidence 0.00)"]
    (free,) = grade(asked, [answer()], language="any")
    assert free["passed"]
    assert not free["verdicts"].keys() & {"language", "language_confidence"}


def test_thought_without_an_answer_is_the_reason() -> None:
    def of(text: str, finish: str) -> list[str]:
        given = {**answer(text, finish), "thought": "<|im_end|> The user asks about interfaces."}
        found: list[str] = grade([prompt()], [given])[0]["reasons"]
        return found

    assert of("", "length") == ["its thought has no end: cut at 515 tokens"]
    assert of("\n", "stop") == ["it is a thought without an answer"]
    assert of(GOOD, "stop") == [], "verdicts are about the answer alone"


def test_words_of_the_tutors_format_are_no_leak_elsewhere() -> None:
    text = f"{GOOD}\n\nRespuesta: {PROSE}"
    kinds = {kind: grade([prompt()], [answer(text)], kind=kind)[0]["passed"] for kind in ("tutor", "base")}
    assert kinds == {"tutor": False, "base": True}
    (left_over,) = grade([prompt()], [answer(f"{GOOD}<end_of_turn>")], kind="base")
    assert left_over["verdicts"]["no_leak"] is False


def test_short_questions_together_are_spanish() -> None:
    assert are_in_language([prompt(question="¿`any`?"), prompt(), prompt(question="¿Y `never`?")], "es")
    assert are_in_language([prompt(question="¿Qué es el tipo void?")] * 8, "es"), (
        "the detector classifies the joined texts as Catalan"
    )
    assert not are_in_language([], "es")


def test_expected_code_must_be_there_and_compile(fake_compiler: object) -> None:
    wants = prompt({"code": True})
    assert reasons(wants) == []
    assert reasons(wants, f" {PROSE}") == ["it has no TypeScript of its own"]
    assert reasons(wants, f" {PROSE}\n\n```ts\na;\nTS2322\n```") == [
        "its code in line 5: type error: TS2322 said [31m of TS2322"
    ]


def test_missing_and_forbidden_concepts_are_reasons(fake_compiler: object) -> None:
    wants = prompt({"code": True, "include": [["interfaz"], ["tupla", "lista"]], "exclude": ["objeto"]})
    assert reasons(wants) == ["it lacks tupla or lista", "it has objeto"]


GIVEN = "function sumar(a: string) {\n  TS2322\n}\n"
CORRECTION = prompt({"code": True}, f"¿Por qué no compila esta función?\n\n```ts\n{GIVEN}```", ("TS2322",))


def test_correction_must_compile_and_keep_names(fake_compiler: object) -> None:
    assert reasons(CORRECTION, f" {PROSE}\n\n```ts\nfunction sumar(a: number) {{}}\n```") == []
    assert reasons(CORRECTION, f" {PROSE}\n\n```ts\nconst otra = 1;\n```") == ["it lacks sumar of the given code"]


def test_correction_may_quote_given_code_beside_its_own(fake_compiler: object) -> None:
    again = f" {PROSE}\n\n```ts\n{GIVEN}```"
    assert reasons(CORRECTION, f"{again}\n\nAsí sí:\n\n```ts\nfunction sumar(a: number) {{}}\n```") == []
    assert reasons(CORRECTION, again)[0] == "it has no TypeScript of its own"


def test_given_code_not_failing_as_stated_is_a_reason(fake_compiler: object) -> None:
    wrong = prompt({"code": True}, f"¿Por qué?\n\n```ts\n{GIVEN}```", ("TS2345",))
    found = reasons(wrong, f" {PROSE}\n\n```ts\nfunction sumar() {{}}\n```")
    assert found == ["the question's own code does not fail as its row states: tutor data check"]


def test_missing_answer_fails_with_its_error() -> None:
    found = grade([prompt(), prompt()], [{"error": "timed out"}, answer()])
    assert found[0] == {"error": "timed out", "passed": False, "reasons": ["no answer: timed out"]}
    assert found[1]["passed"]


def test_usual_length_is_a_verdict_and_no_demand() -> None:
    usual = [grade([prompt()], [answer()], lengths)[0] for lengths in ((100, 200), (300, 400), (10, 50))]
    assert [record["verdicts"]["usual_length"] for record in usual] == [True, False, False]
    assert all(record["passed"] for record in usual)


def test_every_boolean_verdict_has_a_label() -> None:
    (record,) = grade([prompt()], [answer()], (100, 200))
    boolean = {name for name, value in record["verdicts"].items() if isinstance(value, bool)}
    assert "no_loop" in boolean
    assert boolean <= set(LABELS)


@given(st.text(max_size=200), st.sampled_from(["eos", "stop", "length"]))
@settings(max_examples=30, deadline=None)
def test_any_text_gets_a_verdict(text: str, finish: str) -> None:
    reasons(prompt(), text, finish)  # asserts that passed and reasons agree, and that JSON can hold them


@pytest.mark.parametrize(
    "text", ["\0\x1b[2J" * 200, "[" * 5000, "`" * 5000, "> " * 3000, "\ud83d" * 9, "a" * (2**20 + 9), "# \n" * 9000]
)
def test_hostile_text_gets_a_verdict(text: str) -> None:
    record = grade([prompt()], [answer(text)])[0]
    assert record["passed"] is False
    assert record["reasons"]


@pytest.mark.typescript
@pytest.mark.skipif(not is_installed(), reason="the TypeScript compiler is not installed")
def test_every_row_of_the_data_set_passes_grading() -> None:
    rows = [json.loads(line) for line in (ROOT / "data" / "tutor.jsonl").read_text("utf-8").splitlines()]
    prompts = [
        {
            **row,
            "code": row["code"][: len(fenced_blocks(row["instruction"]))],
            "expect": {"code": "```ts" in row["response"]},
        }
        for row in rows
    ]
    found = grade(prompts, [answer(f" {row['response']}") for row in rows])
    assert [record["reasons"] for record in found if not record["passed"]] == []
