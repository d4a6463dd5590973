"""A build folder with one quantized file, and a spec of it."""

import pytest

from tutor.prompt.tutor_format import GO_TEMPLATE, STOPS
from tutor.stages.modelfile.spec import ModelSpec
from tutor.stages.modelfile.stage import ollama_parameters

GENERATE = {"max_new_tokens": 515, "temperature": 0.003, "top_p": 0.85, "repetition_penalty": 1.15, "context": 4096}


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A build folder with a quantized file, as the convert stage leaves it."""
    folder = tmp_path_factory.mktemp("build")
    (folder / "gguf").mkdir()
    (folder / "gguf" / "tutor-Q4_K_M.gguf").write_bytes(b"GGUF")
    return folder


@pytest.fixture(scope="module")
def spec(build):
    parameters = ollama_parameters(GENERATE, 42, STOPS)
    return ModelSpec("tutor", build / "gguf" / "tutor-Q4_K_M.gguf", GO_TEMPLATE, parameters)
