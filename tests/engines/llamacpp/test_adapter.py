"""engines/llamacpp/adapter.py and src/convert_lora.py, with a fake converter and (marked llamacpp) the pinned build."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.models.random_llama import RECOGNISER

from tutor.engines.llamacpp.adapter import check_adapter, lora_to_gguf
from tutor.errors import ArtifactError, HostError

RANK, ALPHA = 4, 8
BASE = {"blk.0.attn_q.weight": (16, 16), "blk.0.attn_k.weight": (8, 16)}
"""Shapes of the base's matrices, rows first as in numpy; a GGUF has the columns first."""
CONVERTER = """
import argparse, json, os, shutil, sys
from pathlib import Path

here = Path(__file__).parent
if (here / "error.txt").exists():
    print((here / "error.txt").read_text())
    sys.exit(1)
parser = argparse.ArgumentParser()
for name in ("--base", "--outfile", "--outtype"):
    parser.add_argument(name)
parser.add_argument("adapter")
given = parser.parse_args()
from conversion.base import TextModel
model = TextModel()
model.prepare_metadata(vocab_only=False)
(here / "metadata.json").write_text(json.dumps(model.gguf_writer.metadata))
(here / "given.txt").write_text(f"{given.base} {given.outtype} {os.environ['HF_HUB_OFFLINE']}")
shutil.copy(here / "made.gguf", given.outfile)
"""


def write(path: Path, tensors: Mapping[str, tuple[int, ...]], architecture: str = "llama", **fields: Any) -> Path:
    """Write a GGUF with tensors of zeros and some fields; __ in a field's name stands for a dot."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(name.replace("__", "."), value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pairs(tensors: Mapping[str, tuple[int, int]] = BASE) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in tensors.items():
        found |= {f"{name}.lora_a": (RANK, columns), f"{name}.lora_b": (rows, RANK)}
    return found


FIELDS: dict[str, Any] = {"general__type": "adapter", "adapter__type": "lora", "adapter__lora__alpha": float(ALPHA)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.gguf", BASE)


def test_matching_adapter_returns_number_of_matrices(base: Path, tmp_path: Path) -> None:
    assert check_adapter(write(tmp_path / "lora.gguf", pairs(), **FIELDS), base) == 2


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("general__type", "model", "general.type is 'model' instead of 'adapter'"),
        ("general__type", None, "general.type is None"),
        ("adapter__type", "control_vector", "adapter.type is 'control_vector'"),
        ("adapter__lora__alpha", None, "alpha is None"),
        ("adapter__lora__alpha", 0.0, "alpha is 0.0"),
        ("adapter__lora__alpha", float("nan"), "alpha is nan"),
    ],
)
def test_file_without_adapter_metadata_is_refused(
    base: Path, tmp_path: Path, field: str, value: Any, what: str
) -> None:
    fields = {name: kept for name, kept in {**FIELDS, field: value}.items() if kept is not None}
    with pytest.raises(ArtifactError, match="is no LoRA of") as caught:
        check_adapter(write(tmp_path / "lora.gguf", pairs(), **fields), base)
    assert what in caught.value.message


def test_adapter_of_other_architecture_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"general\.architecture is 'gemma2' instead of 'llama'"):
        check_adapter(write(tmp_path / "lora.gguf", pairs(), "gemma2", **FIELDS), base)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"blk.0.attn_q.weight.lora_a": None}, "has only one of .lora_a and .lora_b"),
        ({"blk.0.attn_q.weight.lora_a": (RANK, 8)}, "attn_q.weight has the shapes (8, 4) and (4, 16) for (16, 16)"),
        ({"blk.0.attn_k.weight.lora_b": (16, RANK)}, "attn_k.weight has the shapes"),
        ({"blk.0.attn_k.weight.lora_b": (8, 2)}, "attn_k.weight has the shapes"),
        ({"blk.9.attn_k.weight.lora_a": (4, 16), "blk.9.attn_k.weight.lora_b": (8, 4)}, "the base has no blk.9"),
        ({"output_norm.weight": (16,)}, "output_norm.weight is no half of a pair"),
        (dict.fromkeys(pairs()) | {"x": (16,)}, "x is no half of a pair (and 1 more)"),
    ],
)
def test_matrices_that_do_not_fit_the_base_are_named(
    base: Path, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    tensors = {name: shape for name, shape in {**pairs(), **change}.items() if shape}
    with pytest.raises(ArtifactError) as caught:
        check_adapter(write(tmp_path / "lora.gguf", tensors, **FIELDS), base)
    assert what in caught.value.message


@pytest.fixture
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An adapter's folder, and in `build` a converter that makes a matching file of any adapter."""
    made: Path = request.getfixturevalue("build")
    (made / "convert_lora_to_gguf.py").write_text(CONVERTER)
    (made / "conversion").mkdir()
    (made / "conversion" / "base.py").write_text(RECOGNISER)
    write(made / "made.gguf", pairs(), **FIELDS)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "alpha_pattern": {}, "use_dora": false}')
    peft(folder, 0.0)
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))  # of the base's 16-bit folder
    return folder


