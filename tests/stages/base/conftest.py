"""Fixtures of the base stage's tests."""

from pathlib import Path

import pytest
from support.shared import copied


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A whole model folder to damage."""
    return copied(tiny, tmp_path / "model")
