"""The whole chain on the tiny Llama, as a user runs it: once, twice, killed at every stage, asked.

Run alone with: .venv/bin/pytest tests/end_to_end/test_whole_run.py
"""

import json
import math
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.processes.command import TINY, TUTOR, Done, environment, forked, in_process
from support.shared import copied, linked

from tutor.artifacts.disk import remove
from tutor.artifacts.manifest import MANIFEST, find_damage, read_manifest
from tutor.artifacts.stage_folder import PARTIAL
from tutor.engines import own_generation
from tutor.engines.llamacpp.build import build_folder, is_built
from tutor.pipeline import registry
from tutor.recipe.reading import read_recipe
from tutor.serving.evaluation.baselines import run_baselines

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.llamacpp,
    pytest.mark.skipif(not is_built(build_folder()), reason="the pinned llama.cpp is not built"),
]

MADE = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "merged/model.safetensors")


def tutor(*arguments: str | Path, build: Path, stdin: str = "") -> "Done[str]":
    return in_process(*arguments, "--recipe", TINY, "--build", build, stdin=stdin)


def result(*arguments: str | Path, build: Path) -> Any:
    done = tutor(*arguments, "--json", build=build)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_run_completes_the_folder_of_every_stage(built: Path) -> None:
    assert json.loads((built / "run.json").read_text("utf-8"))["ran"] == list(registry.BY_NAME)
    for state in result("status", "--verify", build=built):
        assert state["condition"] == "up to date", state
    left = [
        path.name
        for path in (built / "tiny").iterdir()
        if path.name.endswith((".partial", ".replaced", ".checkpoints"))
    ]
    assert left == []


def test_second_run_does_nothing_and_prints_so(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (built / "tiny").rglob(MANIFEST)}
    done = tutor("run", build=built)
    assert "Nothing to do" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (built / "tiny").rglob(MANIFEST)}


