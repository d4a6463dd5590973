"""stages/convert/stage.py and the reading of GGUF files, and (marked llamacpp) a whole run on a tiny random Llama."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.files import write_rows
from support.gguf_bytes import ARCHITECTURE, facts, field, tensor, text, whole
from support.random_llama import llama3_splitter, make_tiny

from tutor.errors import ArtifactError, HostError
from tutor.formats.models.gguf import Gguf, Tensor, read_gguf
from tutor.formats.models.gguf_metadata import (
    check_gguf,
    count_fallbacks,
    implied_metadata,
    metadata_differences,
    metadata_of,
)
from tutor.prompt import CAPABILITY_WORDS, adds_bos, chat_template
from tutor.recipe.settings import ConvertSettings, OllamaSettings, Recipe
from tutor.stages.convert import stage

# Reading


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    numbers = field("n", 9, struct.pack("<IQ3h", 3, 3, 1, -2, 3))
    words = field("w", 9, struct.pack("<IQ", 8, 2) + text("año") + text(""))
    flag, ratio = field("f", 7, b"\1"), field("r", 6, struct.pack("<f", 0.5))
    (tmp_path / "a.gguf").write_bytes(whole((ARCHITECTURE, numbers, words, flag, ratio)))
    read = read_gguf(tmp_path / "a.gguf")
    assert read.fields == {"general.architecture": "llama", "n": [1, -2, 3], "w": ["año", ""], "f": True, "r": 0.5}
    assert read.tensors == {"a": Tensor("F32", (8,))}


def test_an_unpadded_last_tensor_and_another_alignment_are_whole(tmp_path: Path) -> None:
    two = (tensor("a", (3,)), tensor("b", (3,), offset=64))
    alignment = field("general.alignment", 4, struct.pack("<I", 64))
    (tmp_path / "a.gguf").write_bytes(whole((alignment,), two, b"\0" * 64 + b"\0" * 12, alignment=64))
    assert list(read_gguf(tmp_path / "a.gguf").tensors) == ["a", "b"]


HUGE = 1 << 62
DAMAGED = {
    "empty": b"",
    "magic only": b"GGUF",
    "web page": b"<!DOCTYPE html><html>",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "safetensors": struct.pack("<Q", 2) + b"{}",
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "version 0": whole(head=b"GGUF" + struct.pack("<I", 0)),
    "version 1": whole(head=b"GGUF" + struct.pack("<I", 1)),
    "version 99": whole(head=b"GGUF" + struct.pack("<I", 99)),
    "huge tensor count": b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0),
    "huge key count": b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE),
    "no tensors": whole(tensors=(), data=b""),
    "string beyond the end": whole((struct.pack("<Q", HUGE) + b"a",)),
    "string of another encoding": whole((field("a", 8, struct.pack("<Q", 2) + b"\xff\xfe"),)),
    "huge array of numbers": whole((field("a", 9, struct.pack("<IQ", 5, 1 << 40)),)),
    "huge array of strings": whole((field("a", 9, struct.pack("<IQ", 8, 1 << 40)),)),
    "array in an array": whole((field("a", 9, struct.pack("<IQ", 9, 1)),)),
    "unknown type": whole((field("a", 77, b""),)),
    "empty key": whole((field("", 4, b"\0" * 4),)),
    "key twice": whole((ARCHITECTURE, ARCHITECTURE)),
    "tensor twice": whole(tensors=(tensor(), tensor(offset=32)), data=b"\1" * 64),
    "no dimension": whole(tensors=(tensor(shape=()),)),
    "five dimensions": whole(tensors=(tensor(shape=(8, 1, 1, 1, 1)),)),
    "zero dimension": whole(tensors=(tensor(shape=(8, 0)),)),
    "negative dimension": whole(tensors=(tensor(shape=((1 << 64) - 8,)),)),
    "product that wraps around": whole(tensors=(tensor(shape=(1 << 32, 1 << 32, 2)),)),
    "unknown tensor type": whole(tensors=(tensor(kind=4),)),
    "row that is no multiple of its block": whole(tensors=(tensor(shape=(33,), kind=8),)),
    "alignment 0": whole((field("general.alignment", 4, struct.pack("<I", 0)),)),
    "alignment 3": whole((field("general.alignment", 4, struct.pack("<I", 3)),)),
    "alignment of a signed type": whole((field("general.alignment", 5, struct.pack("<i", 32)),)),
    "alignment of text": whole((field("general.alignment", 8, text("32")),)),
    "offset beyond the end": whole(tensors=(tensor(offset=1 << 40),)),
    "offset before its neighbour's end": whole(tensors=(tensor("a"), tensor("b")), data=b"\1" * 64),
    "offset that is not aligned": whole(tensors=(tensor(offset=1),)),
    "last bytes cut": whole()[:-16],
    "half": whole()[: len(whole()) // 2],
    "junk behind": whole() + b"\0" * 32,
}


@pytest.mark.parametrize("fault", DAMAGED)
@pytest.mark.timeout(5)
def test_a_damaged_file_is_an_artifact_error_that_names_it(tmp_path: Path, fault: str) -> None:
    (tmp_path / "a.gguf").write_bytes(DAMAGED[fault])
    with pytest.raises(ArtifactError, match=r"a\.gguf is no whole GGUF: .") as raised:
        read_gguf(tmp_path / "a.gguf")
    assert raised.value.code == 5
    assert "\n" not in str(raised.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    content = whole((ARCHITECTURE, field("n", 9, struct.pack("<IQ3h", 3, 3, 1, -2, 3))))
    for size in range(len(content)):
        (tmp_path / "a.gguf").write_bytes(content[:size])
        with pytest.raises(ArtifactError):
            read_gguf(tmp_path / "a.gguf")


def test_a_missing_file_is_an_artifact_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        read_gguf(tmp_path / "a.gguf")


# What a file says

SAID: dict[str, Any] = {
    "general.architecture": "llama",
    "general.file_type": 15,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": ["a", "b", "c"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": chat_template(add_bos=True),
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.rope.freq_base": 500000.0,
}
TENSORS = {"token_embd.weight": Tensor("Q4_K", (256, 3)), "rope_freqs.weight": Tensor("F32", (8,))}
EXPECTED = metadata_of(Gguf(SAID, TENSORS))


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in SAID.items() if key != name}


@pytest.mark.parametrize(
    ("said", "tensors", "line"),
    [
        ({**SAID, "general.architecture": "qwen2"}, TENSORS, "architecture: expected 'llama', found 'qwen2'"),
        ({**SAID, "general.file_type": 7}, TENSORS, "file_type: expected 'Q4_K_M', found 'Q8_0'"),
        ({**SAID, "general.file_type": 4711}, TENSORS, "file_type: expected 'Q4_K_M', found 'type 4711'"),
        ({**SAID, "tokenizer.ggml.tokens": ["a"]}, TENSORS, "vocabulary: expected 3, found 1"),
        ({**SAID, "tokenizer.ggml.eos_token_id": 0}, TENSORS, "eos: expected 1, found 0"),
        (without("tokenizer.ggml.eos_token_id"), TENSORS, "eos: expected 1, found None"),
        ({**SAID, "tokenizer.ggml.pre": "default"}, TENSORS, "pre_tokenizer: expected 'llama-bpe', found 'default'"),
        ({**SAID, "tokenizer.ggml.model": "llama"}, TENSORS, "pre_tokenizer: expected 'llama-bpe', found ''"),
        ({**SAID, "tokenizer.ggml.add_bos_token": False}, TENSORS, "add_bos: expected True, found False"),
        (without("tokenizer.ggml.add_bos_token"), TENSORS, "add_bos: expected True, found None"),
        ({**SAID, "llama.context_length": 2048}, TENSORS, "context: expected 512, found 2048"),
        ({**SAID, "llama.block_count": 1}, TENSORS, "blocks: expected 2, found 1"),
        (without("llama.rope.freq_base"), TENSORS, "rope_base: expected 500000.0, found 10000.0"),
        (SAID, {"token_embd.weight": Tensor("Q4_K", (256, 3))}, "rope_factors: expected True, found False"),
        (SAID, {**TENSORS, "token_embd.weight": Tensor("Q4_K", (256, 4))}, "embedding_rows: expected 3, found 4"),
        (SAID, {**TENSORS, "extra.weight": Tensor("F32", (8,))}, "tensors: expected 2, found 3"),
        ({**SAID, "tokenizer.chat_template": "{{ tools }}"}, TENSORS, "chat_template: expected "),
    ],
)
def test_whatever_a_file_says_otherwise_is_a_line_of_its_own(
    said: dict[str, Any], tensors: dict[str, Tensor], line: str
) -> None:
    lines = metadata_differences(EXPECTED, metadata_of(Gguf(said, tensors)))
    assert [found for found in lines if found.startswith(line)]


def test_a_file_as_expected_has_no_differences() -> None:
    assert metadata_differences(EXPECTED, metadata_of(Gguf(dict(SAID), dict(TENSORS)))) == []


def test_another_name_of_the_same_splitting_is_as_expected() -> None:
    said = {**SAID, "tokenizer.ggml.pre": "falcon3"}
    assert metadata_differences(EXPECTED, metadata_of(Gguf(said, TENSORS))) == []


def test_the_base_s_own_template_is_not_compared() -> None:
    said = {**SAID, "tokenizer.chat_template": "{{ tools }}"}
    expected = replace(EXPECTED, chat_template=None)
    assert metadata_differences(expected, metadata_of(Gguf(said, TENSORS))) == []


def test_gpt_2_s_splitting_adds_no_bos_where_the_file_is_silent() -> None:
    said = {**without("tokenizer.ggml.add_bos_token"), "tokenizer.ggml.pre": "gpt-2"}
    assert metadata_of(Gguf(said, TENSORS)).add_bos is False


def test_every_difference_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(whole())
    with pytest.raises(ArtifactError) as raised:
        check_gguf(tmp_path / "a.gguf", EXPECTED)
    told = str(raised.value).split("\n  ")
    assert "a.gguf" in told[0]
    assert len(told) > 8


@pytest.mark.parametrize(
    ("kind", "types", "count"),
    [
        ("Q4_K_M", ["Q4_K", "Q6_K", "F32"], 0),
        ("Q4_K_M", ["Q5_0", "Q8_0", "Q6_K"], 2),
        ("Q6_K", ["Q6_K", "Q8_0"], 1),
        ("Q8_0", ["Q8_0", "F16"], 1),
        ("Q5_0", ["Q5_0", "Q8_0"], 1),
        ("F16", ["F16", "F32"], 0),
    ],
)
def test_matrices_of_another_type_than_asked_for_are_counted(kind: str, types: list[str], count: int) -> None:
    tensors = {str(n): Tensor(item, (32, 2) if item != "F32" else (32,)) for n, item in enumerate(types)}
    tensors["token_embd.weight"] = tensors["output.weight"] = Tensor("Q8_0", (32, 2))
    assert count_fallbacks(Gguf({}, tensors), kind) == count


# The model folder


def folder(path: Path, weights: dict[str, Any] | None = None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    settings = {"model_type": "llama", "num_hidden_layers": 2, "max_position_embeddings": 512, "rope_theta": 1e6}
    (path / "config.json").write_text(json.dumps({**settings, **config}), "utf-8")
    given = {"model.embed_tokens.weight": np.zeros((3, 8), np.float16), "model.norm.weight": np.zeros(8, np.float16)}
    save_file(given if weights is None else weights, path / "model.safetensors")
    return path


def test_a_folder_says_what_its_file_must_say(tmp_path: Path) -> None:
    expected = implied_metadata(folder(tmp_path / "m", pad_token_id=2), facts())
    assert (expected.embedding_rows, expected.blocks, expected.context, expected.tensors) == (3, 2, 512, 2)
    assert (expected.rope_base, expected.rope_factors) == (1e6, False)
    assert (expected.bos, expected.eos, expected.pad) == (0, 1, 2)
    assert (expected.file_type, expected.pre_tokenizer) == ("F16", "llama-bpe")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}},
    ],
)
def test_llama_3_scaling_is_seen_in_the_words_of_every_version(tmp_path: Path, rope: dict[str, Any]) -> None:
    expected = implied_metadata(folder(tmp_path / "m", **rope), facts())
    assert (expected.rope_base, expected.rope_factors, expected.tensors) == (5e5, True, 3)


def test_four_bit_weights_do_not_reach_the_converter(tmp_path: Path) -> None:
    packed = {"model.layers.0.self_attn.q_proj.weight": np.zeros((32, 1), np.uint8)}
    with pytest.raises(
        ArtifactError, match=r"q_proj.weight is U8, no 16-bit weight; .*already quantized.*needs one in FP16/FP32"
    ):
        implied_metadata(folder(tmp_path / "m", packed), facts())


def test_a_quantized_folder_is_refused_by_its_configuration(tmp_path: Path) -> None:
    model = folder(tmp_path / "m", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ArtifactError, match="already quantized"):
        implied_metadata(model, facts())


def test_a_missing_shard_is_told_before_the_converter_runs(tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ArtifactError, match="lacks model-00002-of-00002"):
        implied_metadata(model, facts())


def test_damaged_weights_are_an_artifact_error(tmp_path: Path) -> None:
    model = folder(tmp_path / "m")
    (model / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is damaged"):
        implied_metadata(model, facts())


def test_a_folder_without_an_embedding_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"lacks 'model\.embed_tokens\.weight'"):
        implied_metadata(folder(tmp_path / "m", {"a": np.zeros(2, np.float16)}), facts())


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.mkdir()
    config = {"hidden_size": 1 << 20, "num_hidden_layers": 100, "intermediate_size": 1 << 20, "vocab_size": 1000}
    (model / "config.json").write_text(json.dumps({**config, "num_attention_heads": 64}))
    with pytest.raises(HostError, match="GB free, converting needs") as raised:
        stage._require_disk([(model, ["Q8_0"])], tmp_path)
    assert raised.value.code == 4


# A whole run


@pytest.fixture(scope="module")
def inputs(real: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the base stage and of the merge stage, as a tiny random Llama has them."""
    from transformers import AutoTokenizer

    home = tmp_path_factory.mktemp("build")
    base, merged = home / "base", home / "merged"
    make_tiny(base / "model", llama3_splitter())
    make_tiny(merged, llama3_splitter())
    (merged / "chat_template.jinja").write_text(chat_template(add_bos=True), "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    found = facts(
        vocabulary=len(tokenizer),
        add_bos=adds_bos(tokenizer),
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
    )
    (base / "base.json").write_text(json.dumps(asdict(found)), "utf-8")
    adapter, data = home / "adapter", home / "data"
    for made in (adapter, data):
        made.mkdir()
    save_file({"a.lora_A.weight": np.zeros((8, 8), np.float32)}, adapter / "adapter_model.safetensors")
    write_rows(data / "train.jsonl", [{"instruction": f"¿Qué es {n}?", "response": "Un tipo. " * 20} for n in range(9)])
    return {"base": base, "merge": merged, "train": adapter, "data": data}


