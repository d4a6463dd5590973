"""recipe/trackers.py: the names of train.report_to, and packages that are not installed."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tutor.errors import HostError, RecipeError
from tutor.recipe.reading import read_recipe
from tutor.recipe.trackers import TRACKERS, refuse_missing_trackers


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ('["wand"]', r"is 'wand': is no tracker that transformers knows; known: .*wandb"),
        ('["all"]', "is no tracker"),
        ('["tensorboard"]', "always written"),
        ('"wandb"', "report_to"),
    ],
)
def test_unknown_tracker_is_refused_with_the_known_ones(tmp_path: Path, names: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f"[train]\nreport_to = {names}\n", "utf-8")
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)


def test_no_tracker_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("", "utf-8")
    assert read_recipe(tmp_path / "r.toml").train.report_to == []


def test_missing_package_is_refused_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "comet_ml", raising=False)
    with pytest.raises(HostError, match="comet_ml, and its package is not installed; pip install comet-ml,"):
        refuse_missing_trackers(["comet_ml"])
    fake = ModuleType("comet_ml")
    fake.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "comet_ml", fake)
    refuse_missing_trackers(["comet_ml"])


def test_trackers_are_those_of_transformers() -> None:
    integrations = pytest.importorskip("transformers.integrations.integration_utils")
    assert {*TRACKERS, "tensorboard", "kubeflow"} == set(integrations.INTEGRATION_TO_CALLBACK)
