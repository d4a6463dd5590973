"""stages/report/prompts.py: filters, answers, and the parts of an answer."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.outputs.report import EVIL, Page, prompts_with_answers, record

from tutor.stages.report.prompts import parts, prompts
from tutor.stages.report.stage import page
from tutor.stages.report.view import StageOutputs


def test_every_kind_and_verdict_has_a_filter(outputs: StageOutputs) -> None:
    html = page(outputs)
    shown = Page(html)
    listed = prompts(outputs.answers)
    assert [(each["label"], each["count"]) for each in listed["kinds"]] == [
        ("(no kind)", 3), ("aplicacion", 3), ("correccion", 3)
    ]  # fmt: skip
    assert {each["class"]: each["count"] for each in listed["verdicts"]} == {
        "pass": 6, "fail": 3, "won": 3, "lost": 3, "f-compiles": 3
    }  # fmt: skip
    inputs = {each["id"] for each in shown.all("input")}
    classes = [set(str(each["class"]).split()) for each in shown.all("details") if "prompt" in str(each["class"])]
    assert len(classes) == 10  # one of the prompts is a paraphrase
    for each in (*listed["kinds"], *listed["verdicts"]):
        assert f"show-{each['class']}" in inputs
        assert f"#prompts:has(#show-{each['class']}:checked) .prompt:not(.{each['class']})" in html
        assert sum(each["class"] in found for found in classes[:9]) == each["count"]


def test_failed_and_empty_answers_are_shown(outputs: StageOutputs) -> None:
    failed = {"error": "timed out", "passed": False, "reasons": ["no answer"]}
    item = {**prompts_with_answers()[0], "answers": {"base": failed, "tutor": record(passed=False, text="")}}
    text = Page(page(replace(outputs, answers=[item]))).text
    assert "No answer: timed out" in text
    assert "(empty)" in text


def test_conversation_and_thought_are_shown_beside_the_answer(outputs: StageOutputs) -> None:
    earlier = [{"role": "system", "content": EVIL}, {"role": "user", "content": "¿Y <b>antes</b>?"}]
    earlier.append({"role": "assistant", "content": "Antes.\n\n```ts\nlet b = 2;\n```"})
    given = {**record(passed=True, text=" Ahora."), "thought": f"Pienso {EVIL}"}
    item = {**prompts_with_answers()[0], "history": earlier, "answers": {"tutor": given}}
    shown = Page(page(replace(outputs, answers=[item])))
    assert (shown.open, shown.wrong) == ([], [])
    text = " ".join(shown.text.split())
    assert "System text" in text
    assert "Earlier question¿Y <b>antes</b>?" in text
    assert "Earlier answerAntes.```ts let b = 2; ```" in text
    assert "· turn 2" in text
    assert re.search(r"Thought \(\d+ words\)Pienso .*Ahora\.", text)
    assert not {"script", "img"} & {tag for tag, _ in shown.tags}


def test_copied_answer_shows_the_training_row(outputs: StageOutputs) -> None:
    copied = {"run": 40, "share": 0.8, "line": 12, "text": "…"}
    item = {**prompts_with_answers()[0], "answers": {"tutor": {**record(passed=True), "copied": copied}}}
    assert (
        "80 % of the answer (40 consecutive words and punctuation marks) is copied from the training row of line 12"
        in " ".join(Page(page(replace(outputs, answers=[item]))).text.split())
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("hola", [(False, "hola")]),
        ("a\n\n```ts\nx\n```\n\nb", [(False, "a"), (True, "```ts\nx\n```"), (False, "b")]),
        ("```\nnever closed\n\n  x", [(True, "```\nnever closed\n\n  x")]),
        ("- a\n  ```\n  x\n  ```\nb", [(False, "- a"), (True, "  ```\n  x\n  ```"), (False, "b")]),
        ("~~~\n```\n~~~\nb", [(True, "~~~\n```\n~~~"), (False, "b")]),
        ("````md\n```\n````\nb", [(True, "````md\n```\n````"), (False, "b")]),
        ("a\rb\r\n```\r\nx\r\n\r\n```", [(False, "a\nb"), (True, "```\nx\n\n```")]),
        ("```\n```\nb\n```", [(True, "```\n```"), (False, "b"), (True, "```")]),
    ],
)
def test_answer_is_split_at_its_fences_without_loss(text: str, expected: list[tuple[bool, str]]) -> None:
    assert [(part["code"], part["text"]) for part in parts(text)] == expected


@given(
    st.lists(st.sampled_from(["```", "~~~", "````ts", "\n", "\r\n", "  ", "> ", "- ", "x", "<div>", "\u2028"])).map(
        "".join
    )
)
def test_parts_of_any_answer_lose_only_line_ends(text: str) -> None:
    assert "".join(part["text"] for part in parts(text)).replace("\n", "") == text.replace("\r", "").replace("\n", "")
