"""stages/merge/weights.py: equal to PEFT's merge bit for bit, for every variant, dtype and base; memory; ranges."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny_models import adapter_stage, base_stage, edit, tensors, write_index
from support.shared import copied

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file
from support.models.merging import B0, MERGE_MARKS, Q0, MergeStages, by_peft, differing, written

from tutor.artifacts.disk import read_json
from tutor.engines.hf.loading import load_base
from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import read_facts
from tutor.stages.merge.peft_adapter import read_adapter

pytestmark = MERGE_MARKS


def with_biases(model: Path, to: Path) -> Path:
    """Copy the model, with a bias in every linear layer of its blocks."""
    copied(model, to)
    edit(to / "config.json", attention_bias=True, mlp_bias=True)
    torch.manual_seed(4)
    for path in to.glob("*.safetensors"):
        held = load_file(path)
        biases = {
            name.replace(".weight", ".bias"): torch.randn(len(weight)).to(weight.dtype)
            for name, weight in held.items()
            if "_proj" in name
        }
        save_file({**held, **biases}, path, metadata={"format": "pt"})
    return write_index(to)


def as_if_trained(adapter: Path) -> Path:
    """Change the values that PEFT initializes to constants: magnitudes, biases, full modules, MiCA's A."""
    path = adapter / "adapter_model.safetensors"
    held = load_file(path)
    torch.manual_seed(3)
    for name, value in held.items():
        if not value.any() or ("lora_A" not in name and "lora_B.weight" not in name):
            value.add_(torch.randn(value.shape) * 0.1)
    save_file(held, path, metadata={"format": "pt"})
    return adapter


# --- equal to PEFT ----------------------------------------------------------------------------------------------------


def test_merge_is_bitwise_equal_to_peft_in_fp32(merged: MergeStages) -> None:
    found = tensors(merged.out)
    assert differing(found, by_peft(merged.model, merged.adapter)) == []
    assert {str(weight.dtype) for weight in found.values()} == {"torch.float16"}
    before = {name: weight.to(torch.float16) for name, weight in tensors(merged.model).items()}
    changed = {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qkvo"}
    assert set(differing(found, before)) == changed


def test_merge_is_within_one_ulp_of_peft_in_fp16(merged: MergeStages) -> None:
    """A unit in the last place of the largest of weight, change and sum: when they cancel, the sum's is smaller."""
    found, base = tensors(merged.out), tensors(merged.model)
    apart = 0
    for name, theirs in by_peft(merged.model, merged.adapter, torch.float16).items():
        ours, weight = found[name].float(), base[name].float()
        largest = torch.stack([ours.abs(), weight.abs(), (ours - weight).abs()]).amax(dim=0)
        unit = torch.exp2(torch.floor(torch.log2(largest.clamp(min=2.0**-14))) - 10)
        assert ((ours - theirs.float()).abs() <= unit).all(), name
        apart += int((ours != theirs.float()).sum())
    assert apart > 0


VARIANTS = [
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.o_proj": 8}, "alpha_pattern": {"k_proj": 32}},
    {"alpha_pattern": {"layers.0.self_attn.o_proj": 64}},
    {"alpha_pattern": {"proj": 64, "layers.0.self_attn.q_proj": 3}},
    {"rank_pattern": {"o_proj": 1}, "alpha_pattern": {"o_proj": 3}, "use_rslora": True},
    {"target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 2, "lora_alpha": 1},
    {"target_modules": r".*layers\.1.*\.(q_proj|down_proj)"},
    {"target_modules": "all-linear"},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 8}, "target_modules": "all-linear"},
    {"modules_to_save": ["lm_head", "embed_tokens"]},
    {"modules_to_save": ["norm", "gate_proj"]},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": False},
]


@pytest.mark.parametrize("lora", VARIANTS, ids=str)
def test_lora_variants_are_merged_as_by_peft(lora: Any, merged: MergeStages, tmp_path: Path) -> None:
    adapter = as_if_trained(adapter_stage(merged.model, tmp_path / "adapter", "", **lora))
    found = written(merged.model, adapter, tmp_path / "out")
    assert differing(found, by_peft(merged.model, adapter)) == []
    assert set(differing(found, {name: weight.half() for name, weight in tensors(merged.model).items()})) == set(
        read_adapter(adapter).shapes
    )


