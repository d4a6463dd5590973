"""Requirements of the Compose stack; `docker` and `nvidia-smi` are small programs on PATH (docs/facts.md, 12)."""

import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.fakes.docker import INFO
from support.models.workloads import LARGE
from support.processes.command import ROOT

from tutor.errors import HostError, RecipeError
from tutor.machine import container_host, preflight
from tutor.machine.host import Memory
from tutor.machine.memory.shapes import SHAPES
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe


def test_memory_fault_is_found_until_training_is_done(machine, roomy, based_on, tmp_path):
    machine.gpu(4)
    recipe = based_on()
    assert preflight.memory_faults(recipe, tmp_path, LARGE, gpu=True)[0].what.endswith("; a card has 4.0 GB")
    (tmp_path / "small" / "adapter").mkdir(parents=True)
    (tmp_path / "small" / "adapter" / "manifest.json").touch()
    assert preflight.memory_faults(recipe, tmp_path, LARGE, gpu=True) == []


def test_gpu_without_values_has_no_memory_fault(machine, roomy, based_on, tmp_path):
    assert preflight.memory_faults(based_on(), tmp_path, LARGE, gpu=True) == []


def test_memory_fault_concerns_the_gpu_of_the_stack(machine, roomy, based_on, tmp_path, monkeypatch):
    machine.gpu(24)
    machine.gpu(4)
    assert preflight.memory_faults(based_on(), tmp_path, LARGE, gpu=True) == []
    monkeypatch.setenv("TUTOR_GPU", "1")
    assert preflight.memory_faults(based_on(), tmp_path, LARGE, gpu=True)


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    """The small recipe."""
    return read_recipe(recipe_file)


@pytest.fixture
def large(recipe_file: Path) -> Recipe:
    """A recipe of a hub model, which requires a GPU."""
    source = "hub:owner/name@" + "0" * 40
    recipe_file.write_text(recipe_file.read_text().replace('source = "tiny"', f'source = "{source}"'))
    return read_recipe(recipe_file)


def problems(recipe: Recipe, build: Path, **options: Any) -> tuple[str, ...]:
    """The faults of the host for a recipe; empty when there are none."""
    try:
        preflight.check_host(recipe, build, container_host.daemon(), container_host.project(), **options)
    except preflight.UnfitError as error:
        return error.problems
    return ()


def test_unfit_host_exits_4_and_names_the_demo(host, large, tmp_path):
    with pytest.raises(HostError, match="make demo") as caught:
        preflight.check_host(large, tmp_path, container_host.daemon(), container_host.project())
    assert caught.value.code == 4


def test_small_recipe_needs_no_gpu(host, recipe, tmp_path):
    assert preflight.check_host(recipe, tmp_path, container_host.daemon(), container_host.project()) is False


