"""stages/base/stage.py and formats/models/base_source.py: refused folders, known and unknown sources."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny_models import edit, in_two_shards, recipe, tensors

torch = pytest.importorskip("torch")
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers

from tutor.errors import ArtifactError, HostError, RecipeError, TutorError
from tutor.formats.models import base_source
from tutor.formats.models.model_folder import check_model_folder, load_tokenizer, read_facts
from tutor.stages.base import stage as base
from tutor.stages.base import tiny_model

REVISION = "0123456789abcdef0123456789abcdef01234567"
pytestmark = pytest.mark.usefixtures("one_thread")


def refused(model: Path, kind: type[TutorError] = ArtifactError) -> str:
    """The message of the error with which the stage refuses a folder."""
    out = model.with_name(model.name + "-out")
    out.mkdir()
    with pytest.raises(kind) as caught:
        base.run(recipe(model.parent / "r.toml", base={"source": f"path:{model.name}"}), {}, out)
    assert not (out / "base.json").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "kind"), [({"quant_method": "gptq"}, "gptq"), ({}, "unknown"), (["awq"], "unknown")]
)
def test_quantized_base_is_refused(model: Path, settings: Any, kind: str) -> None:
    edit(model / "config.json", quantization_config=settings)
    assert f"is already quantized ({kind}); the base must be 16-bit" in refused(model)


def test_null_quantization_config_is_accepted(model: Path) -> None:
    edit(model / "config.json", quantization_config=None)
    check_model_folder(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickled_weights_are_refused_unopened(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"cposix\nsystem\n(S'exit 1'\ntR.")
    assert f"has its weights as pickles ({name}), which can run code" in refused(model)


def test_folder_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "holds no model.safetensors and no model.safetensors.index.json" in refused(model)


def test_base_with_code_is_refused(model: Path) -> None:
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Net"})
    assert "brings code of its own (auto_map), which is never run" in refused(model)


@pytest.mark.parametrize("kind", ["phi3", None])
def test_another_architecture_is_refused(model: Path, kind: str | None) -> None:
    edit(model / "config.json", model_type=kind)
    assert f"is a {kind!r} model; tutor tunes llama, qwen2, qwen3" in refused(model)


def test_missing_shard_is_named(model: Path) -> None:
    missing = sorted(in_two_shards(model).glob("*.safetensors"))[1]
    missing.unlink()
    assert f"lacks {missing.name}, which its index names; fetch them again" in refused(model)


def test_index_without_weight_map_is_damaged(model: Path) -> None:
    edit(in_two_shards(model) / "model.safetensors.index.json", drop="weight_map")
    assert "model.safetensors.index.json is damaged" in refused(model)


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_truncated_weights_are_damaged(model: Path, keep: int) -> None:
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:keep])
    assert "model.safetensors is damaged" in refused(model)


def test_weights_of_no_16_bit_type_are_refused(model: Path) -> None:
    weights, name = tensors(model), "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].view(dtype=torch.uint8)}, model / "model.safetensors")
    assert f"{name} is U8, no 16-bit weight; conversion can fail with models already quantized" in refused(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", ["", '{"model_type": "lla', "[1, 2]", "\ufeff{}", "null", "{}"])
def test_damaged_json_error_is_one_line_with_the_file(model: Path, name: str, content: str) -> None:
    (model / name).write_text(content, "utf-8")
    message = refused(model)
    assert str(model) in message
    assert "\n" not in message


def test_missing_configuration_is_named(model: Path) -> None:
    (model / "config.json").unlink()
    assert f"{model / 'config.json'} is missing" in refused(model)


def test_tokenizer_without_eos_is_refused(model: Path) -> None:
    edit(model / "tokenizer_config.json", eos_token=None, tokenizer_class="PreTrainedTokenizerFast")
    assert "no EOS token, so no answer could learn to end" in refused(model)


def test_tokenizer_larger_than_the_embedding_is_refused(model: Path) -> None:
    made = Tokenizer.from_file(str(model / "tokenizer.json"))
    made.add_tokens(["@@@@@@"])
    made.save(str(model / "tokenizer.json"))
    assert "the tokenizer has 1025 tokens, the weights 1024" in refused(model)


def test_vocab_size_unlike_the_embedding_is_refused(model: Path) -> None:
    edit(model / "config.json", vocab_size=2000)
    assert "config.json says vocab_size 2000, the weights have 1024 rows" in refused(model)


def test_weights_without_an_embedding_are_refused(model: Path) -> None:
    held = tensors(model)
    del held["model.embed_tokens.weight"]
    save_file(held, model / "model.safetensors")
    assert "has no model.embed_tokens.weight" in refused(model)


def test_tokenizer_that_drops_blanks_is_refused_with_text(model: Path) -> None:
    # As transformers 5.3 to 5.21 read a byte-level tokenizer.json with this class
    made = Tokenizer.from_file(str(model / "tokenizer.json"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    made.save(str(model / "tokenizer.json"))
    message = refused(model)
    assert "does not give a text back: '¿Qué es una interfaz" in message
    assert re.search(r"became '[^ ]*esunainterfazenTypeScript", message)


@pytest.mark.parametrize(
    "source",
    [
        "hub:../model@" + REVISION,
        "hub:acme/mo--del@" + REVISION,
    ],
)
def test_hub_name_that_none_can_have_lists_the_known_ones(source: str, tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "r.toml", base={"source": source})
    with pytest.raises(RecipeError) as caught:
        base.run(wanted, base_source.source_files(wanted), tmp_path)
    assert caught.value.code == 2
    assert repr(source) in caught.value.message
    assert "hub:OWNER/NAME@40-HEX-REVISION, path:FOLDER, package:MODULE/FILE.gguf, tiny" in str(caught.value.hint)


def test_missing_folder_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"names .*/gone, which is not a folder") as caught:
        base_source.source_files(recipe(tmp_path / "r.toml", base={"source": "path:gone"}))
    assert caught.value.code == 2


def test_missing_package_is_a_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="the package not_there is not installed") as caught:
        base_source.source_files(recipe(tmp_path / "r.toml", base={"source": "package:not_there/a.gguf"}))
    assert caught.value.code == 4


def test_local_folder_is_used_in_place(model: Path, known_vocabulary: None, tmp_path: Path) -> None:
    wanted = recipe(tmp_path / "r.toml", base={"source": "path:model"})
    out = tmp_path / "base"
    out.mkdir()
    before = {path: path.read_bytes() for path in model.iterdir()}
    base.run(wanted, {}, out)
    facts, folder = read_facts(out)
    assert folder == model
    assert [path.name for path in out.iterdir()] == ["base.json"]
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert base_source.source_files(wanted).keys() == {path.name for path in model.iterdir()}
    edit(out / "base.json", drop="eos")
    with pytest.raises(ArtifactError, match="of another version"):
        read_facts(out)
    assert facts.source == "path:model"


def test_facts_of_the_tiny_model_are_correct(tiny: Path) -> None:
    facts = base.facts_of(tiny, "tiny", "model")
    tokenizer = load_tokenizer(tiny)
    assert facts.vocabulary == len(tokenizer) == tensors(tiny)["lm_head.weight"].shape[0]
    assert facts.add_bos
    assert tokenizer("a")["input_ids"].count(facts.bos) == 1
    assert (facts.bos, facts.eos, facts.pad) == (1017, 1018, 1018)
    assert facts.pre_tokenizer == "llama-bpe"
    assert re.fullmatch(r"[0-9a-f]{64}", facts.weights)


@pytest.mark.parametrize("form", ["gzip", "byte order mark", "array"])
def test_tiny_base_reads_the_forms_of_rows_that_data_reads(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": "¿Qué?", "response": "Eso."}, {"instruction": "¿Y?", "response": "Nada."}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    name, content = {
        "gzip": ("rows.jsonl.gz", gzip.compress(lines)),
        "byte order mark": ("rows.jsonl", b"\xef\xbb\xbf" + lines),
        "array": ("rows.json", json.dumps(rows, indent=1).encode()),
    }[form]
    (tmp_path / name).write_bytes(content)
    made_of = []
    monkeypatch.setattr(tiny_model, "make_tiny", lambda model, text, seed: made_of.append(text))
    with pytest.raises(ArtifactError, match=r"config\.json"):  # of the folder that the replaced function did not make
        base.run(recipe(tmp_path / "r.toml", base={"source": "tiny"}, data={"train": name}), {}, tmp_path / "base")
    assert made_of == ["¿Qué?\nEso.\n\n¿Y?\nNada."]
