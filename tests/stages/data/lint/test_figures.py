"""stages/data/lint/figures.py: lengths in tokens, histograms, tables."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.outputs.lint_rows import GOOD, lint_rows, row

from tutor.errors import ArtifactError
from tutor.stages.data.lint.figures import histogram


def test_cross_table_counts_by_category_and_topic(tmp_path: Path) -> None:
    rows = [{**GOOD[0], "topic": "x"}, {**GOOD[1], "topic": "y"}, {**GOOD[3], "topic": "x"}]
    groups = lint_rows(tmp_path, rows).figures["groups"]
    assert groups == {"categories": ["a", "b"], "topics": ["x", "y"], "rows": [[2, 0], [0, 1]]}


def test_token_counts_equal_those_of_training(tmp_path: Path, tokenizer_file: Path) -> None:
    report = lint_rows(tmp_path, [row("¿Qué?", "abc")], tokenizer=tokenizer_file, system="Tú")
    text = "Tú\n\nInstrucción: ¿Qué?\nRespuesta: abc"
    assert report.figures["lengths"]["max"] == len(text.encode()) + len(["<eos>"])
    assert report.figures["lengths"]["unit"] == "tokens"


@pytest.mark.parametrize("characters", [700, 2100, 9000])
def test_row_over_the_limit_is_found_once_at_any_length(tmp_path: Path, tokenizer_file: Path, characters: int) -> None:
    rows = [row("¿Qué?", "x" * characters), row("¿Y qué?", "y" * 100)]
    report = lint_rows(tmp_path, rows, max_length=600, tokenizer=tokenizer_file)
    lengths = [each for each in report.findings if each.kind == "length"]
    assert [each.line for each in lengths] == [1]
    assert lengths[0].message.endswith("tokens; train.max_length is 600")
    assert report.figures["lengths"]["over"] == 1


def test_damaged_tokenizer_error_names_the_base_stage(tmp_path: Path, tokenizer_file: Path) -> None:
    tokenizer_file.write_text('{"version":', "utf-8")
    with pytest.raises(ArtifactError, match=r"damaged.*tutor base"):
        lint_rows(tmp_path, GOOD, tokenizer=tokenizer_file)


@given(st.lists(st.integers(0, 10**6), max_size=50))
def test_histogram_counts_each_value_once_in_few_bars(values: list[int]) -> None:
    bars = histogram(values)
    assert sum(bar["rows"] for bar in bars) == len(values)
    assert len(bars) <= 13
    assert all(bar["rows"] == sum(bar["start"] <= value < bar["end"] for value in values) for bar in bars)
