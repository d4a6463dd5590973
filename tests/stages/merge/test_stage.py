"""The merge stage against PEFT's own merge, tensor by tensor; which base; kills; what lies beside; what is refused."""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command import forked
from support.shared import copied
from support.tiny_models import adapter_stage, base_stage, edit, in_two_shards, recipe, tensors
from support.tolerances import forward_error, largest_logit

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file

from tutor.artifacts.manifest import find_damage
from tutor.artifacts.stage_folder import RESUME, writing
from tutor.engines.hf.loading import load_base
from tutor.engines.hf.score import answer_logprobs
from tutor.errors import ArtifactError, HostError
from tutor.formats.models.model_folder import load_tokenizer, read_facts, read_json
from tutor.formats.models.safetensors import read_folder
from tutor.prompt import chat_template, conversation, encode, render
from tutor.recipe.settings import Recipe
from tutor.stages.merge import stage as merge
from tutor.stages.merge import weights as merging
from tutor.stages.merge.peft_adapter import read_adapter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*gradient_checkpointing",
        "ignore:.*alpha_pattern keys did not match",
        "ignore:Setting `save_embedding",
        "ignore:Adapter 'default'",
        "ignore:`lora_bias=True` was passed",
    ),
]

Q0 = "model.layers.0.self_attn.q_proj.weight"
WORDS = ("tipo", "objeto", "módulo")
A0, B0 = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")