def test_up_to_date_run_imports_no_slow_package(built: Path) -> None:
    """A second `make demo` without Ollama: all that it imports is there before the first stage."""
    slow = ("torch", "numpy", "transformers", "tokenizers", "gguf", "httpx", "ollama", "jinja2", "markdown_it", "rich")
    code = (
        f"import sys; sys.modules |= dict.fromkeys({slow!r}); from tutor.cli.main import main; "
        f"sys.argv[1:] = ['run', '--publish', '--json', '--recipe', {str(TINY)!r}, '--build', {str(built)!r}]; main()"
    )
    python, where = TUTOR.with_name("python"), environment(OLLAMA_HOST="127.0.0.1:1")
    done = subprocess.run([python, "-c", code], env=where, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["ran"] == [], done.stderr


def test_held_out_loss_falls_and_every_gguf_keeps_it(built: Path) -> None:
    summary = result("summary", build=built)["stages"]
    held = summary["train"]["held_out"]
    assert held["loss_after"] < held["loss_before"] - 0.02
    scored = {name: entry["loss"] for name, entry in summary["ladder"]["perplexity"].items()}
    assert set(scored) == {"base-Q8_0", "tutor-F16", "tutor-Q8_0", "tutor-Q4_K_M"}
    assert all(math.isclose(scored[name], scored["tutor-F16"], rel_tol=0.03) for name in scored if "tutor" in name)
    assert scored["tutor-F16"] < scored["base-Q8_0"] - 0.02


def test_two_runs_from_scratch_are_byte_identical(built: Path, tmp_path: Path) -> None:
    """The second one is started by the console script, as a user does, and the first was forked: the same bytes."""
    command = [TUTOR, "run", "--until", "convert", "--recipe", TINY, "--build", tmp_path]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = [*MADE, *(f"gguf/{path.name}" for path in (built / "tiny" / "gguf").glob("*.gguf"))]
    assert len(files) == len(MADE) + 4
    for name in files:
        assert (tmp_path / "tiny" / name).read_bytes() == (built / "tiny" / name).read_bytes(), name


@pytest.mark.parametrize(("stage", "share"), [("data", 0.0), *((stage, 0.5) for stage in registry.BY_NAME)])
def test_killed_run_leaves_whole_folders_and_can_be_repeated(
    built: Path, tmp_path: Path, stage: str, share: float
) -> None:
    """Killed after a share of the stage's file-system events; kills at each event: artifacts/test_stage_folder.py."""
    build = linked(built, tmp_path / "build")
    remove(build / "tiny" / registry.BY_NAME[stage].folder)
    folder = build / "tiny" / registry.BY_NAME[stage].folder
    events = json.loads((built / "events.json").read_text("utf-8"))[folder.name]
    at = 1 + round((events - 1) * share)
    where = ("--until", stage, "--recipe", TINY, "--build", build)
    killed = forked("run", *where, scratch=tmp_path / "killed", kill=(folder.name, at)).finish()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert read_manifest(folder) is None
    assert not folder.exists()
    again = result("run", "--until", stage, build=build)
    assert again["ran"] == [stage]
    assert find_damage(folder, content=True) == []
    assert not folder.with_name(folder.name + PARTIAL).exists()


def test_sigterm_during_training_exits_143_with_whole_folders(built: Path, tmp_path: Path) -> None:
    build = linked(built, tmp_path / "build")
    assert result("clean", "train", build=build)["removed"]
    process = forked("train", "--recipe", TINY, "--build", build, scratch=tmp_path / "ended")
    process.wait_until((build / "tiny" / "adapter.log" / "metrics.jsonl").exists)
    process.send_signal(signal.SIGTERM)
    assert process.finish().returncode == 143
    assert not (build / "tiny" / "adapter.partial").exists()
    assert not (build / "tiny" / "adapter").exists()


def test_ask_prints_the_answer_alone_on_stdout(built: Path) -> None:
    done = tutor("ask", "¿Qué es una interfaz?", build=built)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stdout == done.stdout.lstrip()
    as_json = result("ask", "¿Qué es una interfaz?", "--model", "base", build=built)
    assert as_json["finish"] in ("eos", "stop", "length")
    assert as_json["tokens"] <= 1024  # the base asked as a person would, in a context of 1024


def test_adapter_answers_in_transformers(built: Path) -> None:
    answer = result("ask", "¿Qué es una interfaz?", "--model", "adapter", build=built)
    assert answer["text"]


def test_unknown_quantization_error_lists_those_that_exist(built: Path) -> None:
    done = tutor("ask", "hola", "--quantization", "Q5_K_M", build=built)
    assert done.returncode == 2
    assert "Q4_K_M" in done.stderr
    assert "Q8_0" in done.stderr


def test_chat_keeps_history_and_exits_on_command(built: Path) -> None:
    done = tutor("chat", build=built, stdin="hola\n¿y después?\n/salir\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") >= 2


def test_base_with_more_examples_reads_longer_prompts(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real servers, with the base's own template and tokenizer; answers are short, so that it takes seconds."""
    monkeypatch.setattr(own_generation, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(own_generation, "THOUGHT_TOKENS", 0)
    found = run_baselines(read_recipe(TINY), linked(built, tmp_path / "build"))
    ways = {name: (way["prompt_tokens"], way["tokens"]) for name, way in found["ways"].items()}
    assert [name for name in ways if "example" in name] == [
        "base + 1 example",
        "base + 3 examples",
        "base + 5 examples",
    ]
    read = [ways[name][0] for name in ("base", "base + 1 example", "base + 3 examples", "base + 5 examples")]
    assert read == sorted(set(read))
    assert all(0 < tokens <= 24 for _, tokens in ways.values())
    assert found["decision"]["outcome"] == "nothing shown"


def test_llama_server_ends_with_its_command(built: Path) -> None:
    assert tutor("ask", "¿Qué es una interfaz?", build=built).returncode == 0
    gguf = str(built / "tiny" / "gguf")
    running = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes() if entry.name.isdigit() and int(entry.name) != os.getpid() else b""
        except OSError:
            continue
        if b"llama-server" in words and gguf.encode() in words:
            running.append(words)
    assert running == []


def test_damaged_gguf_is_detected_and_made_again(built: Path, tmp_path: Path) -> None:
    build = copied(built, tmp_path / "build")
    gguf = build / "tiny" / "gguf" / "tutor-Q8_0.gguf"
    gguf.write_bytes(gguf.read_bytes()[:-16])
    done = tutor("status", build=build)
    assert done.returncode == 5
    assert str(gguf) in done.stderr
    # The new bytes are equal, so that later stages stay up to date; the report has the time of the conversion.
    assert result("run", build=build)["ran"] == ["convert", "report"]
    assert find_damage(gguf.parent, content=True) == []
