"""The services of the stack: their order, exit codes, logs and interrupts. Covers pipeline/logged_command.py too.

`docker` and `nvidia-smi` are small programs on PATH that answer as they are told (docs/facts.md, 12).
"""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.command import ROOT
from support.fake_docker import INFO, Host

from tutor.errors import HostError, RecipeError, ServiceError
from tutor.machine import preflight
from tutor.machine.host import Memory
from tutor.pipeline import compose as stack
from tutor.pipeline.compose import Stack
from tutor.pipeline.logged_command import StackError
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return read_recipe(recipe_file)


@pytest.fixture
def large(recipe_file: Path) -> Recipe:
    """A recipe of a hub model, which wants a GPU."""
    source = "hub:owner/name@" + "0" * 40
    recipe_file.write_text(recipe_file.read_text().replace('source = "tiny"', f'source = "{source}"'))
    return read_recipe(recipe_file)


def problems(recipe: Recipe, build: Path, **options: Any) -> tuple[str, ...]:
    """What the host lacks for a recipe; nothing when it is fit."""
    try:
        preflight.check_host(recipe, build, **options)
    except preflight.UnfitError as error:
        return error.problems
    return ()


def test_an_unfit_host_has_exit_code_4_and_is_told_the_way_without(host, large, tmp_path):
    with pytest.raises(HostError, match="make demo") as caught:
        preflight.check_host(large, tmp_path)
    assert caught.value.code == 4


# The host


def test_a_host_with_docker_runs_a_small_recipe_without_a_gpu(host, recipe, tmp_path):
    assert preflight.check_host(recipe, tmp_path) is False


