"""What compose.yaml, docker/ and .dockerignore guarantee: order, rights, mounts, secrets, pinned images."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.processes.command import ROOT

from tutor.artifacts.provenance import SourceTree
from tutor.machine.host import version
from tutor.pipeline import compose
from tutor.pipeline.registry import BY_NAME

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
each_service = pytest.mark.parametrize("name", SERVICES)


def test_compose_file_has_the_services_in_pipeline_order():
    assert list(SERVICES) == [*compose.SERVICES_BEFORE, compose.SERVER, *compose.SERVICES_AFTER]
    assert [name for name, service in SERVICES.items() if "build" in service] == sorted(
        compose.BUILT_SERVICES, key=list(SERVICES).index
    )


@each_service
def test_service_runs_unprivileged_and_read_only(name):
    service = SERVICES[name]
    assert service["user"] in ("${TUTOR_UID:-10001}:${TUTOR_GID:-10001}", "10001:10001")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert 0 < service["pids_limit"] <= 4096
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "group_add"} & set(service)
    assert all(mount.startswith("/tmp:size=") for mount in service["tmpfs"])
    assert "docker.sock" not in json.dumps(service)


@each_service
def test_service_publishes_ports_on_this_host_alone(name):
    for port in SERVICES[name].get("ports", ()):
        assert str(port).startswith("127.0.0.1:")
    assert bool(SERVICES[name].get("ports")) == (name == "ollama")


@each_service
def test_service_has_no_network_that_it_does_not_need(name):
    """The fetcher needs the hub; publisher and evaluator need Ollama alone, which publishes a port on this host."""
    service = SERVICES[name]
    found = service.get("network_mode") or service.get("networks", ["default"])
    expected = {
        "fetcher": ["default"],
        "ollama": ["default", "server"],
        "publisher": ["server"],
        "evaluator": ["server"],
    }
    assert found == expected.get(name, "none")
    assert COMPOSE["networks"] == {"server": {"internal": True}}


@each_service
def test_service_runs_a_tutor_command_unless_ollama(name):
    command = SERVICES[name]["command"]
    assert command[0] == ("serve" if name == "ollama" else "tutor")
    assert ("--json" in command) == (name != "ollama")


@each_service
def test_service_writes_the_build_folder_and_reads_the_rest(name):
    for volume in SERVICES[name].get("volumes", ()):
        writable = {"/work/build"} | ({"/cache"} if name == "fetcher" else set()) | {"/models"}
        assert volume.get("read_only", False) == (volume["target"] not in writable)
        if volume["type"] == "bind":
            assert volume["bind"] == {"create_host_path": False}


@each_service
def test_service_has_no_secret_in_a_variable(name):
    service = SERVICES[name]
    text = json.dumps({key: service.get(key) for key in ("environment", "command", "build", "labels")})
    assert not re.search(r"\$\{?\w*(TOKEN|SECRET|PASSWORD|KEY)", text)
    assert service.get("secrets", []) == (["hf_token"] if name == "fetcher" else [])


def test_compose_file_takes_an_empty_hub_token():
    assert COMPOSE["secrets"] == {"hf_token": {"file": "${HF_TOKEN_FILE:-/dev/null}"}}


@each_service
def test_service_image_is_pinned_or_built_here(name):
    service = SERVICES[name]
    assert re.fullmatch(r"\$\{COMPOSE_PROJECT_NAME\}-\w+", service["image"])  # of this checkout alone
    assert service["pull_policy"] == "never"
    for value in service.get("build", {}).get("args", {}).values():
        tag = re.fullmatch(r"\$\{\w+:-[\w./-]+:([\w.-]+)(@sha256:[0-9a-f]{64})?\}", value)
        assert tag, value
        assert tag[1] != "latest"


def test_ollama_image_has_a_version_that_publishing_takes():
    """0.30 is the oldest that publishing takes."""
    pinned = SERVICES["ollama"]["build"]["args"]["OLLAMA_IMAGE"]
    assert version(pinned.partition("@")[0].rpartition(":")[2]) >= (0, 30)


def test_selinux_overlay_changes_the_label_of_each_stage_alone():
    overlay = yaml.safe_load((ROOT / "docker" / "compose.selinux.yaml").read_text())
    assert set(overlay["services"]) == {*SERVICES} - {"ollama"}
    assert all(service == {"security_opt": ["label=disable"]} for service in overlay["services"].values())


def test_trainer_has_shared_memory_and_can_run_compiled_code():
    """PyTorch's workers end with a bus error in Docker's 64 MB; Triton loads what it compiles from /tmp."""
    assert SERVICES["trainer"]["shm_size"] == "2g"
    assert any(mount.endswith(",exec") for mount in SERVICES["trainer"]["tmpfs"])


def test_gpu_overlay_adds_gpus_alone():
    overlay = yaml.safe_load((ROOT / "docker" / "compose.gpu.yaml").read_text())
    assert set(overlay) == {"services"}
    assert set(overlay["services"]) == {"trainer", "ollama"}
    for service in overlay["services"].values():
        assert set(service) == {"deploy"}
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert "gpu" in device["capabilities"]


DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile*"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_needs_no_frontend_and_ends_unprivileged(path):
    text = path.read_text()
    assert not re.search(r"^#\s*(syntax|escape|check)\s*=", text, re.MULTILINE | re.IGNORECASE)
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    named = {stage.split()[2] for stage in stages if " AS " in stage.splitlines()[0]}
    for stage in stages:
        # From an argument or another stage, never from an image that nobody pinned.
        source = stage.split()[0]
        assert source in named or re.fullmatch(r"\$\{\w+\}", source)
    targets = [stage for stage in stages if re.search(r"\bAS (trainer|converter|client)\b", stage)] or stages
    assert all(re.search(r"^USER 10001:10001$", stage, re.MULTILINE) for stage in targets)


def test_dockerfile_has_every_target_of_the_compose_file():
    text = (ROOT / "docker" / "Dockerfile").read_text()
    for service in SERVICES.values():
        if target := service.get("build", {}).get("target"):
            assert re.search(rf"^FROM \S+ AS {target}$", text, re.MULTILINE)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_holds_no_secret(path):
    for line in re.sub(r"\\\n", " ", path.read_text()).splitlines():
        assert not re.match(r"(ARG|ENV) .*(TOKEN|SECRET|PASSWORD)", line)
        assert not re.match(r"ADD ", line)


def test_build_backend_pins_equal_the_development_pins():
    pins = [re.findall(r"^\S+==\S+", (ROOT / "requirements" / name).read_text(), re.MULTILINE) for name in
            ("wheel.txt", "dev.txt")]  # fmt: skip
    assert set(pins[0]) <= set(pins[1])
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert all(any(pin.startswith(f"{name}==") for pin in pins[0]) for name in backend)


def test_dockerignore_allows_exactly_what_images_are_made_of():
    """Everything is ignored but a list of what an image is made of."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert allowed == {
        "LICENSE",
        "Modelfile.j2",
        "README.md",
        "pyproject.toml",
        "requirements/*.txt",
        "scripts/build_llamacpp.py",
        "scripts/install_typescript.py",
        "tutor",
    }


