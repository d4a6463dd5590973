"""stages/base/check.py, formats/models/model_config.py, engines/llamacpp/tokenize.py: bases that are unfit."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny_models import edit, in_two_shards, recipe, tensors

torch = pytest.importorskip("torch")
from safetensors.torch import save_file

from tutor.engines.llamacpp.build import build_key
from tutor.errors import ArtifactError
from tutor.formats.models.base_source import source_files
from tutor.formats.models.model_folder import read_facts
from tutor.formats.models.safetensors import INDEX, read_folder
from tutor.stages.base import stage as base

Change = Callable[[Path], object]

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 499723\n"


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 512}


def run(model: Path) -> dict[str, Any]:
    out = model.with_name("out")
    out.mkdir()
    return base.run(recipe(model.parent / "r.toml", base={"source": f"path:{model.name}"}), {}, out)


def refusal(model: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        run(model)
    assert caught.value.code == 5
    assert "\n" not in str(caught.value)
    return str(caught.value)


def config(**changes: Any) -> Change:
    return lambda model: edit(model / "config.json", **changes)


def tokenizer(**changes: Any) -> Change:
    return lambda model: edit(model / "tokenizer.json", **changes)


def held(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the tensors of the folder's weight file."""

    def write(model: Path) -> None:
        weights = tensors(model)
        change(weights)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    return write


def mapped(file: Any) -> Change:
    """Name a file in the index for one tensor."""

    def write(model: Path) -> None:
        index = in_two_shards(model) / INDEX
        named = json.loads(index.read_text("utf-8"))["weight_map"]
        edit(index, weight_map={**named, UP: file})

    return write


def written(name: str, text: str) -> Change:
    return lambda model: (model / name).write_text(text, "utf-8")


def removed(name: str) -> Change:
    return lambda model: (model / name).unlink()


def stale_single(model: Path) -> None:
    (model / "model.safetensors").rename(model / "kept")
    shutil.copy(model / "kept", model / "model.safetensors")
    in_two_shards(model)
    (model / "kept").rename(model / "model.safetensors")


def twice(model: Path) -> None:
    first, second = sorted(in_two_shards(model).glob("*.safetensors"))
    shutil.copy(first, second)


def untied(model: Path) -> None:
    edit(model / "config.json", tie_word_embeddings=True)


def adds_eos(model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text("utf-8"))
    after = tokenizer["post_processor"]
    after["special_tokens"]["</s>"] = {"id": "</s>", "ids": [1018], "tokens": ["<｜end▁of▁sentence｜>"]}
    after["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")


