"""stages/convert/stage.py: the disk check, calibration text, and (marked llamacpp) runs on a tiny random Llama."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.fakes.ollama import CAPABILITY_WORDS
from support.files import write_rows
from support.models.gguf_bytes import facts
from support.models.random_llama import llama3_splitter, make_tiny

from tutor.errors import ArtifactError, HostError
from tutor.formats.models.gguf import read_gguf
from tutor.machine import host, run_cost
from tutor.prompt.encoding import adds_bos
from tutor.prompt.tutor_format import chat_template
from tutor.recipe.settings import ConvertSettings, OllamaSettings, Recipe
from tutor.stages.convert import stage


@pytest.fixture(scope="module")
def inputs(real: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the base stage and of the merge stage, as a tiny random Llama has them."""
    from transformers import AutoTokenizer

    home = tmp_path_factory.mktemp("build")
    base, merged = home / "base", home / "merged"
    make_tiny(base / "model", llama3_splitter())
    make_tiny(merged, llama3_splitter())
    (merged / "chat_template.jinja").write_text(chat_template(add_bos=True), "utf-8")
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    found = facts(
        vocabulary=len(tokenizer),
        add_bos=adds_bos(tokenizer),
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
    )
    (base / "base.json").write_text(json.dumps(asdict(found)), "utf-8")
    adapter, data = home / "adapter", home / "data"
    for made in (adapter, data):
        made.mkdir()
    save_file({"a.lora_A.weight": np.zeros((8, 8), np.float32)}, adapter / "adapter_model.safetensors")
    write_rows(data / "train.jsonl", [{"instruction": f"¿Qué es {n}?", "response": "Un tipo. " * 20} for n in range(9)])
    return {"base": base, "merge": merged, "train": adapter, "data": data}


def recipe(*kinds: Any, base: bool = True, served: str = "Q4_K_M") -> Recipe:
    return Recipe(
        convert=ConvertSettings(quantizations=list(kinds), base=base), ollama=OllamaSettings(quantization=served)
    )


@pytest.fixture(scope="module")
def made(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("gguf")
    return out, stage.run(recipe("Q8_0", "Q4_K_M"), inputs, out)


@pytest.mark.llamacpp
def test_run_makes_exactly_the_files_of_the_recipe(made: tuple[Path, dict[str, Any]]) -> None:
    out, results = made
    names = {"tutor-F16.gguf", "tutor-Q8_0.gguf", "tutor-Q4_K_M.gguf", "base-Q4_K_M.gguf"}
    assert {path.name for path in out.iterdir()} == names == set(results["files"])
    assert {name: entry["size"] for name, entry in results["files"].items()} == {
        path.name: path.stat().st_size for path in out.iterdir()
    }
    assert results["files"]["tutor-Q8_0.gguf"]["fallback_tensors"] == 0
    # Rows of 64 and 128 do not divide into blocks of 256.
    assert results["files"]["tutor-Q4_K_M.gguf"]["fallback_tensors"] == 14
    assert results["pre_tokenizer"] == "llama-bpe"


@pytest.mark.llamacpp
def test_tutor_files_have_our_template_without_capabilities(made: tuple[Path, dict[str, Any]]) -> None:
    for path in made[0].glob("tutor-*.gguf"):
        template = read_gguf(path).fields["tokenizer.chat_template"]
        assert template == chat_template(add_bos=True)
        assert not [word for word in CAPABILITY_WORDS if word in template]


@pytest.mark.llamacpp
def test_reader_agrees_with_the_gguf_package(made: tuple[Path, dict[str, Any]]) -> None:
    for path in made[0].iterdir():
        ours, theirs = read_gguf(path), gguf.GGUFReader(path)
        fields = {name: item.contents() for name, item in theirs.fields.items() if not name.startswith("GGUF.")}
        assert ours.fields == fields
        assert {name: (item.kind, item.shape) for name, item in ours.tensors.items()} == {
            item.name: (item.tensor_type.name, tuple(item.shape.tolist())) for item in theirs.tensors
        }


@pytest.mark.llamacpp
def test_second_run_gives_equal_bytes_and_keeps_served_f16_base(
    made: tuple[Path, dict[str, Any]], inputs: dict[str, Path], tmp_path: Path
) -> None:
    stage.run(recipe("Q8_0", served="F16"), inputs, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"tutor-F16.gguf", "tutor-Q8_0.gguf", "base-F16.gguf"}
    for name in ("tutor-F16.gguf", "tutor-Q8_0.gguf"):
        assert (tmp_path / name).read_bytes() == (made[0] / name).read_bytes()


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    ("name", "sabotage", "line"),
    [
        ("chat_template.jinja", lambda text: text.replace("Respuesta", "Answer"), "chat_template: expected"),
        ("tokenizer_config.json", lambda text: text.replace('"eos_token": "</s>"', '"eos_token": "<s>"'), "eos: "),
        ("tokenizer.json", lambda text: drop(text, "post_processor"), "add_bos: expected True, found None"),
        (
            "config.json",
            lambda text: text.replace('"rope_type": "llama3"', '"rope_type": "default"'),
            "rope_factors: expected True, found False",
        ),
    ],
)
def test_changed_merged_folder_is_refused(
    inputs: dict[str, Path], tmp_path: Path, name: str, sabotage: Callable[[str], str], line: str
) -> None:
    merged = shutil.copytree(inputs["merge"], tmp_path / "merged")
    changed = sabotage((merged / name).read_text("utf-8"))
    assert changed != (merged / name).read_text("utf-8")
    (merged / name).write_text(changed, "utf-8")
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match=line):
        stage.run(recipe("Q8_0", base=False, served="Q8_0"), {**inputs, "merge": merged}, tmp_path / "out")


