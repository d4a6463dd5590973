"""engines/answer_limit.py: the longest trained answer decides what an answer may have, or is named where it is cut."""

from pathlib import Path

import pytest

from tutor.artifacts.stage_folder import writing
from tutor.engines.answer_limit import answer_limit, check_answers, longest_answer, with_answer_limit
from tutor.engines.protocol import sampling
from tutor.errors import ArtifactError, RecipeError
from tutor.prompt.encoding import Encoded
from tutor.recipe.settings import GenerateSettings, Recipe

AUTO = Recipe(generate=GenerateSettings(max_new_tokens="auto", context=640))


def trained(folder: Path, tokens: int) -> Path:
    """A train stage's folder whose longest answer has so many tokens."""
    with writing(folder, "train", {}) as (_, results):
        results["longest_answer"] = {"tokens": tokens, "line": 7}
    return folder


def test_longest_answer_is_of_one_turn_and_names_its_row() -> None:
    turns = Encoded([0] * 9, [0, 1, 1, 0, 0, 1, 1, 1, 1], line=3)
    rows = [Encoded([0] * 8, [0] * 5 + [1] * 3, line=2), turns]
    assert longest_answer(rows) == {"tokens": 4, "line": 3}


@pytest.mark.parametrize(("longest", "limit"), [(1, 10), (9, 10), (10, 20), (400, 440), (401, 450), (515, 570)])
def test_limit_has_a_tenth_more_in_whole_tens(longest: int, limit: int) -> None:
    assert answer_limit(longest) == limit


def test_auto_is_the_longest_trained_answer_and_a_margin(tmp_path: Path) -> None:
    found = with_answer_limit(AUTO, trained(tmp_path / "adapter", 401))
    assert sampling(found.generate, 7).max_new_tokens == 450
    assert found.generate.context == 640


def test_auto_without_a_training_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"generate.max_new_tokens is 'auto'; run: tutor train"):
        with_answer_limit(AUTO, tmp_path)


def test_auto_beyond_the_context_names_the_row(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tutor.jsonl:7: the answer has 600 tokens, and generate.context is 640"):
        with_answer_limit(AUTO, trained(tmp_path / "adapter", 600))


def test_number_is_kept_and_reads_no_folder(tmp_path: Path) -> None:
    assert with_answer_limit(Recipe(), tmp_path) == Recipe()


def test_answer_that_a_number_cuts_is_named() -> None:
    file = Path("mine.jsonl")
    assert check_answers(Recipe(), {"tokens": 515, "line": 4}, file) is None
    cut = check_answers(Recipe(), {"tokens": 516, "line": 4}, file)
    assert cut is not None
    assert cut.startswith("mine.jsonl:4: the answer has 516 tokens, generate.max_new_tokens cuts it at 515")
