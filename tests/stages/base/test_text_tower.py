"""stages/base/text_tower.py: the text model of a tiny multimodal checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.models.families import family_folder
from support.models.tiny_models import in_two_shards, tensors

torch = pytest.importorskip("torch")
from safetensors.torch import save_file

from tutor.errors import ArtifactError
from tutor.formats.models.model_config import check_model_config
from tutor.formats.models.model_folder import check_model_folder
from tutor.stages.base.text_tower import extract_text, is_multimodal, text_config

IMAGES = {"vision_tower.weight": torch.ones(4, 4), "multi_modal_projector.weight": torch.ones(2)}
LEFT_OUT = ("max_position_embeddings", "layer_types", "rope_parameters")


def multimodal(text: Path, folder: Path, prefix: str, head: str) -> Path:
    """A checkpoint as Gemma 3 4B's, around a text model; its text_config lacks what transformers completes."""
    folder.mkdir()
    for path in text.glob("tokenizer*"):
        shutil.copy(path, folder)
    held = {prefix + name.removeprefix(head): weight for name, weight in tensors(text).items()}
    images = {prefix.removesuffix("language_model.") + name: weight for name, weight in IMAGES.items()}
    save_file({**held, **images}, folder / "model.safetensors", metadata={"format": "pt"})
    inner = json.loads((text / "config.json").read_text("utf-8"))
    inner = {name: value for name, value in inner.items() if name not in LEFT_OUT}
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**outer, "text_config": inner}), "utf-8")
    return in_two_shards(folder)


@pytest.mark.parametrize(("prefix", "head"), [("language_model.", ""), ("model.language_model.", "model.")])
def test_text_model_of_a_checkpoint_equals_the_original(
    tmp_path: Path, tmp_path_factory: Any, prefix: str, head: str
) -> None:
    from transformers import AutoModelForCausalLM

    text = family_folder(tmp_path_factory, "gemma3_text")
    source = multimodal(text, tmp_path / "source", prefix, head)
    extract_text(source, tmp_path / "model")
    check_model_folder(tmp_path / "model")
    before, after = tensors(text), tensors(tmp_path / "model")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.arange(40)[None]
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (text, tmp_path / "model"))
    assert torch.equal(ours, theirs)


def test_configuration_of_a_checkpoint_is_the_text_one(tmp_path: Path, tmp_path_factory: Any) -> None:
    text = family_folder(tmp_path_factory, "gemma3_text")
    source = multimodal(text, tmp_path / "source", "language_model.", "")
    found = text_config(source)
    check_model_config(found, "x")
    assert (found["model_type"], found["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert (found["num_hidden_layers"], found["max_position_embeddings"]) == (7, 131072)
    assert not is_multimodal(found)
    assert text_config(text) == json.loads((text / "config.json").read_text("utf-8"))


def test_checkpoint_without_text_is_refused(tmp_path: Path, tmp_path_factory: Any) -> None:
    text = family_folder(tmp_path_factory, "gemma3_text")
    source = multimodal(text, tmp_path / "source", "vision.", "")
    with pytest.raises(ArtifactError, match=r"has no tensor of a text model \(language_model\.\); fetch it again"):
        extract_text(source, tmp_path / "model")
