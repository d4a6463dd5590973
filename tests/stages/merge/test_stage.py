"""stages/merge/stage.py: the base of the recipe, files of the output, killed and resumed merges, refused inputs."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny_models import edit, recipe, tensors
from support.processes.command import forked

torch = pytest.importorskip("torch")

from safetensors.torch import load_file
from support.models.merging import MERGE_MARKS, Q0, MergeStages, by_peft, differing, written

from tutor.artifacts.disk import read_json
from tutor.artifacts.manifest import find_damage
from tutor.artifacts.stage_folder import RESUME, writing
from tutor.errors import ArtifactError, HostError
from tutor.formats.models.model_folder import load_tokenizer, read_facts
from tutor.formats.models.safetensors import read_folder
from tutor.prompt.messages import conversation
from tutor.prompt.template_analysis import TokenFacts, analyse_template
from tutor.prompt.tutor_format import chat_template, render
from tutor.recipe.settings import Recipe
from tutor.stages.merge import stage as merge
from tutor.stages.merge.peft_adapter import read_adapter

pytestmark = MERGE_MARKS


def test_base_in_one_file_gives_one_file(tiny: Path, merged: MergeStages, tmp_path: Path) -> None:
    written(tiny, merged.adapter, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", RESUME}
    assert differing(tensors(tmp_path / "out"), tensors(merged.out)) == []


def test_shards_names_and_index_equal_those_of_the_base(merged: MergeStages) -> None:
    shards = sorted(path.name for path in merged.model.glob("*.safetensors"))
    assert sorted(path.name for path in merged.out.glob("*.safetensors")) == shards
    for name in shards:
        assert load_file(merged.out / name).keys() == load_file(merged.model / name).keys()
    index = "model.safetensors.index.json"
    assert (merged.out / index).read_bytes() == (merged.model / index).read_bytes()


def test_results_have_layers_and_largest_change(merged: MergeStages) -> None:
    deltas = read_adapter(merged.adapter).deltas.values()
    largest = max((delta.scale * (delta.b @ delta.a)).abs().max().item() for delta in deltas)
    results = merged.results  # type: ignore[attr-defined]
    assert (results["layers"], results["dtype"], results["base"]) == (8, "float16", "original")
    assert results["largest_change"] == pytest.approx(largest, abs=1e-6)
    assert largest > 0
    assert results["base_weights"] == read_facts(merged.base)[0].weights


@pytest.mark.parametrize("kept", [0, 1])
def test_progress_is_logged_up_to_the_total_bytes(
    stages: MergeStages, caplog: pytest.LogCaptureFixture, kept: int
) -> None:
    """Bytes of the weights only; a file that is kept counts as done."""
    if kept:  # the first of two files
        stages.merge()
        sorted(stages.out.glob("*.safetensors"))[1].unlink()
    stages.out.mkdir(exist_ok=True)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        merge.run(recipe(stages.out / "r.toml"), stages.inputs, stages.out)
    progress = [(record.done, record.total) for record in caplog.records if hasattr(record, "done")]
    sizes = [
        weight.nbytes for stored in sorted(stages.out.glob("*.safetensors")) for weight in load_file(stored).values()
    ]
    first = sum(weight.nbytes for weight in load_file(min(stages.out.glob("*.safetensors"))).values())
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})
    assert {total for _, total in progress} == {sum(sizes)}
    assert progress[-1][0] == sum(sizes)
    assert (progress[0][0] > first) == bool(kept)


@pytest.mark.parametrize("base", [None, "original", "nf4"])
def test_base_of_the_recipe_is_used_after_nf4_training(stages: MergeStages, tmp_path: Path, base: str | None) -> None:
    stages.trained_in_nf4()
    found = stages.merge(**({"base": base} if base else {}))
    assert found["base"] == (base or "original")
    weights = stages.merged(torch.bfloat16 if base == "nf4" else None)
    (tmp_path / "made").mkdir()
    merge.write_shards(weights, read_folder(stages.model), tmp_path / "made")
    assert differing(tensors(stages.out), tensors(tmp_path / "made")) == []


def test_nf4_base_is_refused_after_16_bit_training(stages: MergeStages) -> None:
    stages.trained_on(read_facts(stages.base)[0].weights, quantization="none", precision="fp32")
    with pytest.raises(ArtifactError, match=r"merge\.base is nf4 and .* was trained on the 16-bit base"):
        stages.merge(base="nf4")


# --- kills, disk and memory ------------------------------------------------------------------------------------------


def merge_stage() -> None:
    """Run the stage as the pipeline does. Arguments: the folder, the number of the open() of a base file, the signal.

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
    inputs = {"base": folder / "base", "train": folder / "adapter"}
    with writing(folder / "merged", "merge", {"version": version}, resume=True) as (out, results):
        results.update(merge.run(Recipe().model_copy(update={"path": folder / "r.toml"}), inputs, out))