@pytest.mark.parametrize(
    ("image", "script"), [("llamacpp", "build_llamacpp.py"), ("typescript", "install_typescript.py")]
)
def test_image_copies_exactly_what_its_script_imports(image: str, script: str) -> None:
    """One file less and the image does not build; one more and it is built again for nothing."""
    text = (ROOT / "docker" / "Dockerfile").read_text("utf-8")
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM |\Z)", text, re.M | re.S))
    lines = re.findall(r"^COPY ((?:tutor|scripts)/.*) \S+$", stages["tools"] + stages[image], re.M)
    copied = {path for line in lines for name in line.split() for path in files_below(ROOT / name)}
    needed, _ = SourceTree().reach(ROOT / "scripts" / script, left_out=())
    assert copied == needed


def files_below(path: Path) -> set[Path]:
    return {file for file in path.rglob("*") if file.is_file()} if path.is_dir() else {path}


def test_services_run_every_stage_of_a_run_without_containers():
    """Every stage is reached, the gates before the publisher serves anything."""
    reached = {" ".join(service["command"]) for service in SERVICES.values()}
    assert "tutor run --until forgetting --json" in reached
    names = list(BY_NAME)
    until = names[: names.index("forgetting") + 1]
    assert {"ladder", "parity"} <= set(until)
    by_services = {"evaluate": "tutor eval --engine ollama --json", "report": "tutor report --json"}
    assert {name: by_services.get(name) in reached for name in names if name not in until} == {
        "evaluate": True,
        "report": True,
    }
