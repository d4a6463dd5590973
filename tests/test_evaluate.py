"""stages/evaluate.py: the loop over prompts with engines in this process, the figures, and a run on fake programs."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutor.engines.answer import Answer, Engine, Finish, Generation
from tutor.errors import ArtifactError, ServiceError
from tutor.stages.evaluate import (
    RATES,
    ask,
    ask_all,
    compare_table,
    judged,
    perplexity,
    rates,
    read_rows,
    side_by_side,
    summarise,
)
from tutor.template import Message, render

GREEDY = Generation(max_new_tokens=50, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=7)
SPANISH = (
    " Una interfaz describe la forma de un objeto y sus propiedades.\n\n"
    "```ts\ninterface A { b: string }\n```\n\nÚsala cuando varias funciones la compartan."
)
ENGLISH = " An interface describes the shape of an object and all of its properties, one by one."
PROMPTS = [
    {"instruction": f"¿Qué es {name}?", "category": category, "topic": "t", "code": [], "expect": {"code": True}}
    for name, category in (("a", "definicion"), ("b", "ejemplo"), ("c", "definicion"), ("d", "ejemplo"))
]


def an_answer(text: str = SPANISH, finish: Finish = "stop", tokens: int = 10, speed: float = 20.0) -> Answer:
    return Answer(text, finish, 12, tokens, 0.5, speed)


@dataclass
class Fake:
    """Answers in Spanish, unless the script has an error for a question; `dead` from the n-th request on."""

    faults: dict[str, str] = field(default_factory=dict)
    dead_from: int | None = None
    name: str = "fake"
    asked: list[tuple[str, Generation]] = field(default_factory=list)

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        self.asked.append((render(messages), generation))
        if self.dead_from is not None and len(self.asked) >= self.dead_from:
            raise ServiceError("connection refused")
        if fault := self.faults.get(messages[-1]["content"]):
            raise ServiceError(fault)
        return an_answer()


def starter(*engines: Engine) -> Callable[[], contextlib.AbstractContextManager[Engine]]:
    """Gives the engines one after the other, as a server that is started again."""
    left = list(engines)

    @contextlib.contextmanager
    def start() -> Iterator[Engine]:
        yield left.pop(0)

    return start


def test_every_prompt_is_asked_once_in_order_after_one_warm_up() -> None:
    engine = Fake()
    records = ask(engine, PROMPTS, GREEDY, "Eres un tutor.", "tutor")
    assert len(records) == 4
    assert [prompt for prompt, _ in engine.asked[1:]] == [
        f"Eres un tutor.\n\nInstrucción: {prompt['instruction']}\nRespuesta:" for prompt in PROMPTS
    ]
    assert engine.asked[0][1].max_new_tokens == 1
    assert {generation for _, generation in engine.asked[1:]} == {GREEDY}


def test_a_prompt_that_fails_is_a_record_and_the_rest_is_asked() -> None:
    engine = Fake(faults={"¿Qué es b?": "the prompt is too long"})
    records = ask(engine, PROMPTS, GREEDY, "", "tutor")
    assert records[1] == {"error": "the prompt is too long"}
    assert ["verdicts" in record for record in records] == [True, False, True, True]


def test_a_dead_engine_is_started_again_at_the_prompt_it_died_on() -> None:
    first, second = Fake(dead_from=4), Fake()
    records = ask_all(starter(first, second), PROMPTS, GREEDY, "", "tutor")
    assert ["verdicts" in record for record in records] == [True] * 4
    assert [prompt[13:23] for prompt, _ in second.asked[1:]] == ["¿Qué es c?", "¿Qué es d?"]


def test_an_engine_that_dies_again_ends_the_run() -> None:
    with pytest.raises(ServiceError, match="died 2 times, the last time at prompt 3 of 4"):
        ask_all(starter(Fake(dead_from=3), Fake(dead_from=3)), PROMPTS, GREEDY, "", "tutor")


def test_an_engine_that_never_answers_ends_the_run_at_once() -> None:
    with pytest.raises(ServiceError, match="refused"):
        ask_all(starter(Fake(dead_from=1)), PROMPTS, GREEDY, "", "tutor")


def test_an_answer_is_kept_as_it_came_with_its_verdicts() -> None:
    record = judged(an_answer(ENGLISH, finish="length"))
    assert record["text"] == ENGLISH
    assert {name for name in RATES if not record["verdicts"][name]} == {"stopped", "code_block", "spanish"}
    json.dumps(record, allow_nan=False)


def test_rates_count_an_error_as_no_pass() -> None:
    counted = rates([judged(an_answer()), judged(an_answer(ENGLISH)), {"error": "x"}])
    assert (counted["n"], counted["errors"]) == (3, 1)
    assert counted["spanish"] == {"n": 1, "share": 0.3333}
    assert counted["answered"] == {"n": 2, "share": 0.6667}


def test_no_prompts_are_no_division() -> None:
    assert rates([])["spanish"] == {"n": 0, "share": 0.0}
    assert summarise([], [])["tokens_per_second"] is None


def test_a_summary_is_by_category_with_the_median_speed() -> None:
    speeds = (10.0, 30.0, 50.0)
    records = [judged(an_answer(speed=speed)) for speed in speeds] + [judged(an_answer(tokens=1, speed=9999.0))]
    summary = summarise(PROMPTS, records)
    assert {name: part["n"] for name, part in summary["categories"].items()} == {"definicion": 2, "ejemplo": 2}
    assert summary["all"]["n"] == 4
    assert summary["tokens_per_second"] == 30.0


def test_answers_stand_side_by_side_with_their_prompt() -> None:
    rows = side_by_side(PROMPTS[:1], {"base": [{"error": "x"}], "tutor": [{"text": "y"}]})
    assert rows == [{**PROMPTS[0], "answers": {"base": {"error": "x"}, "tutor": {"text": "y"}}}]


def test_perplexity_is_weighted_by_token() -> None:
    result = perplexity([[-1.0], [-2.0, -2.0, -2.0]])
    assert (result["loss"], result["tokens"]) == (1.75, 4)
    assert result["perplexity"] == pytest.approx(math.exp(1.75))


@given(st.lists(st.lists(st.floats(-30, 0), min_size=1, max_size=5), min_size=1, max_size=5))
def test_perplexity_does_not_depend_on_how_tokens_are_grouped(rows: list[list[float]]) -> None:
    assert perplexity(rows)["loss"] == pytest.approx(
        perplexity([[value for row in rows for value in row]])["loss"], abs=1e-12
    )


@pytest.mark.parametrize("rows", [[[math.nan]], [[-math.inf, -1.0]], [[-800.0]], []])
def test_a_loss_that_is_no_number_is_an_error(rows: list[list[float]]) -> None:
    with pytest.raises(ArtifactError, match="held-out loss"):
        perplexity(rows)


def test_rows_are_lines_and_nothing_else_is_a_line_end(tmp_path: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a\u2028b"}\n{"instruction": "c"}\n', "utf-8")
    assert [row["instruction"] for row in read_rows(path)] == ["a\u2028b", "c"]
    path.write_text('{"instruction": ', "utf-8")
    with pytest.raises(ArtifactError, match=r"rows\.jsonl"):
        read_rows(path)


def test_the_closing_table_compares_the_models() -> None:
    models = {
        name: {"file": f"{name}-Q8_0", **summarise(PROMPTS, [judged(an_answer(text))] * 4)}
        for name, text in (("base", ENGLISH), ("tutor", SPANISH))
    }
    scores = {"base-Q8_0": perplexity([[-2.0]]), "tutor-Q8_0": perplexity([[-1.0]])}
    table = compare_table({"models": models, "perplexity": scores})
    assert table[0] == ("", "base", "tutor")
    assert ("in Spanish", "0 % (0/4)", "100 % (4/4)") in table
    assert ("held-out perplexity", "7.39", "2.72") in table
    assert ("tokens/s", "20.0", "20.0") in table
