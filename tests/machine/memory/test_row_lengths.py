"""Lengths of rows: counted, bounded by their characters, cut at the recipe's limit."""

import gzip
import os
from pathlib import Path

import pytest
from support.files import write_rows

from tutor.machine.memory.row_lengths import RowLengths, find_row_lengths, largest_batch
from tutor.recipe.settings import Recipe


def rows_of(recipe: Recipe, build: Path) -> RowLengths | None:
    return find_row_lengths(recipe, build, build / recipe.name / "base")


def test_row_lengths_prefer_the_split_over_the_file(machine, based_on, recipe_file, tmp_path):
    recipe = based_on("tiny")
    before = rows_of(recipe, tmp_path)
    split = tmp_path / "small" / "data"
    split.mkdir(parents=True)
    write_rows(split / "train.jsonl", [{"instruction": "¿?", "response": "a" * 2000}])
    after = rows_of(recipe, tmp_path)
    assert before.longest < 50
    assert 2000 / 3 < after.longest < 1000
    assert after.tokens < after.longest
    (split / "train.jsonl").unlink()
    prompted = rows_of(recipe.model_copy(update={"system": "s" * 1000}), tmp_path)
    assert before.longest + 1000 / 3 < prompted.longest < before.longest + 500


@pytest.mark.parametrize("text", ["", "[1]\n", "{\n", '{"instruction": 1, "response": 2}\n', "\udcff", "[" * 100_000])
def test_malformed_rows_have_no_lengths(machine, based_on, recipe_file, tmp_path, text):
    recipe_file.with_name("tutor.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert rows_of(based_on(), tmp_path) is None


def test_row_lengths_are_of_every_form_of_rows(machine, based_on, recipe_file, tmp_path):
    file = recipe_file.with_name("tutor.jsonl")
    plain = rows_of(based_on("tiny"), tmp_path)
    file.write_bytes(gzip.compress(b"\xef\xbb\xbf" + file.read_bytes()))
    assert rows_of(based_on("tiny"), tmp_path) == plain


def test_row_lengths_count_every_turn(machine, based_on, recipe_file, tmp_path):
    file = recipe_file.with_name("tutor.jsonl")
    turns = [{"role": role, "content": "a" * 400} for role in ("user", "assistant") * 3]
    write_rows(file, [{"messages": turns}])
    assert rows_of(based_on("tiny"), tmp_path).longest > 2400 / 3
    write_rows(file, [{"instruction": "a" * 300, "input": "a" * 100, "output": "b" * 500}])
    assert 900 / 3 < rows_of(based_on("tiny"), tmp_path).longest < 500


def test_row_lengths_do_not_wait_for_a_pipe(machine, based_on, recipe_file, tmp_path):
    recipe_file.with_name("tutor.jsonl").unlink()
    os.mkfifo(recipe_file.with_name("tutor.jsonl"))
    assert rows_of(based_on(), tmp_path) is None


def test_row_bounds_are_cut_at_max_length(based_on):
    train = based_on(max_length=256, batch_size=4, packing=False).train
    assert largest_batch(train, RowLengths([9000] * 9, 1)) == (1024, 256)
    assert largest_batch(train, RowLengths([100] * 9, 1)) == (400, 100)
    assert largest_batch(train, None) == (1024, 256)
