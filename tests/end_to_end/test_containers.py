"""The Compose stack in Docker: its services with a small recipe, and its Ollama.

    make test-docker

pytest-docker starts and stops the project (conftest.py). TUTOR_TEST_RECIPE=data/demo.toml takes the demo's recipe
instead of the tiny one's. Does not test a GPU beyond the error where there is none.
"""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.processes.command import ROOT, environment
from support.processes.docker_cli import CANARY, docker, inspected

from tutor.artifacts.manifest import require_stage
from tutor.engines.llamacpp.build import build_folder, is_built
from tutor.engines.ollama.client import connect
from tutor.engines.ollama.engine import serve
from tutor.engines.protocol import Generation
from tutor.errors import HostError, ServiceError
from tutor.machine import container_host, preflight
from tutor.pipeline import compose as stack
from tutor.pipeline import compose_command
from tutor.pipeline.compose_command import Stack
from tutor.pipeline.logged_command import StackError
from tutor.prompt.messages import conversation
from tutor.recipe.settings import Recipe

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

TUTOR = Path(sys.executable).with_name("tutor")
MADE = ("adapter", "merged", "gguf")
PROBE = """
import json, os, pathlib, socket
def writable(path):
    try:
        (pathlib.Path(path) / "probe").touch()
        (pathlib.Path(path) / "probe").unlink()
        return True
    except OSError:
        return False
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(), "effective": int(status["CapEff"], 16),
    "bounding": int(status["CapBnd"], 16), "no_new_privileges": status["NoNewPrivs"].strip(),
    "writable": [path for path in ("/", "/work", "/work/data", "/work/build", "/opt", "/cache", "/etc")
                 if writable(path)],
    "interfaces": sorted(name for _, name in socket.if_nameindex()), "environment": dict(os.environ),
    "leaves": any(line.split()[1] == "00000000" for line in open("/proc/net/route").readlines()[1:]),
    "shared_memory": os.statvfs("/dev/shm").f_frsize * os.statvfs("/dev/shm").f_blocks,
    "token": pathlib.Path("/run/secrets/hf_token").read_text() if os.path.exists("/run/secrets/hf_token") else None,
}))
"""
"""Program that prints the ids, privileges, folders, networks and environment of a process in a service."""


@pytest.fixture(scope="module")
def contained(images: None, compose: Stack) -> Path:
    """The build folder after the containers of trainer, merger and converter."""
    for name in stack.SERVICES_BEFORE:
        assert stack.had_work(stack.run_service(compose, name))
    return compose.folder


@pytest.fixture(scope="module")
def server(compose: Stack, docker_services: Any, docker_ip: str) -> str:
    """The Compose project's own Ollama, which answers at the address that `stack` finds: its container's name."""
    found = f"{docker_ip}:{docker_services.port_for('ollama', 11434)}"
    assert stack.address(compose) == found
    docker_services.wait_until_responsive(lambda: answers(f"http://{found}/api/version"), timeout=60, pause=0.5)
    return f"{os.environ['COMPOSE_PROJECT_NAME']}-ollama-1"


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.TransportError:
        return False


def url(compose: Stack) -> str:
    """Return the URL of that Ollama; its port changes at every start."""
    return f"http://{stack.address(compose)}"


