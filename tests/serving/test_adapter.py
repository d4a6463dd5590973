"""serving/adapter.py: `lora/` with a fake converter. tests/end_to_end/test_real_ollama.py publishes a real one."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.fakes.ollama import write_gguf
from support.models.chat_templates import CHATML, FACTS
from support.outputs.published import SYSTEM

from tutor.artifacts.layout import BuildFolder
from tutor.artifacts.stage_folder import writing
from tutor.errors import ArtifactError, RecipeError
from tutor.formats.models.served_quantization import write_served
from tutor.prompt.template_analysis import analyse_template
from tutor.recipe.settings import OllamaSettings, Recipe
from tutor.serving.adapter import lora_folder
from tutor.serving.builds import read_model
from tutor.serving.publish import publish

BASE_FACTS = {"source": "tiny", "model": "model", "weights": "0", "vocabulary": 257, "add_bos": False, "bos": None}
BASE_FACTS |= {"eos": 256, "pad": None, "pre_tokenizer": "x", "check": {}, "prompt": {}}


@pytest.fixture
def folder(recipe: Recipe, tmp_path: Path) -> BuildFolder:
    """A build folder after data, base, train and convert, with a base in Q8_0."""
    folder = BuildFolder(tmp_path / "build", recipe.name)
    with writing(folder.stage("data"), "data", {}) as (out, _):
        (out / "train.jsonl").write_text('{"instruction": "¿?", "response": "Sí."}\n', "utf-8")
    with writing(folder.stage("base"), "base", {}) as (out, _):
        (out / "model").mkdir()
        (out / "model" / "model.safetensors").write_bytes(b"base")
        (out / "base.json").write_text(json.dumps(BASE_FACTS), "utf-8")
    with writing(folder.stage("train"), "train", {}) as (out, _):
        (out / "adapter_model.safetensors").write_bytes(b"adapter")
    with writing(folder.stage("convert"), "convert", {}) as (out, _):
        write_gguf(out / "base-Q8_0.gguf", chat_template="{% for m in messages %}<think>{% endfor %}")
    return folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, str]]:
    """Metadata of each conversion by a fake converter, which writes a fake GGUF."""
    made: list[Mapping[str, str]] = []

    def lora_to_gguf(adapter: Path, base: Path, base_gguf: Path, out: Path, metadata: Mapping[str, str]) -> int:
        assert (adapter / "adapter_model.safetensors").is_file()
        assert (base / "model.safetensors").is_file()
        assert base_gguf.name == "base-Q8_0.gguf"
        write_gguf(out, kind="adapter")
        made.append(metadata)
        return 14

    monkeypatch.setattr("tutor.engines.llamacpp.adapter.lora_to_gguf", lora_to_gguf)
    return made


def test_lora_folder_is_made_once(recipe: Recipe, folder: BuildFolder, conversions: list[Mapping[str, str]]) -> None:
    assert lora_folder(recipe, folder) == lora_folder(recipe, folder) == folder.lora
    assert len(conversions) == 1
    assert "tutor.adapter.sha256" in conversions[0]
    assert "tutor.merged.sha256" not in conversions[0]


def retrained(recipe: Recipe, folder: BuildFolder) -> Recipe:
    """Make another adapter; return the recipe unchanged."""
    with writing(folder.stage("train"), "train", {}) as (out, _):
        (out / "adapter_model.safetensors").write_bytes(b"another")
    return recipe


@pytest.mark.parametrize(
    "change",
    [lambda recipe, folder: recipe.model_copy(update={"system": "otro"}), retrained],
    ids=["system text", "adapter"],
)
def test_lora_folder_is_made_again_after_a_change(
    recipe: Recipe,
    folder: BuildFolder,
    conversions: list[Mapping[str, str]],
    change: Callable[[Recipe, BuildFolder], Recipe],
) -> None:
    lora_folder(recipe, folder)
    lora_folder(change(recipe, folder), folder)
    assert len(conversions) == 2


@pytest.mark.usefixtures("conversions")
def test_lora_folder_follows_the_benchmarks_quantization(recipe: Recipe, folder: BuildFolder) -> None:
    recipe = recipe.model_copy(update={"ollama": OllamaSettings(quantization="auto")})
    for chosen in ("Q8_0", "F16"):
        with writing(folder.stage("ladder"), "ladder", {}) as (out, _):
            write_served(out, chosen)
        if chosen == "Q8_0":
            lora_folder(recipe, folder)
    with pytest.raises(ArtifactError, match=r"base-F16\.gguf is not there"):
        lora_folder(recipe, folder)


@pytest.mark.usefixtures("conversions")
def test_lora_folder_is_a_model_with_base_adapter_and_parser(recipe: Recipe, folder: BuildFolder) -> None:
    model = read_model(lora_folder(recipe, folder), "Q8_0")
    assert model.name == "tutor-lora"
    assert list(model.files.values()) == [folder.gguf("base", "Q8_0").resolve()]
    assert list(model.adapters.values()) == [(folder.lora / "tutor-lora.gguf").resolve()]
    assert (model.settings["system"], model.settings["parser"]) == (SYSTEM, "passthrough")
    lines = (folder.lora / "Modelfile").read_text("utf-8").splitlines()
    assert sum(line.startswith("ADAPTER ") for line in lines) == 1
    assert lines[-1] == "PARSER passthrough", "without a parser Ollama takes the chat template of the base"


def test_lora_folder_of_a_dora_is_refused_at_once(
    recipe: Recipe, folder: BuildFolder, conversions: list[Mapping[str, str]], tmp_path: Path
) -> None:
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"variant": "dora"})})
    for refused in (lambda: lora_folder(recipe, folder), lambda: publish(recipe, tmp_path / "none", adapter=True)):
        with pytest.raises(RecipeError, match=r"train\.variant is 'dora'.*merged model"):
            refused()
    assert not conversions
    assert not folder.lora.exists()


@pytest.mark.usefixtures("conversions")
def test_lora_folder_of_the_base_template_has_no_parser(recipe: Recipe, folder: BuildFolder) -> None:
    prompt = analyse_template(CHATML, FACTS, where="base", reasoning="none")
    with writing(folder.stage("base"), "base", {}) as (out, _):
        (out / "model").mkdir()
        (out / "model" / "model.safetensors").write_bytes(b"base")
        (out / "base.json").write_text(json.dumps({**BASE_FACTS, "prompt": prompt.to_json()}), "utf-8")
    with writing(folder.stage("convert"), "convert", {}) as (out, _):
        tokens = ["<eos>", *(f"t{number}" for number in range(1, prompt.end_id)), prompt.end]
        write_gguf(out / "base-Q8_0.gguf", tokens=tokens)
    own = recipe.model_copy(update={"prompt": "base"})
    model = read_model(lora_folder(own, folder), "Q8_0", prompt=prompt, own_template=prompt.template)
    assert model.is_native
    assert not {"template", "parser"} & set(model.settings)
    assert model.settings["parameters"]["stop"] == ["<|im_end|>"], "the base's EOS is another token"
    lines = (folder.lora / "Modelfile").read_text("utf-8").splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("TEMPLATE", "PARSER", "ADAPTER"))] == ["ADAPTER"]


def test_lora_folder_without_a_converted_base_is_refused(recipe: Recipe, folder: BuildFolder) -> None:
    with writing(folder.stage("convert"), "convert", {}) as (out, _):
        write_gguf(out / "tutor-Q8_0.gguf")
    with pytest.raises(ArtifactError, match=r"convert\.base = true"):
        lora_folder(recipe, folder)


def test_lora_folder_without_an_adapter_names_the_stage(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="run: tutor run --until data"):
        lora_folder(recipe, BuildFolder(tmp_path / "empty", recipe.name))


@pytest.mark.usefixtures("conversions")
@pytest.mark.parametrize(("base", "warnings"), [("nf4", 1), ("bf16", 0)])
def test_lora_folder_beside_a_merge_into_nf4_causes_a_warning(
    recipe: Recipe, folder: BuildFolder, caplog: pytest.LogCaptureFixture, base: str, warnings: int
) -> None:
    with writing(folder.stage("merge"), "merge", {}) as (_, results):
        results["base"] = base
    lora_folder(recipe, folder)
    assert caplog.text.count("their answers differ") == warnings
