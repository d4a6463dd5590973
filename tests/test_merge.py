"""The merge stage against PEFT's own merge, tensor by tensor; what lies beside the weights; what is refused."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import adapter_stage, base_stage, copied, edit, in_two_shards, one_thread, recipe, tensors, tiny

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from tutor.errors import ArtifactError  # noqa: E402
from tutor.modelfolder import load_tokenizer, read_facts, read_json  # noqa: E402
from tutor.stages import merge  # noqa: E402
from tutor.template import chat_template, conversation, render  # noqa: E402

__all__ = ["one_thread", "tiny"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing", "ignore:.*alpha_pattern keys did not match"),
]

Q0 = "model.layers.0.self_attn.q_proj.weight"
A0, B0 = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")


class Stages:
    """A base in two shards and an adapter of it, as their stages leave them."""

    def __init__(self, tiny: Path, folder: Path, **lora: Any) -> None:
        self.model = in_two_shards(copied(tiny, folder / "model"))
        self.base = base_stage(self.model, folder / "base")
        self.adapter = adapter_stage(self.model, folder / "adapter", read_facts(self.base)[0].weights, **lora)
        self.out = folder / "merged"

    def merge(self) -> dict[str, Any]:
        """What the stage finds out; a new folder each time."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        return merge.run(recipe(self.out / "r.toml"), {"base": self.base, "train": self.adapter}, self.out)

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

    def trained_on(self, weights: str) -> None:
        """What the adapter's manifest names as its base."""
        edit(self.adapter / "manifest.json", results={"base_weights": weights})


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
    for name in ("model", "base", "adapter"):
        setattr(made, name, copied(getattr(merged, name), tmp_path / name))
    edit(made.base / "base.json", model=str(made.model))
    made.out = tmp_path / "merged"
    return made