def peft(folder: Path, value: float) -> None:
    """Write the weights of an adapter of BASE's matrices in PEFT's form."""
    tensors = {}
    for name, (rows, columns) in BASE.items():
        module = f"base_model.model.model.layers.0.self_attn.{name.split('_')[1][0]}_proj"
        for half, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            tensors[f"{module}.lora_{half}.weight"] = np.full(shape, value, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_converter_gets_the_base_and_no_network(base: Path, adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "lora.gguf"
    assert lora_to_gguf(adapter, tmp_path, base, target, {"tutor.base": "ours"}) == 2
    assert json.loads((tmp_path / "build/metadata.json").read_text()) == {"theirs": "False", "tutor.base": "ours"}
    assert (tmp_path / "build/given.txt").read_text() == f"{tmp_path} f16 1"
    assert target.read_bytes() == (tmp_path / "build/made.gguf").read_bytes()


@pytest.mark.parametrize(
    ("output", "error", "what"),
    [
        ("Traceback\nERROR: Unexpected name 'lm_head.weight'", ArtifactError, "Unexpected name 'lm_head.weight'"),
        ("ModuleNotFoundError: No module named 'torch'", HostError, "'torch'; make install"),
        ("", ArtifactError, "exit code 1"),
    ],
)
def test_converter_failure_is_reported_and_leaves_no_file(
    base: Path, adapter: Path, tmp_path: Path, output: str, error: type[Exception], what: str
) -> None:
    (tmp_path / "build/error.txt").write_text(output)
    with pytest.raises(error, match=what):
        lora_to_gguf(adapter, tmp_path, base, tmp_path / "lora.gguf")
    assert list(tmp_path.glob("lora.gguf*")) == []


def test_adapter_of_other_base_keeps_the_old_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "lora.gguf"
    target.write_bytes(b"the older one")
    write(tmp_path / "build/made.gguf", pairs({"blk.7.attn_q.weight": (16, 16)}), **FIELDS)
    with pytest.raises(ArtifactError, match=r"the base has no blk\.7"):
        lora_to_gguf(adapter, tmp_path, base, target)
    assert target.read_bytes() == b"the older one"
    assert list(tmp_path.glob("*.partial")) == []


def test_file_with_other_numbers_than_the_adapter_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    peft(adapter, 0.5)
    with pytest.raises(ArtifactError, match=r"differs from .*: blk\.0\.attn_\w\.weight\.lora_a has other numbers"):
        lora_to_gguf(adapter, tmp_path, base, tmp_path / "lora.gguf")
    assert list(tmp_path.glob("lora.gguf*")) == []


@pytest.mark.parametrize("setting", ["use_dora", "alpha_pattern", "modules_to_save"])
def test_unsupported_adapter_is_refused_before_conversion(
    base: Path, adapter: Path, tmp_path: Path, setting: str
) -> None:
    (adapter / "adapter_config.json").write_text(json.dumps({setting: {"q_proj": 32}}))
    with pytest.raises(ArtifactError, match=f"uses {setting}"):
        lora_to_gguf(adapter, tmp_path, base, tmp_path / "lora.gguf")
    assert not (tmp_path / "build/given.txt").exists()


def test_alpha_that_differs_from_the_adapters_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "use_rslora": true}')
    with pytest.raises(ArtifactError, match=r"has alpha 8, and .* 16"):  # alpha x sqrt(rank)
        lora_to_gguf(adapter, tmp_path, base, tmp_path / "lora.gguf")
    assert list(tmp_path.glob("lora.gguf*")) == []


@pytest.mark.llamacpp
@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("variant", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_base_with_adapter_scores_as_merged_model(
    variant: dict[str, Any], tmp_path: Path, tiny_with_adapter: Callable[..., tuple[Path, Path, Path]]
) -> None:
    from tutor.engines.llamacpp.convert import Conversion, to_gguf
    from tutor.engines.llamacpp.score import score
    from tutor.formats.models.gguf import read_gguf
    from tutor.formats.models.gguf_weights import adapter_weights_of, check_exact
    from tutor.formats.models.pre_tokenizer import pre_tokenizer_name

    model, adapter, merged = tiny_with_adapter(tmp_path, **variant)
    files = {"base": model, "merged": merged}
    for name, folder in files.items():
        to_gguf(Conversion(folder, tmp_path / f"{name}.gguf", pre_tokenizer_name(folder / "tokenizer.json")))
    lora = tmp_path / "lora.gguf"
    assert lora_to_gguf(adapter, model, tmp_path / "base.gguf", lora, {"tutor.adapter.sha256": "abc"}) == 8
    made = read_gguf(lora)
    assert made.fields["tutor.adapter.sha256"] == "abc"
    assert check_exact(lora, made, adapter_weights_of(adapter, model)) == [], "q's and k's rows are reordered in B"

    rows = [([1, 40, 41, 42, 90], [43, 44, 45, 46, 47, 48])]

    def scored(name: str, **more: Any) -> Any:
        return np.array(score(tmp_path / f"{name}.gguf", rows, threads=1, **more)[0].logprobs)

    merged_scores, base_scores = scored("merged"), scored("base")
    assert np.abs(scored("base", lora=lora) - merged_scores).max() < 0.05
    assert np.abs(base_scores - merged_scores).max() > 0.5, "the adapter has an effect"


@pytest.fixture
def tiny_with_adapter() -> Callable[..., tuple[Path, Path, Path]]:
    """Make a random Llama, an adapter of its q, k, v and o, and PEFT's merge of both; return their folders."""
    torch = pytest.importorskip("torch")
    from peft import PeftModel
    from support.models.random_llama import llama3_splitter, make_tiny
    from support.models.tiny_models import adapter_stage
    from transformers import AutoTokenizer, LlamaForCausalLM

    def make(folder: Path, **variant: Any) -> tuple[Path, Path, Path]:
        model = make_tiny(folder / "model", llama3_splitter())
        adapter = adapter_stage(model, folder / "adapter", "", **variant)
        merged = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
        merged.merge_and_unload().half().save_pretrained(folder / "merged")
        AutoTokenizer.from_pretrained(model).save_pretrained(folder / "merged")
        return model, adapter, folder / "merged"

    return make