def test_everything_that_is_missing_is_said_at_once(host, large, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    found = problems(large, tmp_path)
    assert [line.split(" (")[0].split(";")[0] for line in found[:3]] == [
        "Docker is not installed",
        "no NVIDIA GPU answers",
        "Docker has no NVIDIA Container Toolkit",
    ]
    assert all("; " in line and "\n" not in line for line in found)


@pytest.mark.parametrize(
    ("part", "answer", "said"),
    [
        ("docker info", {"code": 1, "stderr": "Cannot connect to the Docker daemon"}, "daemon does not answer"),
        ("docker info", {"code": 1, "stderr": "permission denied while trying to connect"}, "may not use Docker"),
        ("docker info", {"stdout": '{"ServerErrors": ["no daemon"]}'}, "daemon does not answer"),
        ("docker info", {"stdout": "not JSON"}, "daemon does not answer"),
        ("compose version", {"code": 1, "stderr": "docker: 'compose' is not a docker command."}, "no Compose plugin"),
        ("compose version", {"stdout": "v2.23.3\n"}, "Docker Compose is v2.23.3"),
        ("compose version", {"stdout": "1.29.2\n"}, "Docker Compose is 1.29.2"),
    ],
)
def test_docker_that_cannot_run_the_stack_is_one_line(host, recipe, tmp_path, part, answer, said):
    host.says(part, **answer)
    found = problems(recipe, tmp_path)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize("shown", ["2.24.0", "v2.40.3", "5.0.1", "2.26.1-4"])
def test_newer_versions_of_compose_are_taken(host, recipe, tmp_path, shown):
    host.says("compose version", stdout=shown)
    assert problems(recipe, tmp_path) == ()


def test_a_large_recipe_without_a_gpu_is_refused(host, large, tmp_path):
    found = problems(large, tmp_path)
    assert any("no NVIDIA GPU" in line and "data/demo.toml" in line for line in found)


def test_a_driver_without_the_toolkit_is_refused(host, large, tmp_path):
    host.add("nvidia-smi")
    host.says("nvidia-smi", stdout="GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    found = [line for line in problems(large, tmp_path) if "disk" not in line]
    assert [line.partition(";")[0] for line in found] == ["Docker has no NVIDIA Container Toolkit"]


@pytest.mark.parametrize(
    "info", [{"Runtimes": {"nvidia": {}}}, {"DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]}]
)
def test_a_gpu_with_its_toolkit_is_used_by_small_recipes_too_unless_told_otherwise(host, recipe, tmp_path, info):
    host.add("nvidia-smi")
    host.says("nvidia-smi", stdout="GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    host.says("docker info", stdout=json.dumps({**INFO, **info}))
    assert preflight.check_host(recipe, tmp_path) is True
    assert preflight.check_host(recipe, tmp_path, gpu=False) is False


def test_a_driver_that_fails_is_no_gpu(host, recipe, tmp_path):
    host.add("nvidia-smi")
    host.says("docker info", stdout=json.dumps({**INFO, "Runtimes": {"nvidia": {}}}))
    host.says("nvidia-smi", code=9, stderr="NVIDIA-SMI has failed because it couldn't communicate with the driver")
    assert preflight.check_host(recipe, tmp_path) is False
    assert any("no NVIDIA GPU" in line for line in problems(recipe, tmp_path, gpu=True))


def test_a_toolkit_with_known_escapes_is_refused(host, recipe, tmp_path):
    host.add("nvidia-smi", "nvidia-ctk")
    host.says("nvidia-smi", stdout="GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    host.says("docker info", stdout=json.dumps({**INFO, "Runtimes": {"nvidia": {}}}))
    host.says("nvidia-ctk", stdout="NVIDIA Container Toolkit CLI version 1.17.7\n")
    assert any("1.17.8" in line for line in problems(recipe, tmp_path, gpu=True))
    host.says("nvidia-ctk", stdout="NVIDIA Container Toolkit CLI version 1.18.0\n")
    assert problems(recipe, tmp_path, gpu=True) == ()


@pytest.fixture
def vast(recipe_file: Path) -> Recipe:
    """A recipe whose base would fill any disk, though not the memory that training takes."""
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 1}
    (recipe_file.parent / "vast").mkdir()
    config = {**shape, "vocab_size": 1 << 30, "tie_word_embeddings": True, "head_dim": 1}
    (recipe_file.parent / "vast" / "config.json").write_text(json.dumps(config))
    recipe_file.write_text(recipe_file.read_text().replace('"tiny"', '"path:vast"'))
    return read_recipe(recipe_file)


def test_a_disk_without_room_is_named_with_both_numbers(host, vast, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=300 * 10**9))
    found = [line for line in problems(vast, tmp_path / "not" / "made", gpu=False) if "disk" in line]
    # The build folder and Docker's lie on one disk: their needs add up, 782 and 357 GB.
    assert found == [f"the disk of {tmp_path} has 300 GB free of 1139 GB; make room"]


def test_what_is_made_already_needs_no_room(host, vast, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=300 * 10**9))
    for name in ("base/manifest.json", "adapter/manifest.json", "merged/manifest.json", "gguf/manifest.json"):
        (tmp_path / "small" / name).parent.mkdir(parents=True)
        (tmp_path / "small" / name).touch()
    assert "has 300 GB free of 357 GB" in problems(vast, tmp_path, gpu=False)[0]  # in Ollama it is not
    (tmp_path / "small" / "model").mkdir()
    (tmp_path / "small" / "model" / "published.json").touch()
    assert problems(vast, tmp_path, gpu=False) == ()


def test_images_that_are_not_built_need_room_too(host, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert not any("disk" in line for line in problems(recipe, tmp_path))
    host.says("docker image inspect", code=1)
    assert any("1 GB free of 14 GB" in line for line in problems(recipe, tmp_path))


def test_a_training_beyond_the_gpu_is_said_before_anything_is_built(host, large, tmp_path, monkeypatch):
    """With the setting that fits, and among all else that is missing."""
    monkeypatch.setattr("tutor.machine.host.memory", lambda: Memory(32 << 30, 30 << 30, None))  # layers may wait in it
    large = large.model_copy(update={"base": type(large.base)()})
    host.add("nvidia-smi")
    host.says("nvidia-smi --query-gpu", stdout="0, GPU-1, NVIDIA T1000, 580.95.05, 7.5, 4096, 4000\n")
    host.says("nvidia-smi --list-gpus", stdout="GPU 0: NVIDIA T1000 (UUID: GPU-1)\n")
    host.says("docker info", stdout=json.dumps({**INFO, "Runtimes": {"nvidia": {}}}))
    (found,) = [line for line in problems(large, tmp_path) if "disk" not in line]
    assert 'NVIDIA T1000 has 4.3 GB; set train.max_memory.gpu = "4096MiB"' in found


def test_a_port_that_another_program_has_is_said_before_anything_runs(host, recipe, tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("TUTOR_OLLAMA_PORT", str(port))
        found = problems(recipe, tmp_path)
        assert len(found) == 1
        assert str(port) in found[0]
        assert "TUTOR_OLLAMA_PORT" in found[0]
        host.says("docker ps", stdout="0123456789ab\n")  # our own Ollama has it
        assert problems(recipe, tmp_path) == ()


@pytest.mark.parametrize("given", ["a", "70000", "-1"])
def test_a_port_that_is_none_is_refused(host, recipe, tmp_path, monkeypatch, given):
    monkeypatch.setenv("TUTOR_OLLAMA_PORT", given)
    assert any(repr(given) in line for line in problems(recipe, tmp_path))


def test_rows_outside_the_recipes_folder_are_refused_because_no_container_sees_them(host, recipe_file, tmp_path):
    recipe_file.write_text('[data]\ntrain = "../elsewhere/tutor.jsonl"\n[base]\nsource = "path:../model"\n')
    with pytest.raises(RecipeError, match=r"data.train is \.\./elsewhere/tutor.jsonl, base.source is \.\./model, and"):
        preflight.check_host(read_recipe(recipe_file), tmp_path, gpu=False)


def test_the_recipes_that_are_shipped_lie_with_their_rows():
    for path in sorted((ROOT / "data").glob("*.toml")):
        preflight.refuse_outside(read_recipe(path))


# The services


def services_run(host: Host) -> list[str]:
    return [line.split()[-1] for line in host.calls if " run --rm " in line or " up " in line]


def test_run_all_runs_services_in_order_with_log_and_result(host, recipe, tmp_path):
    host.says("run --rm", stdout='{"ran": true}', stderr="working on it\n")
    result = stack.run_all(recipe, tmp_path / "build")
    assert services_run(host) == ["trainer", "merger", "converter", "ollama", "publisher", "evaluator", "reporter"]
    assert result["ran"] == ["trainer", "merger", "converter", "publisher", "evaluator", "reporter"]
    assert result["host"] == "127.0.0.1:11434"
    build = next(index for index, line in enumerate(host.calls) if " build " in line)
    assert build < next(index for index, line in enumerate(host.calls) if " run " in line)
    logs = tmp_path / "build" / "small" / "logs"
    assert {path.name for path in logs.iterdir()} == {f"{name}.log" for name in ("build", *services_run(host))}
    assert "working on it" in (logs / "merger.log").read_text()


def test_result_lines_name_the_report_by_its_path_on_this_host(host, recipe, tmp_path):
    page = '{"ran": true, "page": "build/small/report/report.html"}'
    host.says("--name tutor-reporter", stdout=page)
    host.says("--name tutor-publisher", stdout='{"model": "tutor", "build": "0123456789ab", "version": "0.33.3"}')
    result = stack.run_all(recipe, tmp_path / "elsewhere")
    seen = tmp_path / "elsewhere" / "small" / "report" / "report.html"
    assert f"All that was found out: {seen}" in stack.result_lines(result)


@pytest.mark.parametrize("name", ["converter", "publisher"])
def test_run_all_stops_at_a_service_whose_gate_refuses(host, recipe, tmp_path, name):
    host.says(f"--name tutor-{name}", code=8, stderr="Error: F16 -> Q8_0 (quantize) diverges in its prompt: x\n")
    with pytest.raises(StackError, match="diverges in its prompt") as caught:
        stack.run_all(recipe, tmp_path / "build")
    assert caught.value.code == 8
    assert services_run(host)[-1] == name


def test_run_all_again_reports_that_nothing_ran(host, recipe, tmp_path):
    host.says("run --rm", stdout='{"ran": false}')
    host.says("run --rm --no-deps -T --name tutor-trainer", stdout='{"ran": []}')
    host.says("run --rm --no-deps -T --name tutor-publisher", stdout='{"published": false}')
    assert stack.run_all(recipe, tmp_path / "build")["ran"] == []


def test_run_all_uses_up_for_the_ollama_server_alone(host, recipe, tmp_path):
    stack.run_all(recipe, tmp_path / "build")
    up = [line for line in host.calls if " up " in line]
    assert len(up) == 1
    assert up[0].endswith("--no-deps ollama")
    assert all("--no-deps" in line for line in host.calls if " run --rm " in line)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*stack.BEFORE, *stack.AFTER])
@pytest.mark.parametrize("code", [1, 3, 8, 137, 143])
def test_run_all_ends_with_the_exit_code_of_a_failed_service(host, recipe, tmp_path, name, code):
    host.says(f"--name tutor-{name}", code=code, stderr="train: step 1\nError: tutor.jsonl:3: what is wrong; do this\n")
    with pytest.raises(StackError) as caught:
        stack.run_all(recipe, tmp_path / "build")
    assert caught.value.code == code
    assert f"{name} ended with exit code {code}: tutor.jsonl:3: what is wrong; do this" in str(caught.value)
    assert str(tmp_path / "build" / "small" / "logs" / f"{name}.log") in str(caught.value)
    assert services_run(host)[-1] == name


def test_run_all_of_a_killed_silent_service_suggests_memory(host, recipe, tmp_path):
    host.says("--name tutor-trainer", code=137)
    with pytest.raises(StackError, match="memory"):
        stack.run_all(recipe, tmp_path / "build")


@pytest.mark.parametrize(
    ("part", "answer", "said"),
    [
        (
            "--name tutor-trainer",
            {
                "code": 1,
                "stderr": 'Error response from daemon: could not select device driver "nvidia" with capabilities',
            },
            "Container Toolkit",
        ),
        (
            "--name tutor-trainer",
            {"code": 125, "stderr": "Error response from daemon: no space left on device"},
            "no space",
        ),
        ("build trainer", {"code": 17, "stderr": "failed to solve: pull access denied\n"}, "pull access denied"),
        (
            "up --detach",
            {"code": 1, "stderr": "Bind for 127.0.0.1:11434 failed: port is already allocated"},
            "TUTOR_OLLAMA_PORT",
        ),
    ],
)
def test_run_all_with_a_docker_fault_raises_host_error(host, recipe, tmp_path, part, answer, said):
    host.says(part, **answer)
    with pytest.raises(HostError, match=said):
        stack.run_all(recipe, tmp_path / "build")


def test_run_all_with_unhealthy_ollama_keeps_its_log(host, recipe, tmp_path):
    host.says("up --detach", code=1, stderr="container tutor-ollama-1 is unhealthy\n")
    host.says("logs --no-color", stdout="Error: could not create directory\n")
    with pytest.raises(ServiceError, match=r"ollama\.log"):
        stack.run_all(recipe, tmp_path / "build")
    assert "could not create directory" in (tmp_path / "build" / "small" / "logs" / "ollama.log").read_text()


def test_run_all_of_a_service_without_result_raises(host, recipe, tmp_path):
    host.says("--name tutor-merger", stdout="")
    with pytest.raises(StackError, match="no result"):
        stack.run_all(recipe, tmp_path / "build")


def test_run_all_uses_the_gpu_overlay_only_with_a_gpu(host, recipe, tmp_path):
    stack.run_all(recipe, tmp_path / "build")
    assert not any("compose.gpu.yaml" in line for line in host.calls)
    host.add("nvidia-smi")
    host.says("nvidia-smi", stdout="GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    host.says("docker info", stdout=json.dumps({**INFO, "Runtimes": {"nvidia": {}}}))
    before = len(host.calls)
    assert stack.run_all(recipe, tmp_path / "build")["gpu"] is True
    composed = [line for line in host.calls[before:] if " run --rm " in line]
    assert all("docker/compose.gpu.yaml" in line for line in composed)


def test_environment_has_recipe_folder_and_unprivileged_ids(host, recipe, tmp_path):
    stack.run_all(recipe, tmp_path / "build")
    seen = next(environment for line, environment in host.calls_with_environment if " run --rm " in line)
    assert seen["TUTOR_DATA"] == str(recipe.path.parent)
    assert seen["TUTOR_RECIPE"] == "data/small.toml"
    assert seen["TUTOR_BUILD"] == str((tmp_path / "build").resolve())
    uid = os.getuid() or 10001
    assert seen["TUTOR_UID"] == str(uid) != "0"
    assert (tmp_path / "build" / "small").stat().st_uid == uid


@pytest.mark.skipif(os.getuid() != 0, reason="only root can hand a folder over")
def test_prepare_as_root_changes_owners_and_follows_no_link(host, recipe, tmp_path):
    build = tmp_path / "build"
    (build / "small" / "data").mkdir(parents=True)
    (build / "small" / ".lock").touch()
    outside = tmp_path / "outside"
    outside.touch()
    (build / "small" / "link").symlink_to(outside)
    stack.prepare(Stack(recipe.path, build))
    assert (build / "small" / ".lock").stat().st_uid == 10001
    assert outside.stat().st_uid == 0


def test_hub_token_is_a_private_file_and_in_no_variable(host, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    stack.run_all(recipe, tmp_path / "build")
    for line, environment in host.calls_with_environment:
        if line.startswith("docker compose") and "version" not in line:
            assert "HF_TOKEN" not in environment
        if "--name tutor-trainer" in line:
            assert (environment["token"], environment["mode"]) == ("hf_canary", oct(stat.S_IFREG | 0o600))
            assert not Path(environment["HF_TOKEN_FILE"]).exists(), "it outlived the services that may need it"
        if "--name tutor-evaluator" in line:
            assert "HF_TOKEN_FILE" not in environment
    logs = "".join(path.read_text() for path in (tmp_path / "build" / "small" / "logs").iterdir())
    assert "hf_canary" not in logs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_all_interrupted_stops_and_removes_the_container(host, recipe, tmp_path, number):
    host.says("--name tutor-trainer", seconds=60, stderr="training\n")
    code = (
        "import pathlib, signal, sys\nfrom tutor.pipeline import compose as stack\n"
        "from tutor.recipe.reading import read_recipe\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))\n"
        "stack.run_all(read_recipe(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]))"
    )
    with subprocess.Popen([sys.executable, "-c", code, recipe.path, tmp_path / "build"], cwd=ROOT) as process:
        log = tmp_path / "build" / "small" / "logs" / "trainer.log"
        wait_until(lambda: log.exists() and "training" in log.read_text())
        process.send_signal(number)
        assert process.wait(20) in (143, -signal.SIGINT)
    wait_until(lambda: not running(host.folder / "docker"))
    container = f"tutor-trainer-{process.pid}"
    assert host.calls[-2:] == [f"docker stop --time 180 {container}", f"docker rm --force {container}"]


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def running(program: Path) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(program).encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False


@pytest.mark.parametrize(("ran", "opening"), [(["merger"], []), ([], ["Nothing to do: every service is up to date."])])
def test_result_lines_name_the_model_and_the_next_step(ran, opening):
    published = {"model": "tutor", "build": "0123456789ab", "version": "0.33.3"}
    evaluated = {
        "all": {"n": 15, "errors": 0, "spanish": {"n": 14, "share": 0.9333}, "stopped": {"n": 9, "share": 0.6}}
    }
    services = {"publisher": published, "evaluator": evaluated}
    result = {"ran": ran, "gpu": False, "host": "127.0.0.1:11434", "services": services}
    assert stack.result_lines(result) == [
        *opening,
        "tutor is build 0123456789ab, at http://127.0.0.1:11434 in Ollama 0.33.3, without a GPU.",
        "Of 15 held-out prompts: 93 % answered in Spanish, 60 % ended by themselves.",
        "Next: docker compose exec ollama ollama run tutor",
    ]


@pytest.mark.parametrize("name", list(stack.COMMANDS))
def test_run_command_uses_the_stacks_files_and_exit_code(host, recipe, tmp_path, name):
    host.says(stack.COMMANDS[name][-1], code=3)
    assert stack.run_command(recipe, tmp_path / "build", name) == 3
    line, seen = host.calls_with_environment[-1]
    assert line.endswith(" ".join(stack.COMMANDS[name]))
    assert "compose.yaml" in line
    assert seen["TUTOR_DATA"] == str(recipe.path.parent)
    assert seen["TUTOR_UID"] != "0"


def test_run_command_without_docker_raises_host_error(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="make demo"):
        stack.run_command(recipe, tmp_path / "build", "down")


def test_command_outside_a_checkout_raises_host_error(monkeypatch, tmp_path):
    monkeypatch.setattr(stack, "ROOT", tmp_path)
    with pytest.raises(HostError, match="checkout"):
        Stack(tmp_path / "a.toml", tmp_path).command("ps")