class Stages:
    """A base in two shards and an adapter of it, as their stages leave them."""

    def __init__(self, tiny: Path, folder: Path, **lora: Any) -> None:
        self.model = in_two_shards(copied(tiny, folder / "model"))
        self.base = base_stage(self.model, folder / "base")
        self.adapter = adapter_stage(self.model, folder / "adapter", read_facts(self.base)[0].weights, **lora)
        self.data = folder / "data"
        self.data.mkdir()
        lines = (json.dumps({"instruction": f"¿Qué es {word}?", "response": f"Un {word}."}) for word in WORDS)
        (self.data / "held_out.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        self.out = folder / "merged"

    @property
    def inputs(self) -> dict[str, Path]:
        """The folders of the stages that merging needs."""
        return {"data": self.data, "base": self.base, "train": self.adapter}

    def merge(self, **settings: Any) -> dict[str, Any]:
        """What the stage finds out; a new folder each time."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        return merge.run(recipe(self.out / "r.toml", merge=settings), self.inputs, self.out)

    def merged(self, nf4: Any = None) -> merging.MergedWeights:
        """The weights that the stage would write."""
        files = read_folder(self.model)
        return merging.MergedWeights(
            {tensor.name: tensor for stored in files.values() for tensor in stored},
            read_adapter(self.adapter),
            "F16",
            nf4,
        )

    def refused(self) -> str:
        """What the stage says instead of merging."""
        with pytest.raises(ArtifactError) as caught:
            self.merge()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def edit_adapter(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Write the adapter's tensors again, changed, as if it had been trained so."""
        path = self.adapter / "adapter_model.safetensors"
        held = load_file(path)
        change(held)
        save_file(held, path, metadata={"format": "pt"})

    def edit_base(self, name: str, change: Callable[[Any], Any]) -> None:
        """Change one tensor of the base, its facts and the adapter's manifest with it."""
        for path in self.model.glob("*.safetensors"):
            held = load_file(path)
            if name in held:
                save_file({**held, name: change(held[name])}, path, metadata={"format": "pt"})
        shutil.rmtree(self.base)
        base_stage(self.model, self.base)
        self.trained_on(read_facts(self.base)[0].weights)

    def trained_on(self, weights: str, **more: str) -> None:
        """What the adapter's manifest names as its base, and how it was trained."""
        edit(self.adapter / "manifest.json", results={"base_weights": weights, **more})

    def trained_in_nf4(self, precision: str = "bf16") -> None:
        """As an adapter of the 4-bit base says."""
        self.trained_on(read_facts(self.base)[0].weights, quantization="nf4", precision=precision)


@pytest.fixture(scope="module")
def merged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """A plain merge to look at; a test that changes something makes its own."""
    made = Stages(tiny, tmp_path_factory.mktemp("plain"))
    made.results = made.merge()  # type: ignore[attr-defined]
    return made


@pytest.fixture
def stages(merged: Stages, tmp_path: Path) -> Stages:
    """The same to change."""
    made = object.__new__(Stages)
    for name in ("model", "base", "adapter", "data"):
        setattr(made, name, copied(getattr(merged, name), tmp_path / name))
    edit(made.base / "base.json", model=str(made.model))
    made.out = tmp_path / "merged"
    return made


def by_peft(model: Path, adapter: Path, dtype: Any = torch.float32) -> dict[str, Any]:
    """PEFT's merge in a type, rounded to FP16 at the end."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    plain = PeftModel.from_pretrained(loaded, adapter).merge_and_unload(safe_merge=True)
    return {name: weight.to(torch.float16) for name, weight in plain.state_dict().items()}


def written(model: Path, adapter: Path, out: Path, dtype: str = "F16") -> dict[str, Any]:
    """What is written for an adapter, whatever stage made it."""
    files, read = read_folder(model), read_adapter(adapter)
    base = {tensor.name: tensor for stored in files.values() for tensor in stored}
    merging.require_fit(base, read, read_json(model / "config.json"))
    out.mkdir()
    merge.write_shards(merging.MergedWeights(base, read, dtype), files, out)
    return tensors(out)


def differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name in found if not torch.equal(found[name], wanted[name])]


def with_biases(model: Path, to: Path) -> Path:
    """The model with a bias in every linear layer of its blocks."""
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
    return to


def as_if_trained(adapter: Path) -> Path:
    """Move what PEFT begins with a fixed value: magnitudes, biases, whole modules, MiCA's A."""
    path = adapter / "adapter_model.safetensors"
    held = load_file(path)
    torch.manual_seed(3)
    for name, value in held.items():
        if not value.any() or ("lora_A" not in name and "lora_B.weight" not in name):
            value.add_(torch.randn(value.shape) * 0.1)
    save_file(held, path, metadata={"format": "pt"})
    return adapter


# --- the weights -----------------------------------------------------------------------------------------------------


def test_merge_is_bitwise_equal_to_peft_in_fp32(merged: Stages) -> None:
    found = tensors(merged.out)
    assert differing(found, by_peft(merged.model, merged.adapter)) == []
    assert {str(weight.dtype) for weight in found.values()} == {"torch.float16"}
    before = {name: weight.to(torch.float16) for name, weight in tensors(merged.model).items()}
    changed = {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qkvo"}
    assert set(differing(found, before)) == changed


def test_merge_is_within_one_ulp_of_peft_in_fp16(merged: Stages) -> None:
    """Of the last place of the largest of weight, change and sum: where they cancel, the sum's own is finer."""
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
def test_lora_variants_are_merged_as_by_peft(lora: Any, merged: Stages, tmp_path: Path) -> None:
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
def test_biases_are_merged_as_by_peft(lora: Any, merged: Stages, tmp_path: Path) -> None:
    model = with_biases(merged.model, tmp_path / "model")
    adapter = as_if_trained(adapter_stage(model, tmp_path / "adapter", "", **lora))
    found = written(model, adapter, tmp_path / "out")
    assert differing(found, by_peft(model, adapter)) == []
    biases = {name for name in read_adapter(adapter).shapes if name.endswith(".bias")}
    assert len(biases) == (14 if lora.get("bias") == "all" else 8)


def test_bias_delta_without_base_bias_raises_error(merged: Stages, tmp_path: Path) -> None:
    adapter = as_if_trained(adapter_stage(merged.model, tmp_path / "adapter", "", lora_bias=True))
    with pytest.raises(ArtifactError, match=r"the base has no .*_proj\.bias \(8 of 16 adapted tensors missing\)"):
        written(merged.model, adapter, tmp_path / "out")
    with pytest.raises(RuntimeError, match="lora_bias"):
        by_peft(merged.model, adapter)


def test_lora_on_the_head_is_merged_into_the_base_head(stages: Stages, tmp_path: Path) -> None:
    """As the train stage saves: without the copy of the base's that PEFT puts beside an adapted head by itself."""
    adapter = adapter_stage(stages.model, tmp_path / "other", "", target_modules=["lm_head"])
    shutil.rmtree(stages.adapter)
    adapter.rename(stages.adapter)
    stages.edit_adapter(lambda held: held.pop("base_model.model.lm_head.base_layer.weight"))
    found = written(stages.model, stages.adapter, tmp_path / "out")
    assert differing(found, by_peft(stages.model, stages.adapter)) == []


def test_dtype_bf16_writes_bf16_weights(stages: Stages) -> None:
    assert stages.merge(dtype="bf16")["dtype"] == "bfloat16"
    found = tensors(stages.out)
    assert {str(weight.dtype) for weight in found.values()} == {"torch.bfloat16"}
    changed = set(read_adapter(stages.adapter).shapes)
    assert set(differing(found, tensors(stages.model))) == changed
    assert read_json(stages.out / "config.json")["torch_dtype"] == "bfloat16"


def test_values_beyond_fp16_are_merged_in_bf16(stages: Stages) -> None:
    stages.edit_base("model.norm.weight", lambda weight: torch.full_like(weight, 1e5))
    assert "merge.dtype" in stages.refused()
    stages.merge(dtype="bf16")
    assert tensors(stages.out)["model.norm.weight"].max() == torch.tensor(1e5).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_base_of_another_dtype_is_rounded_once(stages: Stages, dtype: Any) -> None:
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
    said = read_json(stages.out / "model.safetensors.index.json")["metadata"]["total_size"]
    assert said == sum(weight.nbytes for weight in found.values())


def test_base_in_one_file_gives_one_file(tiny: Path, merged: Stages, tmp_path: Path) -> None:
    written(tiny, merged.adapter, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", RESUME}
    assert differing(tensors(tmp_path / "out"), tensors(merged.out)) == []


def test_tensor_in_many_pieces_equals_tensor_in_one(merged: Stages, tmp_path: Path) -> None:
    """3000 x 1000: a piece holds a million numbers, and the last is cut."""
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


def test_shards_names_and_index_equal_those_of_the_base(merged: Stages) -> None:
    shards = sorted(path.name for path in merged.model.glob("*.safetensors"))
    assert sorted(path.name for path in merged.out.glob("*.safetensors")) == shards
    for name in shards:
        assert load_file(merged.out / name).keys() == load_file(merged.model / name).keys()
    index = "model.safetensors.index.json"
    assert (merged.out / index).read_bytes() == (merged.model / index).read_bytes()


def test_results_have_layers_and_largest_change(merged: Stages) -> None:
    deltas = read_adapter(merged.adapter).deltas.values()
    largest = max((delta.scale * (delta.b @ delta.a)).abs().max().item() for delta in deltas)
    results = merged.results  # type: ignore[attr-defined]
    assert (results["layers"], results["dtype"], results["base"]) == (8, "float16", "original")
    assert results["largest_change"] == pytest.approx(largest, abs=1e-6)
    assert largest > 0
    assert results["base_weights"] == read_facts(merged.base)[0].weights


@pytest.mark.parametrize("kept", [0, 1])
def test_progress_is_logged_up_to_the_total_bytes(stages: Stages, caplog: pytest.LogCaptureFixture, kept: int) -> None:
    """Of the weights alone; a file that is kept counts as done."""
    if kept:  # the first file of two, that is
        stages.merge()
        sorted(stages.out.glob("*.safetensors"))[1].unlink()
    stages.out.mkdir(exist_ok=True)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        merge.run(recipe(stages.out / "r.toml"), stages.inputs, stages.out)
    told = [(record.done, record.total) for record in caplog.records if hasattr(record, "done")]
    sizes = [
        weight.nbytes for stored in sorted(stages.out.glob("*.safetensors")) for weight in load_file(stored).values()
    ]
    first = sum(weight.nbytes for weight in load_file(min(stages.out.glob("*.safetensors"))).values())
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert {total for _, total in told} == {sum(sizes)}
    assert told[-1][0] == sum(sizes)
    assert (told[0][0] > first) == bool(kept)


# --- which base ------------------------------------------------------------------------------------------------------


def in_four_bits(model: Path, precision: str) -> dict[str, Any]:
    """What a loaded 4-bit model holds of each weight, given back as its layers do."""
    import bitsandbytes

    held = {}
    for name, module in load_base(model, "nf4", precision).named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            held[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight, module.weight.quant_state)
    return held


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_nf4_base_equals_the_weights_of_a_4_bit_model(stages: Stages, precision: str) -> None:
    stages.edit_adapter(lambda held: [value.zero_() for name, value in held.items() if "lora_B" in name])
    stages.trained_in_nf4(precision)
    assert stages.merge(base="nf4")["base"] == "nf4"
    held = in_four_bits(stages.model, precision)
    assert len(held) == 14
    wanted = {**tensors(stages.model), **held}
    assert differing(tensors(stages.out), {name: weight.half() for name, weight in wanted.items()}) == []


def test_adapter_is_added_to_nf4_base_in_fp32(stages: Stages) -> None:
    stages.trained_in_nf4()
    stages.merge(base="nf4")
    delta = read_adapter(stages.adapter).deltas[Q0]
    held = in_four_bits(stages.model, "bf16")[Q0]
    assert torch.equal(tensors(stages.out)[Q0], (held.float() + delta.b @ delta.a * delta.scale).half())


def test_nf4_training_scores_both_bases_and_uses_the_better(stages: Stages, tmp_path: Path) -> None:
    stages.trained_in_nf4()
    found = stages.merge()
    rows = [encode(load_tokenizer(stages.model), f"¿Qué es {word}?", f"Un {word}.") for word in WORDS]
    pairs = [(row.ids[: row.n_prompt], row.ids[row.n_prompt :]) for row in rows]
    by_hf, bound = {}, 0.0
    for base in ("original", "nf4"):
        shutil.copytree(stages.out, tmp_path / base)
        files = read_folder(stages.model)
        shutil.rmtree(tmp_path / base / RESUME)
        merge.write_shards(stages.merged(torch.bfloat16 if base == "nf4" else None), files, tmp_path / base)
        loaded = load_base(tmp_path / base, "none", "fp32")
        scores = answer_logprobs(loaded, pairs)
        by_hf[base] = -sum(map(sum, scores)) / sum(map(len, scores))
        longest = max(len(row.ids) for row in rows)
        bound = max(bound, forward_error(loaded.config, longest) * largest_logit(loaded, pairs))
    said = found["held_out"]
    assert said["loss"] == pytest.approx(by_hf, abs=bound)
    assert abs(by_hf["nf4"] - by_hf["original"]) > 2 * bound  # so the choice is not the rounding's
    assert found["base"] == min(by_hf, key=by_hf.__getitem__)
    assert (said["rows"], said["tokens"]) == (3, sum(sum(row.mask) for row in rows))
    assert differing(tensors(stages.out), tensors(tmp_path / found["base"])) == []


def test_16_bit_training_uses_original_base_without_scoring(stages: Stages) -> None:
    stages.trained_on(read_facts(stages.base)[0].weights, quantization="none", precision="fp32")
    (stages.data / "held_out.jsonl").unlink()
    found = stages.merge()
    assert found["base"] == "original"
    assert "held_out" not in found
    with pytest.raises(ArtifactError, match=r"merge\.base is nf4 and .* was trained on the 16-bit base"):
        stages.merge(base="nf4")


@pytest.mark.parametrize("base", ["original", "nf4"])
def test_base_named_in_recipe_is_used_without_scoring(stages: Stages, base: str) -> None:
    stages.trained_in_nf4()
    (stages.data / "held_out.jsonl").unlink()
    found = stages.merge(base=base)
    assert (found["base"], "held_out" in found) == (base, False)


# --- kills, disk and memory ------------------------------------------------------------------------------------------


def merge_stage() -> None:
    """Run the stage as the pipeline does; arguments: the folder, at which opening of the base's files, which signal.

    Each weight file is opened once for each of its tensors: the process is ended while one of them is read.
    """
    folder, left, number, version = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open" and "/model/model-" in str(arguments[0]):
            left -= 1
            if left == 0:
                signal.raise_signal(number)

    sys.addaudithook(hook)
    inputs = {"data": folder / "data", "base": folder / "base", "train": folder / "adapter"}
    with writing(folder / "merged", "merge", {"version": version}, resume=True) as (out, results):
        results.update(merge.run(Recipe().model_copy(update={"path": folder / "r.toml"}), inputs, out))


def run_stage(folder: Path, *, opens: int = 0, number: int = signal.SIGKILL, version: str = "1") -> int:
    """Run the stage in a process of its own, which gets a signal at one of its openings of the base's files."""
    given = (str(folder), str(opens), str(int(number)), version)
    return forked(*given, scratch=folder / "process", entry=merge_stage).finish().returncode


def shard(folder: Path, number: int, partial: str = "") -> Path:
    return folder / f"merged{partial}" / f"model-0000{number}-of-00002.safetensors"


IN_THE_SECOND = 2 + 2 + 8 + 3
"""check_model_folder() and read_folder() open both files, the first has eight tensors; so the second's third."""


@pytest.mark.pipeline
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_merge_resumes_at_the_unfinished_file(stages: Stages, number: int) -> None:
    folder = stages.out.parent
    assert run_stage(folder, opens=IN_THE_SECOND, number=number) != 0
    assert not stages.out.exists()
    first = shard(folder, 1, ".partial").stat()
    assert shard(folder, 2, ".partial").exists()
    assert run_stage(folder) == 0
    assert shard(folder, 1).stat().st_ino == first.st_ino
    assert shard(folder, 1).stat().st_mtime_ns == first.st_mtime_ns
    whole = {path.name: path.read_bytes() for path in stages.out.iterdir()}
    manifest = json.loads(whole.pop("manifest.json"))
    assert find_damage(stages.out, content=True) == []
    stages.merge()
    shutil.rmtree(stages.out / RESUME)
    assert whole == {path.name: path.read_bytes() for path in stages.out.iterdir()}
    assert manifest["results"]["largest_change"] > 0
    assert sorted(path.name for path in folder.iterdir() if "merged" in path.name) == ["merged"]


@pytest.mark.pipeline
def test_finished_file_changed_since_is_written_again(stages: Stages) -> None:
    folder = stages.out.parent
    run_stage(folder, opens=IN_THE_SECOND)
    path = shard(folder, 1, ".partial")
    stat, damaged = path.stat(), bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that only its content tells
    assert run_stage(folder) == 0
    assert differing(tensors(stages.out), by_peft(stages.model, stages.adapter)) == []


@pytest.mark.pipeline
def test_files_of_another_key_are_not_reused(stages: Stages) -> None:
    folder = stages.out.parent
    run_stage(folder, opens=IN_THE_SECOND)
    first = shard(folder, 1, ".partial").stat()
    assert run_stage(folder, version="2") == 0
    assert shard(folder, 1).stat().st_mtime_ns != first.st_mtime_ns


@pytest.mark.pipeline
def test_resumed_merge_reads_the_recorded_choice(stages: Stages) -> None:
    stages.trained_in_nf4()
    stages.merge()
    chosen = read_json(stages.out / RESUME / "choice.json")
    (stages.data / "held_out.jsonl").write_text("", "utf-8")
    again = merge.run(recipe(stages.out / "r.toml"), stages.inputs, stages.out)
    assert (again["base"], again["held_out"]) == (chosen["base"], chosen["held_out"])


@pytest.mark.pipeline
def test_small_disk_raises_error_before_the_merge(stages: Stages) -> None:
    full = stages.out.parent / "disk"
    full.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(HostError, match=r"0\.0 GB free, merging needs 0\.0 GB; make room"):
            merge.run(recipe(full / "r.toml"), stages.inputs, full)
        assert not list(full.iterdir())
    finally:
        subprocess.run(["umount", full], check=True)


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
    """160 MB of weights, 64 of them adapted, in less than half of that beyond what importing torch takes."""
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


# --- what lies beside them -------------------------------------------------------------------------------------------


def test_config_has_dtype_float16_and_is_otherwise_unchanged(merged: Stages) -> None:
    before, after = (read_json(folder / "config.json") for folder in (merged.model, merged.out))
    assert (after.pop("dtype"), after.pop("torch_dtype")) == ("float16", "float16")
    assert before.pop("dtype") == "bfloat16"
    assert after == before
    assert after["rope_parameters"]["rope_type"] == "llama3"


def test_tokenizer_files_differ_only_in_the_chat_template(merged: Stages) -> None:
    assert (merged.out / "tokenizer.json").read_bytes() == (merged.model / "tokenizer.json").read_bytes()
    before, after = (read_json(folder / "tokenizer_config.json") for folder in (merged.model, merged.out))
    assert {name for name in before if before[name] != after[name]} == {"chat_template"}
    assert after.keys() == before.keys()
    ours = chat_template(add_bos=True)
    assert after["chat_template"] == ours
    assert (merged.out / "chat_template.jinja").read_text("utf-8") == ours


def test_merged_tokenizer_renders_served_prompt_with_one_bos(merged: Stages) -> None:
    tokenizer = load_tokenizer(merged.out)
    messages = conversation("¿Qué es un genérico?", "Eres un tutor.")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == tokenizer.bos_token + render(messages)
    ids = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids == tokenizer(render(messages))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_base_chat_template_file_is_replaced_by_ours(stages: Stages) -> None:
    (stages.model / "chat_template.jinja").write_text("{{ '<think>' }}", "utf-8")
    stages.merge()
    assert (stages.out / "chat_template.jinja").read_text("utf-8") == chat_template(add_bos=True)
    assert load_tokenizer(stages.out).chat_template == chat_template(add_bos=True)


def test_licenses_and_settings_are_copied_other_files_not(stages: Stages) -> None:
    for name in ("LICENSE", "NOTICE.txt", "special_tokens_map.json", "pytorch_model.bin", "modeling.py"):
        (stages.model / name).write_text("{}", "utf-8")
    stages.merge()
    names = {path.name for path in stages.out.iterdir()}
    assert {"LICENSE", "NOTICE.txt", "special_tokens_map.json", "generation_config.json"} <= names
    assert not {"pytorch_model.bin", "modeling.py"} & names


# --- what is refused -------------------------------------------------------------------------------------------------


def test_adapter_of_other_base_is_refused_with_both_hashes(stages: Stages) -> None:
    trained_on = read_facts(stages.base)[0].weights
    stages.edit_base(Q0, lambda weight: weight * 2)
    now = read_facts(stages.base)[0].weights
    stages.trained_on(trained_on)
    said = stages.refused()
    assert f"was trained on other weights ({trained_on[:12]})" in said
    assert f"({now[:12]}); run: tutor train" in said


@pytest.mark.parametrize("damage", ["no manifest", "names no base"])
def test_adapter_without_base_hash_is_refused(stages: Stages, damage: str) -> None:
    if damage == "no manifest":
        (stages.adapter / "manifest.json").unlink()
    else:
        edit(stages.adapter / "manifest.json", results={})
    assert "was trained on other weights" in stages.refused()


def test_base_with_fewer_layers_is_refused_with_missing_tensor(stages: Stages) -> None:
    for path in stages.model.glob("*.safetensors"):
        held = {name: weight for name, weight in load_file(path).items() if ".layers.1." not in name}
        save_file(held, path, metadata={"format": "pt"})
    said = stages.refused()
    assert "the base has no model.layers.1.self_attn.k_proj.weight (4 of 8 adapted tensors missing)" in said


def test_layer_of_another_shape_is_refused_with_both_shapes(stages: Stages) -> None:
    stages.edit_base(Q0, lambda weight: weight[:32].clone())
    assert f"{Q0} is (32, 64) in the base, (64, 64) in the adapter" in stages.refused()


def test_adapter_without_lora_b_is_refused(stages: Stages) -> None:
    stages.edit_adapter(lambda held: held.pop(B0))
    assert "model.layers.0.self_attn.q_proj has no fitting lora_B" in stages.refused()


def test_adapter_without_lora_a_is_refused(stages: Stages) -> None:
    stages.edit_adapter(lambda held: held.pop(A0))
    assert f"holds {B0}, which cannot be merged here" in stages.refused()


def test_adapter_without_lora_layers_is_refused(stages: Stages) -> None:
    stages.edit_adapter(lambda held: held.clear())
    assert "holds 0 tensors for 0 LoRA layers" in stages.refused()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [A0, B0])
def test_adapter_with_nan_or_infinity_is_refused(stages: Stages, name: str, value: float) -> None:
    stages.edit_adapter(lambda held: held[name].view(-1)[3].fill_(value))
    assert f"{name} holds NaN or infinity; train again" in stages.refused()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model.norm.weight", 70000.0, "70144, beyond FP16's 65504"),  # fits bf16, which rounds it
        ("model.embed_tokens.weight", -70000.0, "70144, beyond FP16's 65504"),
        ("model.norm.weight", math.nan, "NaN"),
        (Q0, 70000.0, "70144"),
    ],
)
def test_base_value_beyond_fp16_is_refused_with_tensor_name(stages: Stages, name: str, value: float, said: str) -> None:
    def put(weight: Any) -> Any:
        weight.view(-1)[0] = value
        return weight

    stages.edit_base(name, put)
    assert f"{name} holds {said}"[:60] in stages.refused()


