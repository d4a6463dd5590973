"""stages/base: a base of each family, its conversion with numbers compared, and the same base out of a GGUF."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models.families import FAMILIES, PREFIXED, WINDOWED, family_folder
from support.models.tiny_models import edit, recipe, spanish, tensors
from support.shared import copied, shared

torch = pytest.importorskip("torch")
from tutor.engines.hf.score import answer_logprobs
from tutor.engines.llamacpp.convert import Conversion, to_gguf
from tutor.engines.llamacpp.score import score
from tutor.engines.llamacpp.tokenize import tokenize
from tutor.errors import ArtifactError, RecipeError
from tutor.formats.architectures import ARCHITECTURES
from tutor.formats.models.gguf import read_gguf
from tutor.formats.models.gguf_metadata import check_gguf, implied_metadata
from tutor.formats.models.gguf_weights import check_exact, weights_of
from tutor.formats.models.model_config import check_model_config, equal_length
from tutor.formats.models.model_folder import load_tokenizer
from tutor.prompt.encoding import continuation_ids
from tutor.stages.base import stage as base
from tutor.stages.base.check import canary_text, plain_canary_text
from tutor.stages.base.package.folder import make_folder
from tutor.stages.parity.gate import SAME_WEIGHTS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.llamacpp]

LENGTHS = {"train": {"max_length": 64}, "generate": {"context": 64}}


def checked(model: Path, out: Path) -> dict[str, Any]:
    """Run the base stage on a model folder."""
    out.mkdir(parents=True)
    return base.run(recipe(out.parent / "r.toml", base={"source": f"path:{model}"}, **LENGTHS), {}, out)


@pytest.fixture(scope="module")
def converted(real: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The 16-bit GGUF of every tiny model, made by one process; returns the file of a name."""

    def make(folder: Path) -> None:
        models = {name: family_folder(tmp_path_factory, name) for name in FAMILIES}
        splits = {name: base.facts_of(model, "x", "x").pre_tokenizer for name, model in models.items()}
        to_gguf(*(Conversion(model, folder / f"{name}.gguf", splits[name]) for name, model in models.items()))

    folder = shared(tmp_path_factory, "families_gguf", make)
    return lambda name: folder / f"{name}.gguf"


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_base_that_is_no_llama_passes_the_check(tmp_path: Path, tmp_path_factory: Any, real: None, name: str) -> None:
    model = family_folder(tmp_path_factory, name)
    found = checked(model, tmp_path / "out")
    assert found["check"]["tensors"] == len(tensors(model))
    assert found["check"]["tokens"] > 150


@pytest.mark.parametrize("name", FAMILIES)
def test_conversion_of_each_family_equals_its_folder(
    converted: Callable[[str], Path], tmp_path_factory: Any, name: str
) -> None:
    """Every number, every value of the metadata, and the ids of a text: what the base stage and convert compare."""
    model, path = family_folder(tmp_path_factory, name), converted(name)
    facts = base.facts_of(model, "x", "x")
    gguf = check_gguf(path, implied_metadata(model, facts))
    assert check_exact(path, gguf, weights_of(model)) == []
    family = ARCHITECTURES[FAMILIES[name].model_type]
    assert (gguf.fields["general.architecture"], gguf.tensors["blk.0.ffn_up.weight"].kind) == (
        family.gguf,
        family.reference,
    )
    tokenizer = load_tokenizer(model)
    text = plain_canary_text() if name == PREFIXED else canary_text(tokenizer.eos_token)
    assert tokenize(path, text) == tokenizer(text)["input_ids"]


def test_blank_behind_control_tokens_is_known_and_no_base_prompt(
    tmp_path: Path, tmp_path_factory: Any, real: None
) -> None:
    """llama.cpp puts a blank before a text behind a control token, this tokenizer before the first one alone."""
    model = family_folder(tmp_path_factory, PREFIXED)
    assert checked(model, tmp_path / "out")["check"]["control_texts_differ"] == 1
    wanted = recipe(tmp_path / "r.toml", base={"source": f"path:{model}"}, prompt="base", **LENGTHS)
    with pytest.raises(ArtifactError, match=r"gives other ids in llama.cpp: at id 2 of .* expected \[.*\], found \["):
        base.run(wanted, {}, tmp_path / "out")