def inside(compose: Stack, service: str, token: Path | None = None) -> dict[str, Any]:
    """Run PROBE in a service's container; return what it prints."""
    command = compose.command("--progress", "quiet", "run", "--rm", "--no-deps", "-T", service, "python", "-c", PROBE)
    done = subprocess.run(command, env=compose.environment(token), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# The files


@pytest.mark.parametrize("gpu", [False, True])
def test_compose_file_valid_prints_nothing(compose: Stack, *, gpu: bool) -> None:
    here = Stack(compose.recipe, compose.build, gpu=gpu)
    command = here.command("--profile", "*", "config", "--quiet")
    done = subprocess.run(command, env=here.environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_compose_file_without_variables_has_safe_defaults(project: str) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("TUTOR_", "HF_", "COMPOSE_"))}
    done = subprocess.run(
        ["docker", "compose", "--profile", "*", "config"],
        cwd=ROOT,
        env=plain,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert "user: 10001:10001" in done.stdout
    assert "host_ip: 127.0.0.1" in done.stdout


# The services


@pytest.mark.parametrize("service", [*stack.SERVICES_BEFORE, *stack.SERVICES_AFTER])
def test_service_user_is_unprivileged_and_writes_own_folders(images: None, compose: Stack, service: str) -> None:
    found = inside(compose, service)
    assert (found["uid"], found["gid"]) == compose_command.owner(compose.daemon)
    assert compose.daemon.rootless or 0 not in (found["uid"], *found["groups"])
    assert (found["effective"], found["bounding"], found["no_new_privileges"]) == (0, 0, "1")
    # The build folder's top is the caller's, who may be root; the recipe's own folder is the service's.
    own = {"/work/build"} if os.getuid() else set()
    assert set(found["writable"]) == own | ({"/cache"} if service == "fetcher" else set())
    alone = service not in ("fetcher", "publisher", "evaluator")
    assert (found["interfaces"] == ["lo"]) == alone
    assert found["leaves"] == (service == "fetcher")
    assert (found["shared_memory"] >= 2 << 30) == (service == "trainer")


def test_token_reaches_only_fetcher_and_only_as_file(
    images: None, compose: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inside(compose, "fetcher")["token"] == ""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with compose_command.hub_token(compose.daemon) as token:
        found = inside(compose, "fetcher", token)
        assert found.pop("token") == CANARY
        assert CANARY not in json.dumps(found)
        assert inside(compose, "trainer", token)["token"] is None


def test_service_outputs_belong_to_caller_and_are_readable(contained: Path, compose: Stack) -> None:
    made = [path for name in (*MADE, "data", "base", "model") for path in (contained / name).rglob("*")]
    assert len(made) > 20
    for path in made:
        assert (path.stat().st_uid, path.stat().st_gid) == compose_command.owner(compose.daemon)
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


@pytest.fixture(scope="module")
def embedded(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of `tutor run` with the same recipe, outside containers."""
    if not is_built(build_folder()):
        pytest.skip("the pinned llama.cpp is not built here: make llamacpp")
    build = tmp_path_factory.mktemp("embedded")
    command = [TUTOR, "run", "--until", "modelfile", "--recipe", recipe.path, "--build", build]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return build / recipe.name


@pytest.mark.parametrize("folder", [*MADE, "data", "base", "model"])
def test_container_outputs_equal_those_of_tutor_run(contained: Path, embedded: Path, folder: str) -> None:
    both = [require_stage(where / folder, folder) for where in (contained, embedded)]
    ours, theirs = ({name: entry["sha256"] for name, entry in made.outputs.items()} for made in both)
    assert ours == theirs


def test_services_run_again_do_nothing(contained: Path, compose: Stack) -> None:
    assert [stack.had_work(stack.run_service(compose, name)) for name in stack.SERVICES_BEFORE] == [False] * 4


def test_service_that_fails_returns_its_exit_code(images: None, recipe: Recipe, tmp_path: Path) -> None:
    """Exit code 5 without an adapter to merge; Docker's own error where a folder does not exist."""
    empty = Stack(recipe.path, tmp_path / "build", daemon=container_host.daemon())
    compose_command.prepare(empty)
    with pytest.raises(StackError, match="tutor run --until base") as caught:
        stack.run_service(empty, "merger")
    assert caught.value.code == 5
    assert "Error: " in (empty.logs / "merger.log").read_text()
    gone = Stack(tmp_path / "gone" / recipe.path.name, tmp_path / "build")
    with pytest.raises((HostError, StackError), match="gone"):
        stack.run_service(gone, "merger")


def test_gpu_not_available_raises_host_error(images: None, compose: Stack) -> None:
    if not preflight.gpu_faults(compose.daemon):
        pytest.skip("this host has a GPU")
    with pytest.raises(HostError, match="NVIDIA Container Toolkit"):
        stack.run_service(Stack(compose.recipe, compose.build, gpu=True), "trainer")


# Its Ollama


def test_ollama_is_unprivileged_and_listens_on_loopback_only(
    server: str, images: None, project: str, compose: Stack
) -> None:
    found = inspected("container", server)
    kept = found["HostConfig"]
    assert found["Config"]["User"] == "10001:10001"
    assert (kept["ReadonlyRootfs"], kept["Privileged"], kept["CapDrop"], kept["CapAdd"]) == (True, False, ["ALL"], None)
    assert kept["SecurityOpt"] == ["no-new-privileges:true"]
    assert kept["Init"] is True
    assert kept["PidsLimit"] == 4096
    assert [mount["Destination"] for mount in found["Mounts"]] == ["/models"]
    bound = found["NetworkSettings"]["Ports"]["11434/tcp"]
    assert [entry["HostIp"] for entry in bound] == ["127.0.0.1"]
    port = int(bound[0]["HostPort"])
    for name, loopback in (("tcp", "0100007F"), ("tcp6", "")):
        lines = Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        listening = [line.split()[1] for line in lines if line.split()[3] == "0A"]
        assert {at.partition(":")[0] for at in listening if at.endswith(f":{port:04X}")} <= {loopback}
    gateway = inspected("network", "bridge")["IPAM"]["Config"][0]["Gateway"]
    for address in (gateway, socket.gethostbyname(socket.gethostname())):  # as another host reaches this one
        code = f"import socket; print(socket.socket().connect_ex(({address!r}, {port})))"
        other = ("run", "--rm", f"{project}-client", "python", "-c", code)
        assert address.startswith("127.") or docker(*other).strip() == str(errno.ECONNREFUSED)
    done = subprocess.run(["docker", "exec", server, "touch", "/probe"], capture_output=True, text=True, check=False)
    assert "Read-only file system" in done.stderr


@pytest.fixture(scope="module")
def published(contained: Path, server: str, compose: Stack) -> dict[str, Any]:
    """What the publisher's container prints after it has published the model."""
    return stack.run_service(compose, "publisher")


def test_publisher_run_twice_publishes_once(published: dict[str, Any], compose: Stack) -> None:
    assert published["published"] is True
    assert published["prompts"] == 7
    assert stack.run_service(compose, "publisher")["published"] is False


def test_ollama_run_by_model_and_by_tag_answers_the_same(
    published: dict[str, Any], server: str, compose: Stack
) -> None:
    """`ollama run` uses the Modelfile's settings: nearly greedy, with a seed."""
    answer = docker("exec", server, "ollama", "run", published["model"], "Hola")
    assert answer.strip()
    again = docker("exec", server, "ollama", "run", published["tag"], "Hola")
    assert answer == again


def test_evaluator_asks_every_prompt(published: dict[str, Any], compose: Stack, recipe: Recipe) -> None:
    result = stack.run_service(compose, "evaluator")
    assert result["all"]["n"] == recipe.data.prompts
    assert result["all"]["errors"] <= result["all"]["n"] // 2  # a tiny model may repeat itself until Ollama gives up


@pytest.fixture(scope="module")
def program(ollama_image: str, project: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """The image's `ollama` with its CPU libraries, copied to this host; None where it does not run here."""
    folder = tmp_path_factory.mktemp("ollama")
    binary, libraries = folder / "bin" / "ollama", folder / "lib" / "ollama"  # which reads ../lib/ollama
    binary.parent.mkdir()
    libraries.mkdir(parents=True)
    container = f"{project}-files"
    docker("create", "--name", container, ollama_image)
    try:
        docker("cp", "--follow-link", f"{container}:/usr/bin/ollama", str(binary))
        copy = ["docker", "cp", f"{container}:/usr/lib/ollama/.", "-"]
        with (
            subprocess.Popen(copy, stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            for member in archive:
                if "/" not in member.name.removeprefix("./"):  # its folders hold gigabytes for GPUs
                    archive.extract(member, libraries)
    finally:
        docker("rm", container)
    commands = ([binary, "--version"], [libraries / "llama-server", "--version"])
    own = environment(HOME=str(folder))
    runs = all(subprocess.run(each, env=own, capture_output=True, check=False).returncode == 0 for each in commands)
    yield binary if runs else None
    shutil.rmtree(folder)


def test_real_server_tests_pass_on_the_projects_ollama(
    contained: Path,
    server: str,
    program: Path | None,
    compose: Stack,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    pytestconfig: pytest.Config,
) -> None:
    """Runs test_real_ollama.py; its JUnit report stands beside this run's: REPORT.real-server.xml."""
    if compose.recipe.stem != "tiny":
        pytest.skip("these tests need the tiny recipe's model")
    build = tmp_path / "build"
    shutil.copytree(contained, build / "tiny")
    outer = pytestconfig.getoption("xmlpath")
    report = Path(outer).with_suffix(".real-server.xml") if outer else tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "tests/end_to_end/test_real_ollama.py", "-q", f"--junitxml={report}"]
    extra = {"TUTOR_TEST_OLLAMA": url(compose), "TUTOR_TEST_BUILD": str(build)}
    if program:
        extra["OLLAMA_BINARY"] = str(program)
    done = subprocess.run(command, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, check=False)
    cases = ET.parse(report).getroot().iter("testcase")
    verdicts = {case.get("name", ""): next((child.tag for child in case), "passed") for case in cases}
    with capsys.disabled():
        for name, verdict in verdicts.items():
            sys.stdout.write(f"\n    {verdict}: {name}")
    assert done.returncode == 0, done.stdout[-4000:]
    assert list(verdicts.values()).count("passed") >= 20
    assert not program or "skipped" not in verdicts.values()


def test_server_killed_raises_and_keeps_its_models(published: dict[str, Any], server: str, compose: Stack) -> None:
    long = Generation(max_new_tokens=1500, temperature=1.5, top_p=1.0, repetition_penalty=1.0, seed=1)
    with serve(published["tag"], url(compose)) as engine:
        engine.answer(conversation("Hola"), Generation(1, 0.0, 1.0, 1.0, 1))  # loads the model
        docker("update", "--cpus", "0.05", server)  # slow enough to be killed while it answers
        pieces: list[str] = []

        def kill(piece: str) -> None:
            if not pieces:
                docker("kill", server)
            pieces.append(piece)

        with pytest.raises(ServiceError):
            engine.answer(conversation("¿Qué es una interfaz?"), long, kill)
        assert pieces
    docker("update", "--cpus", "2", server)
    stack.start_server(compose)
    with connect(url(compose)) as again:
        assert published["tag"] in [tag.name for tag in again.tags()]
    assert stack.run_service(compose, "publisher")["published"] is False


def test_server_port_taken_raises_host_error(server: str, compose: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    port = stack.address(compose).rpartition(":")[2]
    monkeypatch.setenv("COMPOSE_PROJECT_NAME", f"{os.environ['COMPOSE_PROJECT_NAME']}-second")
    monkeypatch.setenv("TUTOR_OLLAMA_PORT", port)
    try:
        with pytest.raises(HostError, match="TUTOR_OLLAMA_PORT"):
            stack.start_server(compose)
    finally:
        down = compose.command("down", "--volumes", "--rmi", "all")
        subprocess.run(down, env=compose.environment(), capture_output=True, check=True)


def test_containers_of_another_checkout_are_left_alone(
    server: str, project: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert container_host.project_faults(container_host.project()) == []
    other = tmp_path / "copy"
    other.mkdir()
    shutil.copy(ROOT / "compose.yaml", other)
    shutil.copytree(ROOT / "docker", other / "docker")
    monkeypatch.setattr(container_host, "CHECKOUT", other)
    found = container_host.project()
    assert found.name == project
    (fault,) = container_host.project_faults(found)
    assert f"belong to the checkout {ROOT}" in fault.what
    monkeypatch.delenv("COMPOSE_PROJECT_NAME")
    assert container_host.project_faults(container_host.project()) == []  # named "copy", by its folder


# All of it


def test_stack_run_all_twice_does_nothing_more(
    server: str, images: None, recipe: Recipe, compose: Stack, base_image: str, ollama_image: str
) -> None:
    """`tutor stack run` where Ollama's container is missing, and once more."""
    docker("rm", "--force", server)
    first = stack.run_all(recipe, compose.build, gpu=False)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", first["host"])
    assert set(first["services"]) == {*stack.SERVICES_BEFORE, *stack.SERVICES_AFTER}
    for name, image in first["images"].items():
        below = f", from {ollama_image if name == 'ollama' else base_image}"
        assert re.fullmatch(rf"\S+, image id sha256:[0-9a-f]{{64}}{re.escape(below)}(@|, image id )sha256:.*", image)
    assert stack.run_all(recipe, compose.build, gpu=False)["ran"] == []