def test_all_faults_are_reported_together(host, large, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    found = problems(large, tmp_path)
    assert [line.split(" (")[0].split(";")[0] for line in found[:3]] == [
        "Docker is not installed",
        "no NVIDIA GPU answers",
        "Docker has no NVIDIA Container Toolkit",
    ]
    assert all("; " in line and "\n" not in line for line in found)


def test_large_recipe_without_gpu_is_refused(host, large, tmp_path):
    found = problems(large, tmp_path)
    assert any("no NVIDIA GPU" in line and "data/demo.toml" in line for line in found)


def test_driver_without_toolkit_is_refused(host, large, tmp_path):
    host.add("nvidia-smi")
    host.answer("nvidia-smi", stdout="GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    found = [line for line in problems(large, tmp_path) if "disk" not in line]
    assert [line.partition(";")[0] for line in found] == ["Docker has no NVIDIA Container Toolkit"]
    assert "no-cgroups" not in found[0]
    rootless = container_host.Daemon({**INFO, "SecurityOptions": ["name=rootless"]})
    assert "no-cgroups" in str(preflight.gpu_faults(rootless)[-1])


@pytest.mark.parametrize(("name", "there"), [("7", False), ("x", False), ("", True), ("0", True), ("GPU-1", True)])
def test_gpu_of_the_stack_must_be_a_visible_one(host, recipe, tmp_path, monkeypatch, name, there):
    host.add("nvidia-smi")
    host.answer("nvidia-smi --query-gpu", stdout="0, GPU-1, a card, 580.1, 8.9, 80000, 79000\n")
    monkeypatch.setenv("TUTOR_GPU", name)
    found = [str(fault) for fault in preflight.memory_faults(recipe, tmp_path, SHAPES["tiny"], gpu=True)]
    refused = f"TUTOR_GPU is {name!r}, and the visible GPUs are 0; set TUTOR_GPU to one of them"
    assert found == ([] if there else [refused])


def test_driver_older_than_the_image_is_refused(host, large, tmp_path):
    host.add("nvidia-smi")
    host.answer("nvidia-smi", stdout="| NVIDIA-SMI 550.1  Driver Version: 550.1  CUDA Version: 12.4 |\n")
    host.answer("nvidia-smi --list-gpus", stdout="GPU 0: a card (UUID: GPU-1)\n")
    host.answer("nvidia-smi --query-gpu", stdout="0, GPU-1, a card, 550.1, 8.9, 24000, 23000\n")
    host.answer("docker info", stdout=json.dumps({**INFO, "Runtimes": {"nvidia": {}}}))
    (found,) = [line for line in problems(large, tmp_path) if "disk" not in line]
    assert "driver 550.1 of a card runs CUDA up to 12.4, and PyTorch needs 13.2; update the driver" in found


@pytest.mark.parametrize(
    "info", [{"Runtimes": {"nvidia": {}}}, {"DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]}]
)
def test_available_gpu_is_used_unless_disabled(host, recipe, tmp_path, info):
    host.add("nvidia-smi")
    host.answer("nvidia-smi", stdout="GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    host.answer("docker info", stdout=json.dumps({**INFO, **info}))
    assert preflight.check_host(recipe, tmp_path, container_host.daemon(), container_host.project()) is True
    assert preflight.check_host(recipe, tmp_path, container_host.daemon(), container_host.project(), gpu=False) is False


def test_failing_driver_counts_as_no_gpu(host, recipe, tmp_path):
    host.add("nvidia-smi")
    host.answer("docker info", stdout=json.dumps({**INFO, "Runtimes": {"nvidia": {}}}))
    host.answer("nvidia-smi", code=9, stderr="NVIDIA-SMI has failed because it couldn't communicate with the driver")
    assert preflight.check_host(recipe, tmp_path, container_host.daemon(), container_host.project()) is False
    assert any("no NVIDIA GPU" in line for line in problems(recipe, tmp_path, gpu=True))


def test_toolkit_with_known_escapes_is_refused(host, recipe, tmp_path):
    host.add("nvidia-smi", "nvidia-ctk")
    host.answer("nvidia-smi", stdout="GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    host.answer("docker info", stdout=json.dumps({**INFO, "Runtimes": {"nvidia": {}}}))
    host.answer("nvidia-ctk", stdout="NVIDIA Container Toolkit CLI version 1.17.7\n")
    assert any("1.17.8" in line for line in problems(recipe, tmp_path, gpu=True))
    host.answer("nvidia-ctk", stdout="NVIDIA Container Toolkit CLI version 1.18.0\n")
    assert problems(recipe, tmp_path, gpu=True) == ()


def test_training_beyond_dockers_machine_is_a_fault(host, recipe, tmp_path, monkeypatch):
    """The virtual machine of Docker Desktop has less memory than this one; its disk cannot be seen from here."""
    monkeypatch.setattr("tutor.machine.host.memory", lambda: Memory(32 << 30, 30 << 30, None))
    monkeypatch.setattr(preflight.capacity, "find_shape", lambda recipe, build: LARGE)
    desktop = {**INFO, "OperatingSystem": "Docker Desktop", "DockerRootDir": "/var/lib/docker", "MemTotal": 4 << 30}
    host.answer("docker info", stdout=json.dumps(desktop))
    (found,) = problems(recipe, tmp_path, gpu=False)
    assert "Docker's machine has 4.3 GB; raise its memory" in found
    host.answer("docker info", stdout=json.dumps({**desktop, "MemTotal": 31 << 30}))
    assert problems(recipe, tmp_path, gpu=False) == ()


def test_disk_of_dockers_machine_is_not_taken_for_this_one(host, recipe, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    host.answer("docker image inspect", code=1)
    host.answer("docker info", stdout=json.dumps({**INFO, "OperatingSystem": "Docker Desktop"}))
    assert not any("disk" in line for line in problems(recipe, tmp_path))
    assert "Docker Desktop's machine needs 14" in caplog.text


@pytest.fixture
def vast(recipe_file: Path) -> Recipe:
    """A recipe whose base is larger than the disk, and whose training fits the memory."""
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 1}
    (recipe_file.parent / "vast").mkdir()
    config = {**shape, "vocab_size": 1 << 30, "tie_word_embeddings": True, "head_dim": 1}
    (recipe_file.parent / "vast" / "config.json").write_text(json.dumps(config))
    recipe_file.write_text(recipe_file.read_text().replace('"tiny"', '"path:vast"'))
    return read_recipe(recipe_file)


def test_full_disk_names_free_and_needed_space(host, vast, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=300 * 10**9))
    found = [line for line in problems(vast, tmp_path / "not" / "made", gpu=False) if "disk" in line]
    # The build folder and Docker's folder are on one disk: 579 GB and 475 GB are added.
    assert found == [f"the disk of {tmp_path} has 300 GB free of 1054 GB; free disk space"]


def test_finished_stages_need_no_disk(host, vast, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=300 * 10**9))
    for name in ("base/manifest.json", "adapter/manifest.json", "merged/manifest.json", "gguf/manifest.json"):
        (tmp_path / "small" / name).parent.mkdir(parents=True)
        (tmp_path / "small" / name).touch()
    assert "has 300 GB free of 475 GB" in problems(vast, tmp_path, gpu=False)[0]  # in Ollama it is not
    (tmp_path / "small" / "model").mkdir()
    (tmp_path / "small" / "model" / "published.json").touch()
    assert problems(vast, tmp_path, gpu=False) == ()


def test_images_still_to_build_need_disk(host, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert not any("disk" in line for line in problems(recipe, tmp_path))
    host.answer("docker image inspect", code=1)
    assert any("1 GB free of 14 GB" in line for line in problems(recipe, tmp_path))


def test_training_beyond_the_gpu_is_a_fault(host, large, tmp_path, monkeypatch):
    """The fault names a setting that fits, and stands beside all other faults."""
    monkeypatch.setattr("tutor.machine.host.memory", lambda: Memory(32 << 30, 30 << 30, None))  # layers may wait in it
    large = large.model_copy(update={"base": type(large.base)()})
    host.add("nvidia-smi")
    host.answer("nvidia-smi --query-gpu", stdout="0, GPU-1, NVIDIA T1000, 580.95.05, 7.5, 4096, 4000\n")
    host.answer("nvidia-smi --list-gpus", stdout="GPU 0: NVIDIA T1000 (UUID: GPU-1)\n")
    host.answer("docker info", stdout=json.dumps({**INFO, "Runtimes": {"nvidia": {}}}))
    (found,) = [line for line in problems(large, tmp_path) if "disk" not in line]
    assert 'NVIDIA T1000 has 4.3 GB; set train.max_memory.gpu = "4096MiB"' in found


def test_port_in_use_is_a_fault_that_names_its_holder(host, recipe, tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("TUTOR_OLLAMA_PORT", str(port))
        found = problems(recipe, tmp_path)
        assert len(found) == 1
        assert str(port) in found[0]
        assert "TUTOR_OLLAMA_PORT" in found[0]
        assert f" ({os.getpid()})" in found[0]
        host.answer("docker ps --filter publish", stdout="other-web-1\tother\n")
        assert "held by container other-web-1; docker stop other-web-1, or set" in problems(recipe, tmp_path)[0]
        host.answer("docker ps --filter publish", stdout="tutor-ollama-1\ttutor\n")  # the project's own Ollama
        assert problems(recipe, tmp_path) == ()


@pytest.mark.parametrize("given", ["a", "70000", "-1"])
def test_invalid_port_is_a_fault(host, recipe, tmp_path, monkeypatch, given):
    monkeypatch.setenv("TUTOR_OLLAMA_PORT", given)
    assert any(repr(given) in line for line in problems(recipe, tmp_path))


def test_rows_outside_the_recipe_folder_are_refused(host, recipe_file, tmp_path):
    recipe_file.write_text('[data]\ntrain = "../elsewhere/tutor.jsonl"\n[base]\nsource = "path:../model"\n')
    with pytest.raises(RecipeError, match=r"data.train is \.\./elsewhere/tutor.jsonl, base.source is \.\./model, and"):
        preflight.check_host(
            read_recipe(recipe_file), tmp_path, container_host.Daemon(), container_host.Project(), gpu=False
        )


def test_shipped_recipes_are_beside_their_rows():
    for path in sorted((ROOT / "data").glob("*.toml")):
        preflight.refuse_files_outside(read_recipe(path))
