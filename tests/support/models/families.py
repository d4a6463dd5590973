"""The tiny model of each family, made once a test run: its tokenizer has learnt the first rows of the data set."""

from pathlib import Path

import pytest

from support.models.tiny_models import SEED, spanish
from support.shared import shared
from tutor.stages.base import tiny_families
from tutor.stages.base.tiny_families import BIASED, FAMILIES, PREFIXED, VOCABULARY, WINDOWED

__all__ = ["BIASED", "FAMILIES", "PREFIXED", "VOCABULARY", "WINDOWED", "family_folder", "make_family"]


def family_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a tiny model's folder, made once a test run; a test that changes something takes a copy."""
    return shared(factory, f"family_{name}", lambda folder: make_family(folder, name))


def make_family(folder: Path, name: str) -> Path:
    """Write the tiny random model `name` of FAMILIES into `folder`; return the folder."""
    return tiny_families.make_family(folder, name, spanish(), SEED)
