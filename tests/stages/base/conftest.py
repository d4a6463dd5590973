"""Fixtures of the base stage's tests."""

import json
from pathlib import Path

import pytest
from support.fakes.llamacpp_vocabulary import write_build
from support.shared import copied, shared


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A whole model folder to damage."""
    return copied(tiny, tmp_path / "model")


@pytest.fixture(scope="session")
def tiny_vocabulary(real: None, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama.cpp build that returns what the real one makes of the tiny model, without its seconds of imports."""
    from tutor.engines.llamacpp.convert import Conversion, to_gguf
    from tutor.engines.llamacpp.tokenize import tokenize
    from tutor.stages.base.check import canary_text

    def make(folder: Path) -> None:
        gguf = folder / "tiny.gguf"
        to_gguf(Conversion(tiny, gguf, "llama-bpe", vocabulary_only=True))
        (folder / "ids.json").write_text(json.dumps(tokenize(gguf, canary_text("<｜end▁of▁sentence｜>"))), "utf-8")

    made = shared(tmp_path_factory, "tiny_vocabulary", make)
    ids = json.loads((made / "ids.json").read_text("utf-8"))
    return write_build(tmp_path_factory.mktemp("llamacpp") / "build", made / "tiny.gguf", ids)


@pytest.fixture
def known_vocabulary(tiny_vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert every vocabulary as that of the tiny model."""
    monkeypatch.setenv("TUTOR_LLAMACPP", str(tiny_vocabulary))
