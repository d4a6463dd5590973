"""docs/bases.md names every family of the table, each value of `reasoning`, and what a row of the matrix means."""

from typing import get_args

from support.processes.command import ROOT

from tutor.formats.architectures import ARCHITECTURES
from tutor.recipe.settings import Recipe
from tutor.serving.matrix import COLUMNS

PAGE = (ROOT / "docs" / "bases.md").read_text("utf-8")


def test_page_has_a_row_for_every_family() -> None:
    for family in ARCHITECTURES.values():
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{family.model_type}` |"))
        assert f"| `{family.gguf}` |" in row


def test_page_explains_every_reasoning_and_column() -> None:
    for value in get_args(Recipe.model_fields["reasoning"].annotation):
        assert f'| `"{value}"` |' in PAGE
    table = next(line for line in PAGE.splitlines() if line.startswith("family, prompt"))
    assert table.split()[2:] == [*COLUMNS.values(), "seconds"]
