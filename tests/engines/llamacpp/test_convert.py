"""engines/llamacpp/convert.py and src/convert.py, with fake programs and (marked llamacpp) with the pinned build."""

import itertools
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from support.fakes.llamacpp import script
from support.fakes.llamacpp_vocabulary import write_gguf_package
from support.models.random_llama import RECOGNISER, TEXTS, make_tiny

from tutor.engines.llamacpp.build import VERSION
from tutor.engines.llamacpp.convert import Conversion, imatrix, quantize, to_gguf
from tutor.engines.llamacpp.process import programs
from tutor.engines.llamacpp.server import serve
from tutor.errors import ArtifactError, HostError, RecipeError
from tutor.formats.models.pre_tokenizer import pre_tokenizer_name
from tutor.recipe.quantizations import KINDS, NEED_IMATRIX, NOT_MADE, SECOND_NAMES

CONVERTER = """
import argparse, json, os
from pathlib import Path
import gguf.vocab
from conversion.base import TextModel

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    for name in ("--outfile", "--outtype", "--model-name"):
        parser.add_argument(name)
    parser.add_argument("--vocab-only", action="store_true")
    given = vars(parser.parse_args())
    print("hola, converting")
    model = TextModel()
    given["pre"] = model.get_vocab_base_pre("a tokenizer")
    model.prepare_metadata(vocab_only=False)
    given["metadata"] = model.gguf_writer.metadata
    given["architectures"] = TextModel.load_hparams(given["model"], False)["architectures"]
    special = gguf.vocab.SpecialVocab()
    for kind, id_ in (("bos", 0), ("pad", -1), ("eos", [1, 2])):
        special._set_special_token(kind, id_)
    given["ids"] = special.ids
    given["files"] = TextModel.get_model_part_names(Path(given["model"]), "model", ".safetensors")
    given["gguf"] = gguf.__file__
    given["process"] = os.getpid()
    Path(given["outfile"]).write_text(json.dumps(given))
"""

COPY = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])\n"


# Quantization


def write_gguf(path: Path, file_type: int | None) -> Path:
    import numpy as np

    writer = GGUFWriter(path, "llama")
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_quantized_file_gets_its_name_when_complete(build: Path, tmp_path: Path) -> None:
    script(build, "llama-quantize", COPY)
    source, target = write_gguf(tmp_path / "a.gguf", 1), tmp_path / "q.gguf"
    quantize(source, target, "Q4_K_M", 1)
    assert target.read_bytes() == source.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.gguf*")) == ["a.gguf", "q.gguf"]


@pytest.mark.parametrize("ending", ["sys.exit(3)", "os.kill(os.getpid(), 9)"])
def test_failed_quantization_keeps_old_file_and_no_partial(build: Path, tmp_path: Path, ending: str) -> None:
    script(build, "llama-quantize", f"import os, sys; open(sys.argv[2], 'w').write('half')\n{ending}")
    target = tmp_path / "q.gguf"
    target.write_text("old", "utf-8")
    with pytest.raises((ArtifactError, HostError)):
        quantize(write_gguf(tmp_path / "a.gguf", 1), target, "Q8_0", 1)
    assert target.read_text("utf-8") == "old"
    assert not list(tmp_path.glob("*.partial"))


def test_full_disk_raises_host_error(build: Path, tmp_path: Path) -> None:
    script(build, "llama-quantize", "import sys; print('basic_ios::clear: iostream error'); sys.exit(1)")
    with pytest.raises(HostError, match="disk is full"):
        quantize(write_gguf(tmp_path / "a.gguf", 1), tmp_path / "q.gguf", "Q8_0", 1)


def test_quantizer_error_is_in_the_message(build: Path, tmp_path: Path) -> None:
    output = "quantizing 'a' to 'b'\\nfailed to quantize: tensor 'x' is odd\\nllama_quantize: failed to quantize model"
    script(build, "llama-quantize", f"import sys; print({output!r}.replace('\\\\n', chr(10))); sys.exit(1)")
    with pytest.raises(ArtifactError, match="to Q8_0: failed to quantize: tensor 'x' is odd"):
        quantize(write_gguf(tmp_path / "a.gguf", 1), tmp_path / "q.gguf", "Q8_0", 1)


@pytest.mark.parametrize("file_type", [2, 7, 15, 17])
def test_quantized_source_is_refused_with_specified_text(build: Path, tmp_path: Path, file_type: int) -> None:
    with pytest.raises(RecipeError, match=r"already quantized .* FP16/FP32 \(specification, 7\.2\)") as raised:
        quantize(write_gguf(tmp_path / "a.gguf", file_type), tmp_path / "q.gguf", "Q4_K_M", 1)
    assert raised.value.code == 2


@pytest.mark.parametrize("file_type", [0, 1, 32])
def test_16_and_32_bit_sources_are_quantized(build: Path, tmp_path: Path, file_type: int) -> None:
    script(build, "llama-quantize", COPY)
    quantize(write_gguf(tmp_path / "a.gguf", file_type), tmp_path / "q.gguf", "Q8_0", 1)