def recipe(*kinds: Any, base: bool = True, served: str = "Q4_K_M") -> Recipe:
    return Recipe(
        convert=ConvertSettings(quantizations=list(kinds), base=base), ollama=OllamaSettings(quantization=served)
    )


@pytest.fixture(scope="module")
def made(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("gguf")
    return out, stage.run(recipe("Q8_0", "Q4_K_M"), inputs, out)


@pytest.mark.llamacpp
def test_a_run_makes_every_file_of_the_recipe_and_no_other(made: tuple[Path, dict[str, Any]]) -> None:
    out, results = made
    names = {"tutor-F16.gguf", "tutor-Q8_0.gguf", "tutor-Q4_K_M.gguf", "base-Q4_K_M.gguf"}
    assert {path.name for path in out.iterdir()} == names == set(results["files"])
    assert {name: entry["size"] for name, entry in results["files"].items()} == {
        path.name: path.stat().st_size for path in out.iterdir()
    }
    assert results["files"]["tutor-Q8_0.gguf"]["fallback_tensors"] == 0
    # Rows of 64 and 128 do not divide into blocks of 256.
    assert results["files"]["tutor-Q4_K_M.gguf"]["fallback_tensors"] == 14
    assert results["pre_tokenizer"] == "llama-bpe"


@pytest.mark.llamacpp
def test_the_tutor_s_files_carry_our_template_and_no_capability(made: tuple[Path, dict[str, Any]]) -> None:
    for path in made[0].glob("tutor-*.gguf"):
        template = read_gguf(path).fields["tokenizer.chat_template"]
        assert template == chat_template(add_bos=True)
        assert not [word for word in CAPABILITY_WORDS if word in template]


@pytest.mark.llamacpp
def test_our_reader_agrees_with_gguf_s_own(made: tuple[Path, dict[str, Any]]) -> None:
    for path in made[0].iterdir():
        ours, theirs = read_gguf(path), gguf.GGUFReader(path)
        fields = {name: item.contents() for name, item in theirs.fields.items() if not name.startswith("GGUF.")}
        assert ours.fields == fields
        assert {name: (item.kind, item.shape) for name, item in ours.tensors.items()} == {
            item.name: (item.tensor_type.name, tuple(item.shape.tolist())) for item in theirs.tensors
        }


@pytest.mark.llamacpp
def test_a_second_run_gives_the_same_bytes_and_a_served_f16_keeps_the_base_so(
    made: tuple[Path, dict[str, Any]], inputs: dict[str, Path], tmp_path: Path
) -> None:
    stage.run(recipe("Q8_0", served="F16"), inputs, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tutor-F16.gguf", "tutor-Q8_0.gguf", "base-F16.gguf"}
    for name in ("tutor-F16.gguf", "tutor-Q8_0.gguf"):
        assert (tmp_path / name).read_bytes() == (made[0] / name).read_bytes()


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    ("name", "sabotage", "line"),
    [
        ("chat_template.jinja", lambda text: text.replace("Respuesta", "Answer"), "chat_template: expected"),
        ("tokenizer_config.json", lambda text: text.replace('"eos_token": "</s>"', '"eos_token": "<s>"'), "eos: "),
        ("tokenizer.json", lambda text: drop(text, "post_processor"), "add_bos: expected True, found None"),
        (
            "config.json",
            lambda text: text.replace('"rope_type": "llama3"', '"rope_type": "default"'),
            "rope_factors: expected True, found False",
        ),
    ],
)
def test_a_merged_folder_that_was_changed_does_not_become_a_tutor(
    inputs: dict[str, Path], tmp_path: Path, name: str, sabotage: Callable[[str], str], line: str
) -> None:
    merged = shutil.copytree(inputs["merge"], tmp_path / "merged")
    changed = sabotage((merged / name).read_text("utf-8"))
    assert changed != (merged / name).read_text("utf-8")
    (merged / name).write_text(changed, "utf-8")
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match=line):
        stage.run(recipe("Q8_0", base=False, served="Q8_0"), {**inputs, "merge": merged}, tmp_path / "out")