@pytest.mark.llamacpp
def test_large_base_leaves_its_16_bits_before_the_tutors_come(
    made: tuple[Path, dict[str, Any]], inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_cost, "TOGETHER_BYTES", 0)
    seen: list[list[str]] = []
    quantize = stage.quantize

    def watched(*arguments: Any, **options: Any) -> None:
        seen.append(sorted(path.name for path in tmp_path.glob("*F16.gguf")))
        quantize(*arguments, **options)

    monkeypatch.setattr(stage, "quantize", watched)
    stage.run(recipe("Q8_0", "Q4_K_M"), inputs, tmp_path)
    assert seen == [["base-F16.gguf"], ["tutor-F16.gguf"], ["tutor-F16.gguf"]]
    for path in made[0].iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def drop(text: str, key: str) -> str:
    return json.dumps({**json.loads(text), key: None})


@pytest.mark.llamacpp
def test_auto_quantizes_base_fully_with_importance_matrix(inputs: dict[str, Path], tmp_path: Path) -> None:
    asked = ConvertSettings(quantizations=["Q8_0", "IQ4_NL"], imatrix=True)
    results = stage.run(Recipe(convert=asked, ollama=OllamaSettings(quantization="auto")), inputs, tmp_path)
    models = {f"{name}-{kind}.gguf" for name in ("tutor", "base") for kind in ("Q8_0", "IQ4_NL")} | {"tutor-F16.gguf"}
    assert set(results["files"]) == models
    assert {path.name for path in tmp_path.iterdir()} == models | {"tutor.imatrix", "base.imatrix"}
    fields = read_gguf(tmp_path / "tutor-IQ4_NL.gguf").fields
    assert (fields["quantize.imatrix.file"], fields["quantize.imatrix.dataset"]) == ("tutor.imatrix", "train.txt")


@pytest.mark.llamacpp
def test_quantized_files_keep_their_lineage(made: tuple[Path, dict[str, Any]]) -> None:
    lineage = made[1]["lineage"]
    assert {"tutor.data.sha256", "tutor.adapter.sha256", "tutor.merged.sha256", "tutor.tools"} <= set(lineage)
    for name in ("tutor-F16.gguf", "tutor-Q4_K_M.gguf"):
        assert lineage.items() <= dict(read_gguf(made[0] / name).fields).items()
    base = read_gguf(made[0] / "base-Q4_K_M.gguf").fields
    assert "tutor.base.sha256" in base
    assert "tutor.adapter.sha256" not in base, "the base was never trained"


def test_full_disk_raises_host_error_before_converting(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "free_disk", lambda folder: (1, folder, 1000))
    with pytest.raises(HostError, match="GB free, converting needs"):
        stage.run(recipe("Q8_0", served="Q8_0"), inputs, tmp_path)
    assert not list(tmp_path.iterdir())


def test_calibration_text_is_rendered_as_in_training() -> None:
    rows = [{"instruction": "¿A?", "response": "Uno."}, {"instruction": "¿B?", "response": "Dos."}]
    text = stage.CalibrationText(rows, "Sistema.").render("<s>", "</s>")
    one = "Sistema.\n\nInstrucción: ¿A?\nRespuesta: Uno.</s><s>Sistema.\n\nInstrucción: ¿B?\nRespuesta: Dos.</s>"
    assert text == one
    assert len(stage.calibration_rows(rows * 10_000)) * 11 == pytest.approx(
        stage.CALIBRATION_CHARACTERS / len("¿A?Uno.") * 11, rel=0.1
    )