REFUSED: dict[str, tuple[Change, str]] = {
    "weight_map escapes": (mapped("../outside.safetensors"), "'../outside.safetensors' for model.layers.1"),
    "weight_map is absolute": (mapped("/etc/passwd"), "names '/etc/passwd' for"),
    "weight_map has a number": (mapped(7), "names 7 for model.layers.1.mlp.up_proj.weight, which is not the name"),
    "weight_map has a list": (mapped(["a"]), "names ['a'] for"),
    "weight_map is wrong": (mapped("model-00001-of-00002.safetensors"), f"for {UP}, which is in model-00002-of"),
    "two answers which file counts": (stale_single, "an index that does not name it: programs disagree"),
    "tensor in two files": (twice, "is in model-00001-of-00002.safetensors too"),
    "tokenizer.model is a pointer": (written("tokenizer.model", POINTER), "tokenizer.model is a Git LFS pointer"),
    "tokenizer.model is empty": (written("tokenizer.model", ""), "tokenizer.model is empty; fetch it again, or remove"),
    "weights are a pointer": (written("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer"),
    "adapter beside": (written("adapter_config.json", "{}"), "transformers would load the base that it names"),
    "pad beyond": (config(pad_token_id=1024), "has pad_token_id 1024, which is no id of its vocabulary of 1024"),
    "eos is a text": (config(eos_token_id="</s>"), "has eos_token_id '</s>', which is no id"),
    "no positions": (config(drop="max_position_embeddings"), "has max_position_embeddings None, not a positive"),
    "layers as text": (config(num_hidden_layers="2"), "has num_hidden_layers '2', not a positive integer"),
    "more layers": (config(num_hidden_layers=10**9), "has num_hidden_layers 1000000000, more than any model"),
    "heads do not divide": (config(num_attention_heads=5), "not a multiple of the number of attention heads"),
    "other width": (
        config(intermediate_size=256),
        "mlp.down_proj.weight is (64, 128), its config.json implies (64, 256)",
    ),
    "another activation": (config(hidden_act="gelu"), "has hidden_act 'gelu'; llama.cpp computes"),
    "another RoPE": (config(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "has RoPE scaling 'dynamic'"),
    "RoPE without factor": (config(rope_parameters={"rope_type": "linear"}), "factor"),
    "YaRN": (config(rope_parameters={**YARN, "beta_fast": 16.0}), "has RoPE scaling 'yarn' with beta_fast, which"),
    "experts": (config(num_local_experts=4), "has num_local_experts, which no llama has"),
    "biases not there": (config(attention_bias=True), "lacks model.layers.0.self_attn.k_proj.bias (and 7 more)"),
    "tensor missing": (held(lambda weights: weights.pop(UP)), f"lacks {UP}, which its config.json implies"),
    "tensor additional": (held(lambda weights: weights.update({"score.weight": torch.ones(2)})), "holds score.weight"),
    "head missing": (held(lambda weights: weights.pop(HEAD)), f"lacks {HEAD}, which its config.json implies; set"),
    "head is another": (untied, f"has tie_word_embeddings, and {HEAD} differs from {EMBEDDING}"),
    "NaN": (held(lambda weights: weights[UP].__setitem__((0, 0), torch.nan)), f"{UP} holds NaN or a number beyond"),
    "overflow": (held(lambda weights: weights[UP].__setitem__((3, 3), -70000)), f"{UP} holds NaN or a number beyond"),
    "EOS everywhere": (adds_eos, "the tokenizer adds EOS to every text"),
    "no tokenizer_config": (removed("tokenizer_config.json"), "tokenizer_config.json is missing"),
    "tokenizer model is a list": (tokenizer(model=[1]), "cannot load the tokenizer of"),
    "tokenizer of another version": (tokenizer(version="9"), "cannot load the tokenizer of"),
    "BOS is a number": (lambda model: edit(model / "tokenizer_config.json", bos_token=1), "bos_token has to be either"),
    "dtype is a list": (config(dtype=[None]), "cannot load the tokenizer of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unfit_base_is_refused_before_training(model: Path, known_vocabulary: None, name: str) -> None:
    change, message = REFUSED[name]
    change(model)
    assert message in refusal(model)


def beside(model: Path) -> None:
    """Weights that neither transformers nor llama.cpp's converter read."""
    shards = sorted(in_two_shards(model).glob("*.safetensors"))
    shutil.copy(shards[0], model / "consolidated.safetensors")
    shutil.copy(shards[1], model / "model-00003-of-00003.safetensors")


def test_only_weights_of_the_index_count(model: Path, known_vocabulary: None, caplog: pytest.LogCaptureFixture) -> None:
    beside(model)
    with caplog.at_level(logging.INFO):
        found = run(model)
    assert (
        "ignoring consolidated.safetensors, model-00003-of-00003.safetensors; what its index names counts"
        in caplog.text
    )
    named = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert {path.name for path in read_folder(model)} == named
    files = source_files(recipe(model.parent / "r.toml", base={"source": f"path:{model.name}"}))
    assert {name for name in files if name.endswith(".safetensors")} == named
    (model / "consolidated.safetensors").unlink()
    shutil.rmtree(model.with_name("out"))
    assert run(model)["weights"] == found["weights"]


def test_result_of_the_check_is_in_base_json(model: Path, known_vocabulary: None) -> None:
    results = run(model)
    facts, _ = read_facts(model.with_name("out"))
    assert facts.check["tensors"] == len(tensors(model))
    assert facts.check["tokens"] > 150
    assert facts.check["metadata"] > 10
    assert build_key() in results["checked_with"]["llama.cpp"]


def test_head_equal_to_the_tied_embedding_is_accepted(model: Path, known_vocabulary: None) -> None:
    held(lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))(model)
    edit(model / "config.json", tie_word_embeddings=True)
    assert run(model)["check"]["tensors"] == len(tensors(model))


@pytest.mark.llamacpp
def test_other_ids_in_llamacpp_are_shown_with_expected_ones(model: Path, real: None) -> None:
    """transformers takes this token only for a whole word; llama.cpp has no such rule."""
    added = json.loads((model / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    added[-1] |= {"content": "paci", "single_word": True, "special": False}
    tokenizer(added_tokens=added)(model)
    message = refusal(model)
    assert "gives other ids in llama.cpp: at id" in message
    assert "expected [" in message
    assert "found [" in message


@pytest.mark.llamacpp
def test_vocabulary_that_llamacpp_denies_bos_is_refused(model: Path, real: None) -> None:
    """llama.cpp's converter switches add_bos off for exactly this size."""

    def grow(weights: dict[str, Any]) -> None:
        for name in (HEAD, EMBEDDING):
            weights[name] = torch.cat([weights[name], torch.zeros(49152 - 1024, 64, dtype=weights[name].dtype)])

    held(grow)(model)
    edit(model / "config.json", vocab_size=49152)
    assert "add_bos: expected True, found False" in refusal(model)
