"""stages/merge/peft_adapter.py: adapters that are incomplete, damaged or of an unsupported kind are refused."""

import math
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny_models import adapter_stage, edit

torch = pytest.importorskip("torch")

from support.models.merging import A0, B0, MERGE_MARKS, MergeStages

from tutor.errors import ArtifactError
from tutor.stages.merge.peft_adapter import read_adapter

pytestmark = MERGE_MARKS


def test_adapter_without_lora_b_is_refused(stages: MergeStages) -> None:
    stages.edit_adapter(lambda held: held.pop(B0))
    assert "model.layers.0.self_attn.q_proj has no fitting lora_B" in stages.refused()


def test_adapter_without_lora_a_is_refused(stages: MergeStages) -> None:
    stages.edit_adapter(lambda held: held.pop(A0))
    assert f"holds {B0}, which cannot be merged here" in stages.refused()


def test_adapter_without_lora_layers_is_refused(stages: MergeStages) -> None:
    stages.edit_adapter(lambda held: held.clear())
    assert "holds 0 tensors for 0 LoRA layers" in stages.refused()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [A0, B0])
def test_adapter_with_nan_or_infinity_is_refused(stages: MergeStages, name: str, value: float) -> None:
    stages.edit_adapter(lambda held: held[name].view(-1)[3].fill_(value))
    assert f"{name} holds NaN or infinity; train again" in stages.refused()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["q_proj.weight"]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("ensure_weight_tying", True),
        ("megatron_config", {"a": 1}),
        ("kasa_config", {"beta": 1.0}),
        ("a_setting_of_a_later_peft", 1),
        ("peft_type", "LOHA"),
        ("peft_type", None),
    ],
)
def test_unsupported_setting_is_refused_with_its_name(stages: MergeStages, name: str, value: Any) -> None:
    edit(stages.adapter / "adapter_config.json", **{name: value})
    assert f"{name} = {value!r} cannot be merged here" in stages.refused()


@pytest.mark.parametrize(
    ("lora", "edits", "expected"),
    [
        ({"use_dora": True}, {"use_dora": False}, "no fitting lora_magnitude_vector"),
        ({}, {"use_dora": True}, "no fitting lora_magnitude_vector"),
        ({"modules_to_save": ["norm"]}, {"modules_to_save": None}, r"norm\.weight, which cannot be merged"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, {}, r"embed_tokens\..*, which cannot be merged"),
        ({"target_modules": ["lm_head"]}, {}, r"lm_head\.base_layer\.weight, which cannot be merged"),
        ({}, {"r": 5}, "has rank 4, its adapter_config.json says 5"),
    ],
    ids=str,
)
def test_tensor_without_a_setting_for_it_is_refused(
    merged: MergeStages, tmp_path: Path, lora: Any, edits: Any, expected: str
) -> None:
    adapter = adapter_stage(merged.model, tmp_path / "adapter", "", **lora)
    edit(adapter / "adapter_config.json", **edits)
    with pytest.raises(ArtifactError, match=expected):
        read_adapter(adapter)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("r", 0),
        ("alpha_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": "8"}),
        ("rank_pattern", {"(": 8}),
        ("modules_to_save", 1),
    ],
)
def test_setting_of_a_wrong_type_is_refused(stages: MergeStages, name: str, value: Any) -> None:
    edit(stages.adapter / "adapter_config.json", **{name: value})
    assert f"adapter_config.json: {name}" in stages.refused()