def drop(text: str, key: str) -> str:
    return json.dumps({**json.loads(text), key: None})


@pytest.mark.llamacpp
def test_auto_makes_the_base_in_every_quantization_and_a_matrix_of_the_training_rows_where_asked(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    asked = ConvertSettings(quantizations=["Q8_0", "IQ4_NL"], imatrix=True)
    results = stage.run(Recipe(convert=asked, ollama=OllamaSettings(quantization="auto")), inputs, tmp_path)
    models = {f"{name}-{kind}.gguf" for name in ("tutor", "base") for kind in ("F16", "Q8_0", "IQ4_NL")}
    assert set(results["files"]) == models
    assert {path.name for path in tmp_path.iterdir()} == models | {"tutor.imatrix", "base.imatrix"}
    said = read_gguf(tmp_path / "tutor-IQ4_NL.gguf").fields
    assert (said["quantize.imatrix.file"], said["quantize.imatrix.dataset"]) == ("tutor.imatrix", "train.txt")


@pytest.mark.llamacpp
def test_files_carry_their_lineage_through_quantization(made: tuple[Path, dict[str, Any]]) -> None:
    lineage = made[1]["lineage"]
    assert {"tutor.data.sha256", "tutor.adapter.sha256", "tutor.merged.sha256", "tutor.tools"} <= set(lineage)
    for name in ("tutor-F16.gguf", "tutor-Q4_K_M.gguf"):
        assert lineage.items() <= dict(read_gguf(made[0] / name).fields).items()
    base = read_gguf(made[0] / "base-Q4_K_M.gguf").fields
    assert "tutor.base.sha256" in base
    assert "tutor.adapter.sha256" not in base, "it was never trained"


def test_an_importance_matrix_reads_the_rows_as_the_model_was_trained_on_them() -> None:
    rows = [{"instruction": "¿A?", "response": "Uno."}, {"instruction": "¿B?", "response": "Dos."}]
    text = stage.calibration_text(rows, "Sistema.", "<s>", "</s>")
    one = "Sistema.\n\nInstrucción: ¿A?\nRespuesta: Uno.</s><s>Sistema.\n\nInstrucción: ¿B?\nRespuesta: Dos.</s>"
    assert text == one
    assert len(stage.calibration_rows(rows * 10_000)) * 11 == pytest.approx(
        stage.CALIBRATION_CHARACTERS / len("¿A?Uno.") * 11, rel=0.1
    )
