"""Fixtures of the graders' tests: a fake compiler, and the real one."""

import json
import sys
from pathlib import Path

import pytest
from support.fakes.typescript import COMPILER

from tutor.graders.typescript import install as installer


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a fake compiler; its file `runs` has a line for each run."""
    program = tmp_path / "compiler" / "tsc"
    program.parent.mkdir()
    program.write_text(COMPILER.replace("@PYTHON@", sys.executable).replace("@HERE@", str(program.parent)), "utf-8")
    program.chmod(0o755)
    record = {"typescript": installer.VERSION, "program": "tsc", "size": program.stat().st_size}
    (program.parent / installer.MARKER).write_text(json.dumps(record), "utf-8")
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(program.parent))
    return program.parent


@pytest.fixture
def compiler() -> Path:
    """The program of the pinned compiler; skips where it is not installed."""
    if not installer.is_installed():
        pytest.skip("the TypeScript compiler is not installed; run: make typescript")
    return installer.find_compiler()