def test_merged_value_beyond_fp16_is_refused(stages: Stages) -> None:
    stages.edit_adapter(lambda held: held[B0].mul_(1e7))
    assert f"{Q0} holds " in stages.refused()


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
def test_unsupported_setting_is_refused_with_its_name(stages: Stages, name: str, value: Any) -> None:
    edit(stages.adapter / "adapter_config.json", **{name: value})
    assert f"{name} = {value!r} cannot be merged here" in stages.refused()


@pytest.mark.parametrize(
    ("lora", "edits", "said"),
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
    merged: Stages, tmp_path: Path, lora: Any, edits: Any, said: str
) -> None:
    adapter = adapter_stage(merged.model, tmp_path / "adapter", "", **lora)
    edit(adapter / "adapter_config.json", **edits)
    with pytest.raises(ArtifactError, match=said):
        read_adapter(adapter)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_adapter_on_a_tied_tensor_is_refused(merged: Stages, tmp_path: Path, module: str) -> None:
    adapter = adapter_stage(merged.model, tmp_path / "adapter", "", modules_to_save=[module])
    model = copied(merged.model, tmp_path / "model")
    edit(model / "config.json", tie_word_embeddings=True)
    with pytest.raises(ArtifactError, match=rf"{module}\.weight, which the base ties to another"):
        written(model, adapter, tmp_path / "out")


@pytest.mark.parametrize("value", [None, "16", []])
def test_rank_or_alpha_that_is_no_number_is_refused(stages: Stages, value: Any) -> None:
    edit(stages.adapter / "adapter_config.json", lora_alpha=value)
    assert "lora_alpha" in stages.refused()


@pytest.mark.parametrize(
    "name", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "model/tokenizer_config.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_adapter_file_is_named_in_one_line(stages: Stages, name: str, damage: str) -> None:
    path = stages.out.parent / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    assert str(path) in stages.refused()


def test_damaged_base_shard_is_named(stages: Stages) -> None:
    path = sorted(stages.model.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is damaged" in stages.refused()


def test_missing_base_shard_raises_error(stages: Stages) -> None:
    path = sorted(stages.model.glob("*.safetensors"))[0]  # lm_head and the first layer's start
    names = load_file(path).keys()
    path.unlink()
    stages.edit_adapter(lambda held: [held.pop(name) for name in list(held) if _layer(name) in names])
    assert path.name in stages.refused()


def _layer(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".lora_A", "").replace(".lora_B", "")
