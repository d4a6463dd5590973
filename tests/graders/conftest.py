"""Fixtures of the graders' tests."""

import json
import sys
from pathlib import Path

import pytest
from support.fake_typescript import PRETEND

from tutor.graders.typescript import install as installer


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a compiler that only pretends; `runs` in it has a line a start."""
    program = tmp_path / "compiler" / "tsc"
    program.parent.mkdir()
    program.write_text(PRETEND.replace("@PYTHON@", sys.executable).replace("@HERE@", str(program.parent)), "utf-8")
    program.chmod(0o755)
    record = {"typescript": installer.VERSION, "program": "tsc", "size": program.stat().st_size}
    (program.parent / installer.MARKER).write_text(json.dumps(record), "utf-8")
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(program.parent))
    return program.parent
