"""Shapes of models from config.json, model folders and known names."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.models.workloads import ATTENTION, DEMO, LARGE, TINY

from tutor.errors import ArtifactError
from tutor.machine.memory.estimate import trainable_parameters
from tutor.machine.memory.shapes import read_shape, shape_of

CONFIG = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def test_parameters_of_known_models_are_exact():
    assert LARGE.parameters == 8_030_261_248
    assert shape_of(CONFIG) == DEMO
    assert DEMO.parameters == 134_515_008


def test_absent_config_values_take_llamas_defaults():
    fewer = {name: value for name, value in CONFIG.items() if name not in ("head_dim", "num_key_value_heads")}
    assert shape_of({**fewer, "tie_word_embeddings": False}) == replace(DEMO, kv_heads=9, tied=False)
    assert shape_of({**CONFIG, "head_dim": None}) == DEMO


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, 0, -1, "576", 1.5, True, 1 << 40, [576]])
def test_shape_with_impossible_size_names_the_value(name, value):
    with pytest.raises(ValueError, match=name):
        shape_of({**CONFIG, name: value})


def test_known_tiny_shape_equals_the_made_model():
    pytest.importorskip("torch")
    from tutor.stages.base.tiny_model import VOCABULARY, _model

    assert shape_of(_model(VOCABULARY, 1).config.to_dict()) == TINY


def test_shape_of_a_folder_counts_its_weights(tiny: Path) -> None:
    pytest.importorskip("torch")
    from support.models.tiny_models import tensors

    shape = read_shape(tiny)
    assert shape.parameters == sum(weight.numel() for weight in tensors(tiny).values())
    assert shape == TINY
    assert trainable_parameters(shape, 8, ATTENTION) == 7168


def test_folder_without_shape_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": "wide"}')
    with pytest.raises(ArtifactError, match=r"config\.json: num_attention_heads is None"):
        read_shape(tmp_path)
