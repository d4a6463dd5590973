"""stages/report/baselines.py: the comparison with ways without training, on the page and on the terminal."""

import re

from support.outputs.report import Page, compared, manifest

from tutor.stages.report.baselines import baseline_lines, current
from tutor.stages.report.stage import page
from tutor.stages.report.view import StageOutputs


def test_page_has_the_ways_and_the_sentence(outputs: StageOutputs) -> None:
    text = re.sub(r"\s+", " ", Page(page(outputs)).text)
    assert "Best: tutor <8 of 9>; fine-tuning pays." in text
    assert "tutor89 % (8/9)" in text.replace(" tutor", "tutor")
    assert "base + 5 examples is left out: it is too long." in text


def test_lines_hold_scores_intervals_costs_and_verdicts() -> None:
    lines = [" ".join(line.split()) for line in baseline_lines(compared())]
    assert "base 0 % (0/9) +89 [+50, +100] better 42 200 1.2" in lines
    assert "tutor 89 % (8/9) – – –" in lines
    assert "9 held-out prompts score tutor - it (95 %) prompt answer seconds" in lines
    assert "base 100 % 100 % 0 %" in lines
    assert lines[-1] == "Best: tutor <8 of 9>; fine-tuning pays."
    few = [" ".join(line.split()) for line in baseline_lines(compared(measure="chrf", left_out={"x": "too long"}))]
    assert "base 11.0 +22 no difference shown 42 200 1.2" in few
    assert "left out: x: too long" in few


def test_comparison_of_another_tutor_is_not_current() -> None:
    made = manifest("eval-baselines", compared())
    assert current(made, manifest("convert", {}, None, tutor__Q8_0=1)) == made.results
    assert current(made, manifest("convert", {})) is None
    assert current(None, manifest("convert", {})) is None
    assert current(made, None) is None
