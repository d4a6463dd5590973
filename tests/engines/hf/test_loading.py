"""engines/hf/loading.py: adapters, quantized models, and folders that are incomplete or do not fit."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file
from support.models.learnt_model import ENDS, ask
from support.shared import copied

from tutor.engines.hf.engine import TransformersEngine
from tutor.engines.hf.loading import load, load_base
from tutor.engines.hf.score import answer_logprobs
from tutor.errors import ArtifactError, RecipeError
from tutor.prompt.encoding import encode

pytestmark = pytest.mark.usefixtures("one_thread")


def test_loaded_adapter_changes_the_answer(engine: TransformersEngine, folder: Path, adapter: Path) -> None:
    tuned = load(folder, adapter, quantization="none", precision="fp32")
    row = encode(engine.tokenizer, *ENDS)
    rows = [(row.ids[: row.n_prompt], row.ids[row.n_prompt :])]
    assert sum(answer_logprobs(tuned.model, rows)[0]) < sum(answer_logprobs(engine.model, rows)[0]) - 1
    assert ask(tuned, ENDS[0])[0].text != ENDS[1]
    assert tuned.model.generation_config.top_k is None


@pytest.mark.parametrize(("quantization", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantized_model_answers_and_is_named_as_quantized(folder: Path, quantization: str, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    engine = load(folder, None, quantization=quantization, precision="fp32")
    assert quantization.upper() in engine.name
    assert type(engine.model.model.layers[0].mlp.up_proj).__name__ == kind
    assert ask(engine, ENDS[0])[0].tokens > 0


def test_load_of_faulty_folder_raises_error_with_its_path(folder: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"adapter_config\.json is missing"):
        load(folder, tmp_path, quantization="none", precision="fp32")
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        load(tmp_path, None, quantization="none", precision="fp32")
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "r": 8}), "utf-8")
    with pytest.raises(ArtifactError, match="does not fit its base"):
        load(folder, tmp_path, quantization="none", precision="fp32")


@pytest.mark.parametrize(
    ("damage", "quantization"),
    [
        ("cut", "none"),
        ("cut", "nf4"),
        ("a tensor missing", "none"),
        ("a tensor missing", "nf4"),
        ("a tensor of another shape", "none"),
    ],
)
def test_base_with_missing_tensors_raises_error(damage: str, quantization: str, tiny: Path, tmp_path: Path) -> None:
    model = copied(tiny, tmp_path / "model")
    path, name = model / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    held = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
        name = "cannot load"
    else:
        weight = held.pop(name)
        if damage == "a tensor of another shape":
            held[name] = weight[:100].clone()
        save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=name):
        load_base(model, quantization, "fp32")


def test_nf4_rows_that_end_inside_a_block_are_refused_on_a_cpu(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from transformers import AutoConfig, LlamaForCausalLM

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    read = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    assert (read - weight).std() > 0.2, "bitsandbytes reads such rows now: the refusal can go"
    config = AutoConfig.from_pretrained(folder)
    config.intermediate_size = 96
    made = copied(folder, tmp_path / "model")
    (made / "model.safetensors").unlink()
    LlamaForCausalLM(config).save_pretrained(made)
    with pytest.raises(RecipeError, match=r"rows of 96 numbers: .* a multiple of 64; set train.quantization"):
        load_base(made, "nf4", "fp32")
    assert load_base(made, "none", "fp32")
