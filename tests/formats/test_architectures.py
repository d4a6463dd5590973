"""formats/architectures.py: the table of families, against the classes of transformers and the names of gguf."""

import json
from pathlib import Path

import pytest
from support.models.families import FAMILIES, family_folder

from tutor.errors import ArtifactError
from tutor.formats.architectures import (
    ARCHITECTURES,
    architecture_of,
    architecture_of_gguf,
    layer_windows,
    rope_layers,
)

transformers = pytest.importorskip("transformers")
GEMMA = {"num_hidden_layers": 7, "sliding_window": 8}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_row_names_transformers_class_and_gguf_architecture(name: str) -> None:
    import gguf

    row = ARCHITECTURES[name]
    model_class = getattr(transformers, row.class_name)
    assert model_class.config_class.model_type == name == row.model_type
    assert row.gguf in gguf.MODEL_ARCH_NAMES.values()
    config = model_class.config_class()
    assert getattr(config, row.activation) in row.activations
    assert not any(getattr(config, setting) for setting in row.false)
    assert row.tied is bool(config.tie_word_embeddings)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_those_that_transformers_makes(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = family_folder(tmp_path_factory, name)
    written = json.loads((folder / "config.json").read_text("utf-8"))
    row = ARCHITECTURES[written["model_type"]]
    made = transformers.AutoConfig.from_pretrained(folder)
    kinds = getattr(made, "layer_types", None) or ["sliding_attention"] * made.num_hidden_layers
    window = getattr(made, "sliding_window", None)
    expected = [window if kind == "sliding_attention" else None for kind in kinds]
    assert layer_windows(row, written) == expected
    assert layer_windows(row, {**written, "layer_types": None}) == expected
    ropes = [bool(each) for each in getattr(made, "no_rope_layers", [1] * made.num_hidden_layers)]
    assert rope_layers(row, written) == rope_layers(row, {**written, "no_rope_layers": None}) == ropes


def test_window_of_gemma_follows_old_pattern_setting() -> None:
    row = ARCHITECTURES["gemma3_text"]
    assert layer_windows(row, {**GEMMA, "sliding_window_pattern": 2}) == [8, None, 8, None, 8, None, 8]
    assert layer_windows(row, GEMMA) == [8, 8, 8, 8, 8, None, 8]


def test_unused_window_of_qwen_counts_as_none() -> None:
    row = ARCHITECTURES["qwen2"]
    config = {"num_hidden_layers": 2, "sliding_window": 8, "max_window_layers": 1}
    assert layer_windows(row, config) == [None, None]
    assert layer_windows(row, {**config, "use_sliding_window": True}) == [None, 8]


def test_unknown_family_is_refused_with_the_list() -> None:
    with pytest.raises(ArtifactError, match="x is a 'phi3' model; tutor tunes llama, qwen2, qwen3, mistral, gemma3_te"):
        architecture_of("phi3", "x")
    with pytest.raises(ArtifactError, match="x is a 'phi3' model; tutor tunes llama, qwen2, qwen3, gemma3, smollm3"):
        architecture_of_gguf("phi3", "x")
    with pytest.raises(ArtifactError, match="is a None model"):
        architecture_of(None, "x")


def test_gguf_of_mistral_counts_as_llama(tmp_path: Path) -> None:
    assert architecture_of_gguf("llama", "x").model_type == "llama"
