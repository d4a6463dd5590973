"""cli/verdict_tables.py: how each model was asked, beside its figures; test_summary.py has the other tables."""

from typing import Any

from tutor.cli.verdict_tables import comparison_lines, verdict_lines
from tutor.stages.evaluate.rates import changes, summarise

PROMPTS = [{"instruction": f"¿{number}?", "category": "a"} for number in range(4)]


def records(ends: str) -> list[dict[str, Any]]:
    """Answers that end as named by a letter each: e, s or l."""
    verdicts = {"e": (True, True), "s": (True, False), "l": (False, False)}
    return [
        {"passed": False, "tokens": 9, "tokens_per_second": 5.0,
         "verdicts": {"stopped": verdicts[end][0], "ended": verdicts[end][1], "characters": 3}}
        for end in ends
    ]  # fmt: skip


def model(ends: str, asked: str) -> dict[str, Any]:
    return {**summarise(PROMPTS, records(ends), 1), "asked": asked}


def test_ends_are_told_apart_and_models_asked_alike_share_a_line():
    models = {"base": model("elll", "its own"), "base-as-tutor": model("essl", "ours"), "tutor": model("eees", "ours")}
    lines = [" ".join(line.split()) for line in verdict_lines({"models": models})]
    assert "ended by itself 25 % (1/4) 25 % (1/4) 75 % (3/4)" in lines
    assert "not cut 25 % (1/4) 75 % (3/4) 100 % (4/4)" in lines
    assert lines[-2:] == ["base: asked with its own", "base-as-tutor, tutor: asked with ours"]


def test_comparison_names_how_both_were_asked_where_known():
    found = {"before": "old", "after": "tutor", "n": 4, "left_out": {"before": 0, "after": 0}}
    found |= {"asked": {"before": "", "after": "ours"}, **changes(PROMPTS, records("eess"), records("eeee"), 1)}
    assert comparison_lines(found)[:4] == ["A: old", "B: tutor", "   asked with ours", "4 prompts answered by both"]