def by_peft(model: Path, adapter: Path) -> dict[str, Any]:
    """PEFT's merge in fp32, rounded to FP16 once at the end."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain = PeftModel.from_pretrained(loaded, adapter).merge_and_unload(safe_merge=True)
    return {name: weight.to(torch.float16) for name, weight in plain.state_dict().items()}


def differing(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name in found if not torch.equal(found[name], wanted[name])]


# --- the weights -----------------------------------------------------------------------------------------------------


def test_every_tensor_is_pefts_bit_for_bit(merged: Stages) -> None:
    found = tensors(merged.out)
    assert differing(found, by_peft(merged.model, merged.adapter)) == []
    assert {str(weight.dtype) for weight in found.values()} == {"torch.float16"}
    before = {name: weight.to(torch.float16) for name, weight in tensors(merged.model).items()}
    changed = {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qkvo"}
    assert set(differing(found, before)) == changed


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
        {"alpha_pattern": {r"layers\.1\.self_attn\.[qk]_proj": 1, "q_proj": 64}},
        {"alpha_pattern": {"^model.layers.0.self_attn.o_proj": 64}},
        {"alpha_pattern": {"proj": 64, "layers.0.self_attn.q_proj": 3}},
        {"rank_pattern": {"o_proj": 1}, "alpha_pattern": {"o_proj": 3}, "use_rslora": True},
        {"target_modules": ["gate_proj", "up_proj", "down_proj"], "r": 2, "lora_alpha": 1},
        {"target_modules": r".*layers\.1.*\.(q_proj|down_proj)"},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_variants_of_scale_and_place_are_merged_as_peft_merges_them(lora: Any, merged: Stages, tmp_path: Path) -> None:
    adapter = adapter_stage(merged.model, tmp_path / "adapter", "", **lora)
    out = tmp_path / "out"
    out.mkdir()
    merge.merge_shards(merged.model, out, merge.read_deltas(adapter))
    found = tensors(out)
    assert differing(found, by_peft(merged.model, adapter)) == []
    assert not torch.equal(found[Q0], tensors(merged.model)[Q0].half()) or "target_modules" in lora


def test_shards_names_and_index_are_the_bases(merged: Stages) -> None:
    shards = sorted(path.name for path in merged.model.glob("*.safetensors"))
    assert sorted(path.name for path in merged.out.glob("*.safetensors")) == shards
    for name in shards:
        assert load_file(merged.out / name).keys() == load_file(merged.model / name).keys()
    index = "model.safetensors.index.json"
    assert (merged.out / index).read_bytes() == (merged.model / index).read_bytes()


def test_the_results_say_how_much_changed(merged: Stages) -> None:
    deltas = merge.read_deltas(merged.adapter)
    largest = max((scale * (b @ a)).abs().max().item() for a, b, scale in deltas.values())
    results = merged.results  # type: ignore[attr-defined]
    assert (results["layers"], results["dtype"]) == (8, "float16")
    assert results["largest_change"] == pytest.approx(largest)
    assert largest > 0
    assert results["base_weights"] == read_facts(merged.base)[0].weights


# --- what lies beside them -------------------------------------------------------------------------------------------


def test_the_configuration_says_float16_and_keeps_the_rest(merged: Stages) -> None:
    before, after = (read_json(folder / "config.json") for folder in (merged.model, merged.out))
    assert (after.pop("dtype"), after.pop("torch_dtype")) == ("float16", "float16")
    assert before.pop("dtype") == "bfloat16"
    assert after == before
    assert after["rope_parameters"]["rope_type"] == "llama3"


def test_the_tokenizer_is_the_bases_byte_for_byte_and_its_labels_but_for_the_template(merged: Stages) -> None:
    assert (merged.out / "tokenizer.json").read_bytes() == (merged.model / "tokenizer.json").read_bytes()
    before, after = (read_json(folder / "tokenizer_config.json") for folder in (merged.model, merged.out))
    assert {name for name in before if before[name] != after[name]} == {"chat_template"}
    assert after.keys() == before.keys()
    ours = chat_template(add_bos=True)
    assert after["chat_template"] == ours
    assert (merged.out / "chat_template.jinja").read_text("utf-8") == ours


def test_the_merged_tokenizer_renders_the_served_prompt_with_one_bos(merged: Stages) -> None:
    tokenizer = load_tokenizer(merged.out)
    messages = conversation("¿Qué es un genérico?", "Eres un tutor.")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == tokenizer.bos_token + render(messages)
    ids = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids == tokenizer(render(messages))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_template_file_of_the_bases_own_gives_way_to_ours(stages: Stages) -> None:
    (stages.model / "chat_template.jinja").write_text("{{ '<think>' }}", "utf-8")
    stages.merge()
    assert (stages.out / "chat_template.jinja").read_text("utf-8") == chat_template(add_bos=True)
    assert load_tokenizer(stages.out).chat_template == chat_template(add_bos=True)


def test_what_belongs_to_the_base_comes_along_and_nothing_else(stages: Stages) -> None:
    for name in ("LICENSE", "NOTICE.txt", "special_tokens_map.json", "pytorch_model.bin", "modeling.py"):
        (stages.model / name).write_text("{}", "utf-8")
    stages.merge()
    names = {path.name for path in stages.out.iterdir()}
    assert {"LICENSE", "NOTICE.txt", "special_tokens_map.json", "generation_config.json"} <= names
    assert not {"pytorch_model.bin", "modeling.py"} & names


# --- what is refused -------------------------------------------------------------------------------------------------


def test_an_adapter_of_other_weights_of_the_same_shapes_is_refused_with_both_hashes(stages: Stages) -> None:
    trained_on = read_facts(stages.base)[0].weights
    stages.edit_base(Q0, lambda weight: weight * 2)
    now = read_facts(stages.base)[0].weights
    stages.trained_on(trained_on)
    said = stages.refused()
    assert f"was trained on other weights ({trained_on[:12]})" in said
    assert f"({now[:12]}); run: tutor train" in said


@pytest.mark.parametrize("damage", ["no manifest", "names no base"])
def test_an_adapter_that_does_not_say_what_it_was_trained_on_is_refused(stages: Stages, damage: str) -> None:
    if damage == "no manifest":
        (stages.adapter / "manifest.json").unlink()
    else:
        edit(stages.adapter / "manifest.json", results={})
    assert "was trained on other weights" in stages.refused()


def test_a_base_with_fewer_layers_is_refused_naming_the_first_that_is_missing(stages: Stages) -> None:
    for path in stages.model.glob("*.safetensors"):
        held = {name: weight for name, weight in load_file(path).items() if ".layers.1." not in name}
        save_file(held, path, metadata={"format": "pt"})
    said = stages.refused()
    assert "the base has no model.layers.1.self_attn.k_proj.weight (4 of 8 adapted layers missing)" in said


def test_a_layer_of_another_shape_is_refused_with_both_shapes(stages: Stages) -> None:
    stages.edit_base(Q0, lambda weight: weight[:32].clone())
    assert f"{Q0} is (32, 64) in the base, (64, 64) in the adapter" in stages.refused()


def test_half_of_a_pair_is_refused(stages: Stages) -> None:
    stages.edit_adapter(lambda held: held.pop(B0))
    assert "model.layers.0.self_attn.q_proj has no fitting lora_B" in stages.refused()


def test_the_other_half_of_a_pair_is_refused(stages: Stages) -> None:
    stages.edit_adapter(lambda held: held.pop(A0))
    assert "holds 15 tensors for 7 LoRA layers; expected pairs" in stages.refused()


def test_an_adapter_without_lora_layers_is_refused(stages: Stages) -> None:
    stages.edit_adapter(lambda held: held.clear())
    assert "holds 0 tensors for 0 LoRA layers" in stages.refused()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [A0, B0])
def test_a_value_that_is_no_number_is_refused(stages: Stages, name: str, value: float) -> None:
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
def test_what_fp16_cannot_hold_is_refused_by_name(stages: Stages, name: str, value: float, said: str) -> None:
    def put(weight: Any) -> Any:
        weight.view(-1)[0] = value
        return weight

    stages.edit_base(name, put)
    assert f"{name} holds {said}"[:60] in stages.refused()


def test_a_sum_that_fp16_cannot_hold_is_refused(stages: Stages) -> None:
    stages.edit_adapter(lambda held: held[B0].mul_(1e7))
    assert f"{Q0} holds " in stages.refused()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("peft_type", "LOHA"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(stages: Stages, name: str, value: Any) -> None:
    edit(stages.adapter / "adapter_config.json", **{name: value})
    assert f"{name} = {value!r} is not plain LoRA" in stages.refused()


def test_tensors_beside_the_pairs_are_refused(merged: Stages, tmp_path: Path) -> None:
    adapter = adapter_stage(merged.model, tmp_path / "adapter", "", use_dora=True)
    edit(adapter / "adapter_config.json", use_dora=False)
    with pytest.raises(ArtifactError, match="expected pairs"):
        merge.read_deltas(adapter)


@pytest.mark.parametrize("value", [None, "16", []])
def test_a_scale_that_is_no_number_is_refused(stages: Stages, value: Any) -> None:
    edit(stages.adapter / "adapter_config.json", lora_alpha=value)
    assert "lora_alpha" in stages.refused()


@pytest.mark.parametrize(
    "name", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "model/tokenizer_config.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_file_is_one_line_that_names_it(stages: Stages, name: str, damage: str) -> None:
    path = stages.out.parent / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    assert str(path) in stages.refused()


def test_a_damaged_shard_of_the_base_is_named(stages: Stages) -> None:
    path = sorted(stages.model.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is damaged" in stages.refused()


def test_a_shard_that_is_missing_is_not_merged_around(stages: Stages) -> None:
    path = sorted(stages.model.glob("*.safetensors"))[0]  # lm_head and the first layer's start
    names = load_file(path).keys()
    path.unlink()
    stages.edit_adapter(lambda held: [held.pop(name) for name in list(held) if _layer(name) in names])
    assert path.name in stages.refused()


def _layer(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".lora_A", "").replace(".lora_B", "")