def test_source_without_file_type_is_refused(build: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="GUESSED"):
        quantize(write_gguf(tmp_path / "a.gguf", None), tmp_path / "q.gguf", "Q8_0", 1)


def test_unknown_quantization_raises_recipe_error(build: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'Q9_X'"):
        quantize(write_gguf(tmp_path / "a.gguf", 1), tmp_path / "q.gguf", "Q9_X", 1)


def test_matrix_is_passed_by_name_and_types_by_full_names(build: Path, tmp_path: Path) -> None:
    """The file keeps the name as it is given: two build folders must give the same bytes."""
    script(build, "llama-quantize", "import json, os, sys; open(sys.argv[-3], 'w').write(json.dumps(sys.argv[1:]))")
    source, target = write_gguf(tmp_path / "a.gguf", 1), tmp_path / "q.gguf"
    (tmp_path / "m.imatrix").touch()
    types = {"blk.1.attn_q.weight": "Q8_0"}
    quantize(source, target, "Q4_K_M", 3, matrix=tmp_path / "m.imatrix", types=types)
    given = json.loads(target.read_text("utf-8"))
    assert given[:4] == ["--imatrix", "m.imatrix", "--tensor-type", r"^blk\.1\.attn_q\.weight$=q8_0"]
    assert (given[4], given[6:]) == (str(source), ["Q4_K_M", "3"])


def test_relative_paths_are_resolved_for_the_quantizer(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(build, "llama-quantize", "import shutil, sys; shutil.copy(*sys.argv[-4:-2])")
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "a.gguf", 1)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m.imatrix").touch()
    quantize(Path("a.gguf"), Path("q.gguf"), "Q4_K_M", 1, matrix=Path("sub/m.imatrix"))
    assert (tmp_path / "q.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


# Importance matrix


@pytest.mark.parametrize(("tokens", "piece"), [(100_000, 512), (1024, 512), (1023, 256), (70, 32), (3, 32)])
def test_imatrix_chunk_fits_the_text(build: Path, tmp_path: Path, tokens: int, piece: int) -> None:
    writes = "import json, sys; a = sys.argv; open(a[a.index('-o') + 1], 'w').write(json.dumps(a[1:]))"
    script(build, "llama-imatrix", writes)
    (tmp_path / "train.txt").touch()
    imatrix(tmp_path / "a.gguf", tmp_path / "train.txt", tmp_path / "a.imatrix", tokens, 2)
    given = json.loads((tmp_path / "a.imatrix").read_text("utf-8"))
    options = dict(itertools.pairwise(given))
    assert (options["-f"], options["-c"], options["-t"]) == ("train.txt", str(piece), "2")
    assert {"--parse-special", "--no-ppl"} <= set(given)
    assert not list(tmp_path.glob("*.partial"))


def test_failed_imatrix_leaves_no_file(build: Path, tmp_path: Path) -> None:
    script(build, "llama-imatrix", "import sys; print('error: you need at least 64 tokens'); sys.exit(1)")
    with pytest.raises(ArtifactError, match=r"importance matrix.*64 tokens"):
        imatrix(tmp_path / "a.gguf", tmp_path / "train.txt", tmp_path / "a.imatrix", 1, 1)
    assert list(tmp_path.glob("*imatrix*")) == []


# Conversion


def source(folder: Path) -> None:
    """Make a folder to convert, without weights."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_text('{"model_type": "llama"}', "utf-8")


@pytest.fixture
def converter(build: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Make a converter that identifies every tokenizer by a given name, or none; return the build's folder."""

    def make(name: str) -> Path:
        (build / "conversion").mkdir()
        (build / "convert_hf_to_gguf.py").write_text(CONVERTER, "utf-8")
        (build / "conversion" / "base.py").write_text(RECOGNISER, "utf-8")
        (build / "conversion" / "identified.txt").write_text(name, "utf-8")
        write_gguf_package(build)
        source(tmp_path)
        return build

    return make


def converted(tmp_path: Path, pre: str, **metadata: str) -> dict[str, Any]:
    target = tmp_path / "tutor-F16.gguf"
    to_gguf(Conversion(tmp_path, target, pre, metadata))
    return json.loads(target.read_text("utf-8"))


def test_unknown_tokenizer_gets_our_name(converter: Callable[[str], Path], tmp_path: Path) -> None:
    build = converter("")
    given = converted(tmp_path, "llama-bpe")
    assert (given["pre"], given["outtype"], given["model_name"]) == ("llama-bpe", "f16", "tutor")
    assert given["gguf"] == str(build / "gguf-py" / "gguf" / "__init__.py")
    assert not list(tmp_path.glob("*.partial"))


def test_metadata_is_written_after_that_of_the_converter(converter: Callable[[str], Path], tmp_path: Path) -> None:
    converter("")
    given = converted(tmp_path, "llama-bpe", **{"tutor.base": "año «'\"", "tutor.version": "1"})
    assert list(given["metadata"].items()) == [("theirs", "False"), ("tutor.base", "año «'\""), ("tutor.version", "1")]
    assert converted(tmp_path, "llama-bpe")["metadata"] == {"theirs": "False"}


def test_converter_reads_the_architecture_and_no_negative_id(converter: Callable[[str], Path], tmp_path: Path) -> None:
    """config.json may lack the architecture, and old ones have -1 where there is no token."""
    converter("")
    given = converted(tmp_path, "llama-bpe")
    assert given["architectures"] == ["LlamaForCausalLM"]
    assert given["ids"] == {"bos": 0, "eos": [1, 2]}
    assert given["files"] == ["model.safetensors"]  # llama.cpp would take every file that begins with "model"
    assert not given["vocab_only"]
    to_gguf(Conversion(tmp_path, tmp_path / "v.gguf", "llama-bpe", vocabulary_only=True))
    assert json.loads((tmp_path / "v.gguf").read_text("utf-8"))["vocab_only"]


@pytest.mark.parametrize(("known", "pre"), [("smollm", "smollm"), ("starcoder", "smollm"), ("falcon3", "llama-bpe")])
def test_converter_name_for_same_splitting_is_kept(
    converter: Callable[[str], Path], tmp_path: Path, known: str, pre: str
) -> None:
    converter(known)
    assert converted(tmp_path, pre)["pre"] == known


@pytest.mark.parametrize("pre", ["llama-bpe", ""])
def test_converter_name_for_other_splitting_raises(converter: Callable[[str], Path], tmp_path: Path, pre: str) -> None:
    converter("smollm")
    with pytest.raises(ArtifactError, match="identifies this tokenizer as 'smollm'"):
        converted(tmp_path, pre)
    assert not list(tmp_path.glob("*.gguf*"))


def test_unknown_tokenizer_without_name_raises_with_its_hash(converter: Callable[[str], Path], tmp_path: Path) -> None:
    converter("")
    with pytest.raises(ArtifactError) as raised:
        converted(tmp_path, "")
    assert raised.value.code == 5
    for part in ("ab" * 32, VERSION, "tokenizer changed?"):
        assert part in str(raised.value)


def test_models_are_converted_in_one_process(converter: Callable[[str], Path], tmp_path: Path) -> None:
    converter("")
    targets = {name: tmp_path / f"{name}-F16.gguf" for name in ("tutor", "base")}
    to_gguf(*(Conversion(tmp_path, target, "llama-bpe", {"name": name}) for name, target in targets.items()))
    given = {name: json.loads(target.read_text("utf-8")) for name, target in targets.items()}
    assert {name: each["metadata"]["name"] for name, each in given.items()} == {"tutor": "tutor", "base": "base"}
    assert len({each["process"] for each in given.values()}) == 1


def test_failed_second_model_is_named_and_leaves_no_file(converter: Callable[[str], Path], tmp_path: Path) -> None:
    converter("smollm")
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        source(folder)
    with pytest.raises(ArtifactError, match=f"cannot convert {bad}: the converter identifies"):
        to_gguf(Conversion(good, tmp_path / "a.gguf", "smollm"), Conversion(bad, tmp_path / "b.gguf", "llama-bpe"))
    assert not list(tmp_path.glob("*.gguf*"))


def test_converter_failure_is_reported_by_its_last_line(converter: Callable[[str], Path], tmp_path: Path) -> None:
    converter("broken")
    with pytest.raises(ArtifactError, match=r"ValueError: Can not map tensor '.*absmax'") as raised:
        converted(tmp_path, "llama-bpe")
    assert "\n" not in str(raised.value)


# The pinned build


def smollm_splitter() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])


