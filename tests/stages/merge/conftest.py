"""Fixtures of the merge stage's tests: a base with an adapter, merged once or to be changed."""

from pathlib import Path

import pytest
from support.models.tiny_models import edit
from support.shared import copied

torch = pytest.importorskip("torch")

from support.models.merging import MergeStages


@pytest.fixture(scope="module")
def merged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> MergeStages:
    """A plain merge, not to be changed."""
    made = MergeStages(tiny, tmp_path_factory.mktemp("plain"))
    made.results = made.merge()  # type: ignore[attr-defined]
    return made


@pytest.fixture
def stages(merged: MergeStages, tmp_path: Path) -> MergeStages:
    """A copy of the inputs of `merged`, to be changed."""
    made = object.__new__(MergeStages)
    for name in ("model", "base", "adapter"):
        setattr(made, name, copied(getattr(merged, name), tmp_path / name))
    edit(made.base / "base.json", model=str(made.model))
    made.out = tmp_path / "merged"
    return made