@pytest.mark.parametrize(
    "lora",
    [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}, {"lora_bias": True, "use_rslora": True}],
    ids=str,
)
def test_biases_are_merged_as_by_peft(lora: Any, merged: MergeStages, tmp_path: Path) -> None:
    model = with_biases(merged.model, tmp_path / "model")
    adapter = as_if_trained(adapter_stage(model, tmp_path / "adapter", "", **lora))
    found = written(model, adapter, tmp_path / "out")
    assert differing(found, by_peft(model, adapter)) == []
    biases = {name for name in read_adapter(adapter).shapes if name.endswith(".bias")}
    assert len(biases) == (14 if lora.get("bias") == "all" else 8)


def test_bias_delta_without_base_bias_raises_error(merged: MergeStages, tmp_path: Path) -> None:
    adapter = as_if_trained(adapter_stage(merged.model, tmp_path / "adapter", "", lora_bias=True))
    with pytest.raises(ArtifactError, match=r"the base has no .*_proj\.bias \(8 of 16 adapted tensors missing\)"):
        written(merged.model, adapter, tmp_path / "out")
    with pytest.raises(RuntimeError, match="lora_bias"):
        by_peft(merged.model, adapter)


def test_lora_on_the_head_is_merged_into_the_base_head(stages: MergeStages, tmp_path: Path) -> None:
    """The train stage saves no copy of the base's head, which PEFT adds to an adapted head."""
    adapter = adapter_stage(stages.model, tmp_path / "other", "", target_modules=["lm_head"])
    shutil.rmtree(stages.adapter)
    adapter.rename(stages.adapter)
    stages.edit_adapter(lambda held: held.pop("base_model.model.lm_head.base_layer.weight"))
    found = written(stages.model, stages.adapter, tmp_path / "out")
    assert differing(found, by_peft(stages.model, stages.adapter)) == []


def test_dtype_bf16_writes_bf16_weights(stages: MergeStages) -> None:
    assert stages.merge(dtype="bf16")["dtype"] == "bfloat16"
    found = tensors(stages.out)
    assert {str(weight.dtype) for weight in found.values()} == {"torch.bfloat16"}
    changed = set(read_adapter(stages.adapter).shapes)
    assert set(differing(found, tensors(stages.model))) == changed
    assert read_json(stages.out / "config.json")["torch_dtype"] == "bfloat16"


def test_values_beyond_fp16_are_merged_in_bf16(stages: MergeStages) -> None:
    stages.edit_base("model.norm.weight", lambda weight: torch.full_like(weight, 1e5))
    assert "merge.dtype" in stages.refused()
    stages.merge(dtype="bf16")
    assert tensors(stages.out)["model.norm.weight"].max() == torch.tensor(1e5).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_base_of_another_dtype_is_rounded_once(stages: MergeStages, dtype: Any) -> None:
    sizes = 0
    for path in stages.model.glob("*.safetensors"):
        held = {name: (weight.float() * 1.0009).to(dtype) for name, weight in load_file(path).items()}
        save_file(held, path, metadata={"format": "pt"})
        sizes += sum(weight.nbytes for weight in held.values())
    edit(stages.model / "model.safetensors.index.json", metadata={"total_size": sizes})
    shutil.rmtree(stages.base)
    base_stage(stages.model, stages.base)
    stages.trained_on(read_facts(stages.base)[0].weights)
    stages.merge()
    found = tensors(stages.out)
    assert differing(found, by_peft(stages.model, stages.adapter)) == []
    size = read_json(stages.out / "model.safetensors.index.json")["metadata"]["total_size"]
    assert size == sum(weight.nbytes for weight in found.values())