def test_answer_continues_a_prompt_without_another_blank(tmp_path_factory: Any) -> None:
    tokenizer = load_tokenizer(family_folder(tmp_path_factory, PREFIXED))
    for prompt, answer in (("Instrucción: x\nRespuesta:", " Una tupla.\n  let"), ("a", "\n\nb"), ("a:", "```ts")):
        whole = tokenizer(prompt + answer)["input_ids"]
        assert tokenizer(prompt)["input_ids"] + continuation_ids(tokenizer, answer) == whole
    assert tokenizer(" Una", add_special_tokens=False)["input_ids"] != continuation_ids(tokenizer, "Una")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != PREFIXED])
def test_continuation_of_other_tokenizers_is_the_text_alone(tmp_path_factory: Any, name: str) -> None:
    tokenizer = load_tokenizer(family_folder(tmp_path_factory, name))
    for text in (" Una tupla.", "\n\n  let x = 1;", "x"):
        assert continuation_ids(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "permutation": (
        "llama",
        lambda held: held.update({K: held[K].reshape(2, 2, 8, 64).swapaxes(1, 2).reshape(32, 64)}),
        "blk.1.attn_k.weight has other numbers than",
    ),
    "permutation that the family has not": (
        "qwen2",
        lambda held: held.update({K: held[K].reshape(2, 2, 8, 64).swapaxes(1, 2).reshape(32, 64)}),
        "blk.1.attn_k.weight has other numbers than",
    ),
    "bias dropped": ("qwen2", lambda held: held.pop(K.replace("weight", "bias")), "blk.1.attn_k.bias belongs to no w"),
    "bias permuted": (
        "llama_bias",
        lambda held: held.update({BIAS: held[BIAS].reshape(2, 2, 8).swapaxes(1, 2).reshape(32)}),
        "blk.1.attn_k.bias has other numbers than",
    ),
    "norm without its offset": (
        "gemma3_text",
        lambda held: held.update({NORM: held[NORM] - 1}),
        "blk.0.post_ffw_norm.weight has other numbers than",
    ),
    "norm of queries": (
        "qwen3",
        lambda held: held.update({QUERIES: held[QUERIES].flip(0)}),
        "blk.0.attn_q_norm.weight has other numbers than",
    ),
}
K, BIAS = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.bias"
NORM = "model.layers.0.post_feedforward_layernorm.weight"
QUERIES = "model.layers.0.self_attn.q_norm.weight"


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_conversion_is_found_by_name(
    converted: Callable[[str], Path], tmp_path: Path, tmp_path_factory: Any, fault: str
) -> None:
    """The file is compared with a folder whose numbers are those that a faulty converter would have read."""
    from safetensors.torch import save_file

    name, change, line = FAULTS[fault]
    model = copied(family_folder(tmp_path_factory, name), tmp_path / "model")
    held = tensors(model)
    change(held)
    weights = {key: weight.contiguous() for key, weight in held.items()}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    lines = check_exact(converted(name), read_gguf(converted(name)), weights_of(model))
    assert len(lines) == 1
    assert lines[0].startswith(line)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf_of_a_package_gives_the_base_back(
    converted: Callable[[str], Path], tmp_path: Path, tmp_path_factory: Any, name: str
) -> None:
    make_folder(converted(name), tmp_path / "back", "a_package")
    model = family_folder(tmp_path_factory, name)
    facts, original = (base.facts_of(folder, "x", "x") for folder in (tmp_path / "back", model))
    for what in ("vocabulary", "add_bos", "bos", "eos", "pad", "pre_tokenizer"):
        assert getattr(facts, what) == getattr(original, what)
    before, after = tensors(model), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert max(float((before[key].float() - after[key].float()).abs().max()) for key in before) < 1e-7
    text = spanish()
    ids, expected = (load_tokenizer(folder)(text)["input_ids"] for folder in (tmp_path / "back", model))
    assert ids == expected


