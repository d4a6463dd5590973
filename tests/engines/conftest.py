"""Fixtures of several engines' tests: the tiny model under our chat template, and an engine of transformers for it."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model as the base stage makes it, with our chat template."""
    pytest.importorskip("torch")
    from support.models.tiny_models import edit, tiny_folder
    from support.shared import copied

    from tutor.prompt.tutor_format import chat_template

    folder = copied(tiny_folder(tmp_path_factory), tmp_path_factory.mktemp("chat_model") / "model")
    edit(folder / "tokenizer_config.json", chat_template=chat_template(add_bos=True))
    return folder


@pytest.fixture(scope="module")
def loaded(chat_model: Path) -> Any:
    """The engine of transformers with that model, in 32 bits."""
    from tutor.engines.hf.loading import load

    return load(chat_model, None, quantization="none", precision="fp32")