@pytest.mark.llamacpp
@pytest.mark.parametrize("bos", [True, False])
def test_other_splitting_is_tokenized_as_transformers(real: None, tmp_path: Path, bos: bool) -> None:  # noqa: FBT001
    from transformers import AutoTokenizer

    folder = make_tiny(tmp_path, smollm_splitter(), bos=bos)
    to_gguf(Conversion(folder, folder / "a-F16.gguf", pre_tokenizer_name(folder / "tokenizer.json")))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with serve(folder / "a-F16.gguf", context=64, threads=1, log=folder / "log") as server:
        assert [server.tokenize(text) for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.mark.llamacpp
def test_recipe_quantizations_are_known_to_the_quantizer(real: None) -> None:
    done = subprocess.run([programs().quantize, "--help"], capture_output=True, text=True, check=False)
    listed = re.findall(r"^ +\d+ +or +(\w+) ", done.stdout, re.MULTILINE)
    assert len(listed) > 30
    assert {*KINDS, *SECOND_NAMES, *NOT_MADE} >= set(listed)
    assert set(KINDS) <= set(listed)


@pytest.mark.llamacpp
def test_only_kinds_that_need_a_matrix_fail_without_one(random_llama: Path, tmp_path: Path) -> None:
    def makes(kind: str) -> bool:
        try:
            quantize(random_llama / "tiny-F16.gguf", tmp_path / "q.gguf", kind, 1)
        except ArtifactError:
            return False
        return True

    refused = {kind for kind in KINDS if not makes(kind)}
    assert refused <= set(NEED_IMATRIX)