def run_stage(folder: Path, *, opens: int = 0, number: int = signal.SIGKILL, version: str = "1") -> int:
    """Run the stage in a process of its own, with a signal at the given open() of a base file."""
    given = (str(folder), str(opens), str(int(number)), version)
    return forked(*given, scratch=folder / "process", entry=merge_stage).finish().returncode


def shard(folder: Path, number: int, partial: str = "") -> Path:
    return folder / f"merged{partial}" / f"model-0000{number}-of-00002.safetensors"


IN_THE_SECOND = 2 + 2 + 8 + 3


"""Number of the open() for the third tensor of the second file: two functions open both files, the first has eight
tensors."""


@pytest.mark.pipeline
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_merge_resumes_at_the_unfinished_file(stages: MergeStages, number: int) -> None:
    folder = stages.out.parent
    assert run_stage(folder, opens=IN_THE_SECOND, number=number) != 0
    assert not stages.out.exists()
    first = shard(folder, 1, ".partial").stat()
    assert shard(folder, 2, ".partial").exists()
    assert run_stage(folder) == 0
    assert shard(folder, 1).stat().st_ino == first.st_ino
    assert shard(folder, 1).stat().st_mtime_ns == first.st_mtime_ns
    files = {path.name: path.read_bytes() for path in stages.out.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    assert find_damage(stages.out, content=True) == []
    stages.merge()
    shutil.rmtree(stages.out / RESUME)
    assert files == {path.name: path.read_bytes() for path in stages.out.iterdir()}
    assert manifest["results"]["largest_change"] > 0
    assert sorted(path.name for path in folder.iterdir() if "merged" in path.name) == ["merged"]


@pytest.mark.pipeline
def test_finished_file_changed_since_is_written_again(stages: MergeStages) -> None:
    folder = stages.out.parent
    run_stage(folder, opens=IN_THE_SECOND)
    path = shard(folder, 1, ".partial")
    stat, damaged = path.stat(), bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that only its content differs
    assert run_stage(folder) == 0
    assert differing(tensors(stages.out), by_peft(stages.model, stages.adapter)) == []


@pytest.mark.pipeline
def test_files_of_another_key_are_not_reused(stages: MergeStages) -> None:
    folder = stages.out.parent
    run_stage(folder, opens=IN_THE_SECOND)
    first = shard(folder, 1, ".partial").stat()
    assert run_stage(folder, version="2") == 0
    assert shard(folder, 1).stat().st_mtime_ns != first.st_mtime_ns


@pytest.mark.pipeline
def test_small_disk_raises_error_before_the_merge(stages: MergeStages) -> None:
    full = stages.out.parent / "disk"
    full.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with pytest.raises(HostError, match=r"0\.0 GB free, merging needs 0\.0 GB; free disk space"):
            merge.run(recipe(full / "r.toml"), stages.inputs, full)
        assert not list(full.iterdir())
    finally:
        subprocess.run(["umount", full], check=True)


# --- configuration, tokenizer, other files ---------------------------------------------------------------------------


def test_config_has_dtype_float16_and_is_otherwise_unchanged(merged: MergeStages) -> None:
    before, after = (read_json(folder / "config.json") for folder in (merged.model, merged.out))
    assert (after.pop("dtype"), after.pop("torch_dtype")) == ("float16", "float16")
    assert before.pop("dtype") == "bfloat16"
    assert after == before
    assert after["rope_parameters"]["rope_type"] == "llama3"


def test_tokenizer_files_differ_only_in_the_chat_template(merged: MergeStages) -> None:
    assert (merged.out / "tokenizer.json").read_bytes() == (merged.model / "tokenizer.json").read_bytes()
    before, after = (read_json(folder / "tokenizer_config.json") for folder in (merged.model, merged.out))
    assert {name for name in before if before[name] != after[name]} == {"chat_template"}
    assert after.keys() == before.keys()
    ours = chat_template(add_bos=True)
    assert after["chat_template"] == ours
    assert (merged.out / "chat_template.jinja").read_text("utf-8") == ours


def test_merged_tokenizer_renders_served_prompt_with_one_bos(merged: MergeStages) -> None:
    tokenizer = load_tokenizer(merged.out)
    messages = conversation("¿Qué es un genérico?", "Eres un tutor.")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == tokenizer.bos_token + render(messages)
    ids = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids == tokenizer(render(messages))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_base_chat_template_file_is_replaced_by_ours(stages: MergeStages) -> None:
    (stages.model / "chat_template.jinja").write_text("{{ '<think>' }}", "utf-8")
    stages.merge()
    assert (stages.out / "chat_template.jinja").read_text("utf-8") == chat_template(add_bos=True)
    assert load_tokenizer(stages.out).chat_template == chat_template(add_bos=True)


def test_end_of_turn_of_the_base_s_template_becomes_eos(tmp_path_factory: pytest.TempPathFactory) -> None:
    """In all files that name EOS, so that transformers, vLLM and llama.cpp's converter end an answer there."""
    from support.models.families import family_folder
    from support.shared import copied

    model, out = tmp_path_factory.mktemp("served") / "model", tmp_path_factory.mktemp("merged")
    copied(family_folder(tmp_path_factory, "llama"), model)
    (model / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|end_of_text|>"}}', "utf-8")
    (model / "generation_config.json").write_text('{"eos_token_id": 4, "top_p": 0.9}', "utf-8")
    tokenizer = load_tokenizer(model)
    tokens = TokenFacts("<|begin_of_text|>", "<|end_of_text|>", add_bos=True, added=tokenizer.get_added_vocab())
    prompt = analyse_template(tokenizer.chat_template, tokens, where="base", reasoning="none")
    merge.copy_other_files(model, out, prompt, dtype="float16", add_bos=True)
    merged, end = load_tokenizer(out), tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert (merged.eos_token, merged.eos_token_id, prompt.end_id) == ("<|eot_id|>", end, end)
    assert read_json(out / "special_tokens_map.json") == {"eos_token": {"content": "<|eot_id|>"}}
    assert read_json(out / "generation_config.json") == {"eos_token_id": [end, 4], "top_p": 0.9}
    assert read_json(out / "config.json")["eos_token_id"] == end
    asked = [dict(message) for message in conversation("¿Qué?", "Sé breve.")]
    ids = merged.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert list(ids) == merged(prompt.render(conversation("¿Qué?", "Sé breve.")))["input_ids"]


def test_licenses_and_settings_are_copied_other_files_not(stages: MergeStages) -> None:
    for name in ("LICENSE", "NOTICE.txt", "special_tokens_map.json", "pytorch_model.bin", "modeling.py"):
        (stages.model / name).write_text("{}", "utf-8")
    stages.merge()
    names = {path.name for path in stages.out.iterdir()}
    assert {"LICENSE", "NOTICE.txt", "special_tokens_map.json", "generation_config.json"} <= names
    assert not {"pytorch_model.bin", "modeling.py"} & names


# --- refused inputs --------------------------------------------------------------------------------------------------


def test_adapter_of_other_base_is_refused_with_both_hashes(stages: MergeStages) -> None:
    trained_on = read_facts(stages.base)[0].weights
    stages.edit_base(Q0, lambda weight: weight * 2)
    now = read_facts(stages.base)[0].weights
    stages.trained_on(trained_on)
    message = stages.refused()
    assert f"was trained on other weights ({trained_on[:12]})" in message
    assert f"({now[:12]}); run: tutor train" in message


@pytest.mark.parametrize("damage", ["no manifest", "names no base"])
def test_adapter_without_base_hash_is_refused(stages: MergeStages, damage: str) -> None:
    if damage == "no manifest":
        (stages.adapter / "manifest.json").unlink()
    else:
        edit(stages.adapter / "manifest.json", results={})
    assert "was trained on other weights" in stages.refused()


@pytest.mark.parametrize(
    "name", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "model/tokenizer_config.json"]
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_adapter_file_is_named_in_one_line(stages: MergeStages, name: str, damage: str) -> None:
    path = stages.out.parent / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    assert str(path) in stages.refused()


def test_damaged_base_shard_is_named(stages: MergeStages) -> None:
    path = sorted(stages.model.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is damaged" in stages.refused()


def test_missing_base_shard_raises_error(stages: MergeStages) -> None:
    path = sorted(stages.model.glob("*.safetensors"))[0]  # lm_head and the first layer's start
    names = load_file(path).keys()
    path.unlink()
    stages.edit_adapter(lambda held: [held.pop(name) for name in list(held) if _layer(name) in names])
    assert path.name in stages.refused()


def _layer(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".lora_A", "").replace(".lora_B", "")
