"""Fixtures of the tests of serving: a fake Ollama, a recipe, and a build folder whose model can be published."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fakes.ollama import FakeOllama
from support.fakes.ollama import running as running_ollama
from support.outputs.published import SYSTEM, make_stages

from tutor.recipe.settings import OllamaSettings, Recipe


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    """A running fake Ollama."""
    with running_ollama() as running:
        yield running


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe that serves Q8_0; its file is empty."""
    path = tmp_path / "small.toml"
    path.write_text("")
    return Recipe(system=SYSTEM, ollama=OllamaSettings(quantization="Q8_0"), path=path)


@pytest.fixture
def build(recipe: Recipe, tmp_path: Path) -> Path:
    """A build folder after convert, parity and modelfile, around a fake GGUF."""
    make_stages(recipe, tmp_path / "build")
    return tmp_path / "build"
