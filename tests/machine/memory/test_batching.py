"""Split of a step's rows into micro-batches."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutor.errors import RecipeError
from tutor.machine.memory.batching import MicroBatches, max_tokens, packed_batches, padded_batches, split_step
from tutor.recipe.settings import TrainSettings


def settings(**changes: Any) -> TrainSettings:
    """Train settings with twelve rows a step unless changed."""
    return TrainSettings.model_validate({"batch_size": 2, "accumulation": 6, **changes})


@pytest.mark.parametrize("packing", [True, False])
def test_step_rows_are_equal_for_any_number_of_processes(*, packing: bool) -> None:
    wanted, lengths = settings(packing=packing, pass_tokens=200), [30, 41, 52] * 4
    for count in (1, 2, 3, 4, 6, 12):
        passes = split_step(wanted, lengths, count)
        assert passes.step_rows == 12
        assert passes.rows <= 2 or packing
    with pytest.raises(RecipeError, match=r"5 processes cannot share the 12 rows of a step .* equally; start as many"):
        split_step(wanted, lengths, 5)
    two = split_step(settings(packing=False), lengths, 2)
    assert "12 rows a step in 2 processes, 2 a micro-batch" in str(two)


lengths_of = st.lists(st.integers(1, 600), min_size=1, max_size=40)


@given(step_rows=st.integers(1, 60), lengths=lengths_of, budget=st.integers(1, 5000))
def test_split_makes_fewest_micro_batches_within_token_limit(step_rows: int, lengths: list[int], budget: int) -> None:
    plan = packed_batches(step_rows, lengths, budget)
    assert plan.rows * plan.count == step_rows
    assert plan.packed == (plan.rows > 1)
    assert plan.tokens == sum(sorted(lengths)[-plan.rows :])  # the longest rows together
    assert plan.tokens <= budget or plan.rows == 1
    larger = [rows for rows in range(plan.rows + 1, step_rows + 1) if step_rows % rows == 0]
    assert all(sum(sorted(lengths)[-rows:]) > budget for rows in larger)


@given(rows=st.integers(1, 20), count=st.integers(1, 20), lengths=lengths_of)
def test_split_without_packing_uses_recipe_batch_size(rows: int, count: int, lengths: list[int]) -> None:
    plan = padded_batches(rows, count, lengths)
    assert (plan.rows, plan.count, plan.packed) == (rows, count, False)
    assert plan.tokens == min(rows, len(lengths)) * max(lengths)


@given(
    lengths=lengths_of, budget=st.integers(1, 5000), batch=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    packing=st.booleans(), room=st.integers(0, 300),
)  # fmt: skip
def test_max_tokens_bounds_every_micro_batch_of_shorter_rows(
    lengths: list[int], budget: int, batch: tuple[int, int], room: int, *, packing: bool
) -> None:
    chosen = settings(batch_size=batch[0], accumulation=batch[1], packing=packing, pass_tokens=budget)
    assert split_step(chosen, lengths).tokens <= max_tokens(chosen, [length + room for length in lengths])


def test_ten_rows_of_the_specification_fit_one_or_two_batches() -> None:
    assert packed_batches(10, [300] * 278, 4096) == MicroBatches(10, 1, 3000, packed=True)
    assert packed_batches(10, [480] * 278, 4096) == MicroBatches(5, 2, 2400, packed=True)
    assert packed_batches(10, [4097] * 278, 4096) == MicroBatches(1, 10, 4097, packed=False)
