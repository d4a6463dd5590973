"""Fixtures of the llama.cpp engine's tests."""

from pathlib import Path

import pytest
from support.fake_llamacpp import script

from tutor.engines.llamacpp.build import PROGRAMS


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a whole build; its programs are scripts, and do what `script` makes them do."""
    folder = tmp_path / "build"
    (folder / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        script(folder, name, "")
    monkeypatch.setenv("TUTOR_LLAMACPP", str(folder))
    return folder