def test_tensor_in_many_pieces_equals_tensor_in_one(merged: MergeStages, tmp_path: Path) -> None:
    """3000 x 1000: a piece holds a million numbers, and the last one is shorter."""
    torch.manual_seed(5)
    weight, a, b = torch.randn(3000, 1000).bfloat16(), torch.randn(4, 1000), torch.randn(3000, 4)
    magnitude = torch.rand(3000)
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    model.mkdir(), adapter.mkdir()
    save_file({"model.layers.0.mlp.up_proj.weight": weight}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    start = "base_model.model.model.layers.0.mlp.up_proj"
    ends = {".lora_A.weight": a, ".lora_B.weight": b, ".lora_magnitude_vector": magnitude}
    save_file({start + end: value for end, value in ends.items()}, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_dora": True}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (found,) = written(model, adapter, tmp_path / "out").values()
    plain = weight.float() + (b @ a) * 1.5
    assert torch.equal(found, ((magnitude / torch.linalg.norm(plain, dim=1))[:, None] * plain).half())


# --- the NF4 base -----------------------------------------------------------------------------------------------------


def in_four_bits(model: Path, precision: str) -> dict[str, Any]:
    """Return the dequantized weights of a loaded 4-bit model."""
    import bitsandbytes

    held = {}
    for name, module in load_base(model, "nf4", precision).named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            held[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight, module.weight.quant_state)
    return held


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_nf4_base_equals_the_weights_of_a_4_bit_model(stages: MergeStages, precision: str) -> None:
    stages.edit_adapter(lambda held: [value.zero_() for name, value in held.items() if "lora_B" in name])
    stages.trained_in_nf4(precision)
    assert stages.merge(base="nf4")["base"] == "nf4"
    held = in_four_bits(stages.model, precision)
    assert len(held) == 14
    wanted = {**tensors(stages.model), **held}
    assert differing(tensors(stages.out), {name: weight.half() for name, weight in wanted.items()}) == []


def test_adapter_is_added_to_nf4_base_in_fp32(stages: MergeStages) -> None:
    stages.trained_in_nf4()
    stages.merge(base="nf4")
    delta = read_adapter(stages.adapter).deltas[Q0]
    held = in_four_bits(stages.model, "bf16")[Q0]
    assert torch.equal(tensors(stages.out)[Q0], (held.float() + delta.b @ delta.a * delta.scale).half())


MEMORY = """
import resource, sys
from pathlib import Path
from tutor.stages.merge.peft_adapter import read_adapter
from tutor.stages.merge.weights import MergedWeights
from tutor.formats.models.safetensors import read_folder
from tutor.stages.merge.stage import write_shards

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

base, adapter, out = map(Path, sys.argv[1:])
before = peak()
files = read_folder(base)
write_shards(MergedWeights({t.name: t for s in files.values() for t in s}, read_adapter(adapter), "F16"), files, out)
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """160 MB of weights, 64 MB of them adapted, in less than 80 MB besides the imports."""
    adapted, plain = torch.zeros(8192, 4096).bfloat16(), torch.zeros(48 << 20).bfloat16()
    for name in ("model", "adapter", "out"):
        (tmp_path / name).mkdir()
    name = "model.layers.0.mlp.up_proj"
    save_file({f"{name}.weight": adapted, "lm_head.weight": plain}, tmp_path / "model" / "model.safetensors")
    pair = {"A": torch.ones(8, 4096), "B": torch.ones(8192, 8)}
    held = {f"base_model.model.{name}.lora_{side}.weight": value for side, value in pair.items()}
    save_file(held, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 8}')
    command = [sys.executable, "-c", MEMORY, *(tmp_path / name for name in ("model", "adapter", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 80
    assert (tensors(tmp_path / "out")[f"{name}.weight"] == 8).all()


def test_base_with_fewer_layers_is_refused_with_missing_tensor(stages: MergeStages) -> None:
    for path in stages.model.glob("*.safetensors"):
        held = {name: weight for name, weight in load_file(path).items() if ".layers.1." not in name}
        save_file(held, path, metadata={"format": "pt"})
    write_index(stages.model)
    message = stages.refused()
    assert "the base has no model.layers.1.self_attn.k_proj.weight (4 of 8 adapted tensors missing)" in message


def test_layer_of_another_shape_is_refused_with_both_shapes(stages: MergeStages) -> None:
    stages.edit_base(Q0, lambda weight: weight[:32].clone())
    assert f"{Q0} is (32, 64) in the base, (64, 64) in the adapter" in stages.refused()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("model.norm.weight", 70000.0, "70144, beyond FP16's 65504"),  # fits bf16, which rounds it
        ("model.embed_tokens.weight", -70000.0, "70144, beyond FP16's 65504"),
        ("model.norm.weight", math.nan, "NaN"),
        (Q0, 70000.0, "70144"),
    ],
)
def test_base_value_beyond_fp16_is_refused_with_tensor_name(
    stages: MergeStages, name: str, value: float, expected: str
) -> None:
    def put(weight: Any) -> Any:
        weight.view(-1)[0] = value
        return weight

    stages.edit_base(name, put)
    assert f"{name} holds {expected}"[:60] in stages.refused()


def test_merged_value_beyond_fp16_is_refused(stages: MergeStages) -> None:
    stages.edit_adapter(lambda held: held[B0].mul_(1e7))
    assert f"{Q0} holds " in stages.refused()


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_adapter_on_a_tied_tensor_is_refused(merged: MergeStages, tmp_path: Path, module: str) -> None:
    adapter = adapter_stage(merged.model, tmp_path / "adapter", "", modules_to_save=[module])
    model = copied(merged.model, tmp_path / "model")
    edit(model / "config.json", tie_word_embeddings=True)
    with pytest.raises(ArtifactError, match=rf"{module}\.weight, which the base ties to another"):
        written(model, adapter, tmp_path / "out")
