"""Fixtures of the llama.cpp engine's tests: a fake build, and a random Llama for the pinned one."""

from pathlib import Path
from typing import Any

import pytest
from support.fakes.llamacpp import script
from support.models.random_llama import llama3_splitter, make_tiny

from tutor.engines.llamacpp.build import PROGRAMS
from tutor.engines.llamacpp.convert import Conversion, to_gguf
from tutor.formats.models.pre_tokenizer import pre_tokenizer_name


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete fake build; its programs are scripts, which `script` replaces."""
    folder = tmp_path / "build"
    (folder / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        script(folder, name, "")
    monkeypatch.setenv("TUTOR_LLAMACPP", str(folder))
    return folder


@pytest.fixture(scope="session")
def random_llama(real: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama, with its F16 GGUF beside the weights."""
    folder = make_tiny(tmp_path_factory.mktemp("random_llama"), llama3_splitter())
    to_gguf(Conversion(folder, folder / "tiny-F16.gguf", pre_tokenizer_name(folder / "tokenizer.json")))
    return folder


@pytest.fixture(scope="session")
def tokenizer(random_llama: Path) -> Any:
    """The tokenizer of the random Llama."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(random_llama)


@pytest.fixture(scope="session")
def model(random_llama: Path) -> Any:
    """The random Llama in transformers, in 32 bits."""
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(random_llama, dtype=torch.float32).eval()
