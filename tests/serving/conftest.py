"""Fixtures of the tests of serving: a fake Ollama, a recipe, and a build folder whose model can be published."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fakes.ollama import FakeOllama
from support.fakes.ollama import running as running_ollama
from support.outputs.published import make_recipe, make_stages

from tutor.engines.ollama.client import Ollama, connect
from tutor.recipe.settings import Recipe


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    """A running fake Ollama."""
    with running_ollama() as running:
        yield running


@pytest.fixture
def api(server: FakeOllama) -> Iterator[Ollama]:
    """A client of the fake Ollama."""
    with connect(server.host, silent=2, pause=0.01) as connection:
        yield connection


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe that serves Q8_0; its file is empty."""
    return make_recipe(tmp_path)


@pytest.fixture
def build(recipe: Recipe, tmp_path: Path) -> Path:
    """A build folder after convert, parity and modelfile, around a fake GGUF."""
    return make_stages(recipe, tmp_path / "build")