def test_texts_beyond_a_window_that_llamacpp_ignores_are_refused(tmp_path: Path, tmp_path_factory: Any) -> None:
    model = family_folder(tmp_path_factory, WINDOWED)
    assert equal_length(json.loads((model / "config.json").read_text("utf-8"))) == 128
    wanted = recipe(tmp_path / "r.toml", base={"source": f"path:{model}"}, train={"max_length": 129})
    with pytest.raises(
        RecipeError, match=r"train.max_length is 129, and .* has a sliding window of 128 tokens"
    ) as found:
        base.run(wanted, {}, tmp_path)
    assert found.value.hint == "set train.max_length and generate.context to 128 at most"


UNFIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "soft caps": ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0, which llama.cpp"),
    "both sides": ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True, which"),
    "other pattern": (
        "gemma3_text",
        {"layer_types": ["full_attention"] + ["sliding_attention"] * 6},
        "layer_types tha",
    ),
    "other scale": ("gemma3_text", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256; llama.cpp scales by 32"),
    "other activation": ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'; llama.cpp computes"),
    "local RoPE": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "RoPE scaling 'linear' in layers with a sliding window",
    ),
    "RoPE of a Llama": ("qwen2", {"rope_parameters": {"rope_type": "llama3"}}, "RoPE scaling 'llama3'; llama.cpp comp"),
    "head_dim": ("qwen2", {"head_dim": 24}, "head_dim 24 and 4 heads; llama.cpp computes 16 of 64"),
    "experts": ("qwen3", {"num_experts": 8}, "num_experts, which no qwen3 has"),
    "biases": ("qwen3", {"attention_bias": True}, "attention_bias True, which llama.cpp does not compute"),
    "all layers with RoPE": ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "layers without RoPE that differ from llama"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_setting_that_llamacpp_computes_otherwise_is_refused(tmp_path: Path, tmp_path_factory: Any, name: str) -> None:
    family, changes, message = UNFIT[name]
    model = copied(family_folder(tmp_path_factory, family), tmp_path / "model")
    edit(model / "config.json", **changes)
    config = json.loads((model / "config.json").read_text("utf-8"))
    with pytest.raises(ArtifactError) as caught:
        check_model_config(config, "x")
    assert f"x: config.json has {message}" in str(caught.value)


def test_activations_beyond_f16_need_the_family_reference(tmp_path: Path, tmp_path_factory: Any, real: None) -> None:
    """The products of the MLP pass 65,504: F16 weights round them to infinity, BF16 weights do not."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = copied(family_folder(tmp_path_factory, "gemma3_text"), tmp_path / "model")
    held = tensors(model)
    for key in [key for key in held if "gate_proj" in key or "up_proj" in key]:
        held[key] *= 400
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    split = base.facts_of(model, "x", "x").pre_tokenizer
    files = {kind: tmp_path / f"a-{kind}.gguf" for kind in ("F16", "BF16")}
    to_gguf(*(Conversion(model, path, split, kind=kind) for kind, path in files.items()))
    ids = load_tokenizer(model)(spanish())["input_ids"][:80]
    rows = [(ids[:1], ids[1:])]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seen: list[float] = []
    for layer in loaded.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[0].abs().max())))
    ours = answer_logprobs(loaded, rows)[0]
    assert max(seen) > 65504
    with pytest.raises(ArtifactError, match="gives probabilities that are not finite"):
        score(files["F16"], rows, threads=1)
    theirs = score(files["BF16"], rows, threads=1)[0].logprobs
    differences = [abs(left - right) for left, right in zip(ours, theirs, strict=True)]
    limit = SAME_WEIGHTS["BF16"]
    assert sum(differences) / len(differences) < (limit.mean or 0) / 2
    assert max(differences) < (limit.worst or 0) / 2


def test_served_type_that_the_family_has_not_is_refused(tmp_path: Path, tmp_path_factory: Any) -> None:
    wanted = {"base": {"source": f"path:{family_folder(tmp_path_factory, 'gemma3_text')}"}}
    with pytest.raises(RecipeError, match=r"ollama.quantization is 'F16', and the 16-bit file of .* is BF16"):
        base.run(recipe(tmp_path / "r.toml", ollama={"quantization": "F16"}, **wanted), {}, tmp_path)
