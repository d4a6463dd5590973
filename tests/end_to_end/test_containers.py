"""The Compose stack in Docker: its images, its services with a small recipe, and its Ollama.

    make test-docker

pytest-docker starts and stops the project (conftest.py). TUTOR_TEST_RECIPE=data/demo.toml takes the demo's recipe
instead of the tiny one's. Does not test a GPU beyond the error where there is none.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.processes.command import ROOT, environment
from support.processes.docker_cli import docker, inspected

from tutor.artifacts.manifest import require_stage
from tutor.engines.llamacpp.build import build_folder, is_built
from tutor.engines.ollama.client import connect
from tutor.engines.ollama.engine import serve
from tutor.engines.protocol import Generation
from tutor.errors import HostError, ServiceError
from tutor.machine import preflight
from tutor.pipeline import compose as stack
from tutor.pipeline.compose import Stack
from tutor.pipeline.logged_command import StackError
from tutor.prompt import conversation
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

TUTOR = Path(sys.executable).with_name("tutor")
RECIPE = ROOT / os.environ.get("TUTOR_TEST_RECIPE", "tests/support/tiny.toml")
CANARY = "hf_canary0123456789"
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
    "token": pathlib.Path("/run/secrets/hf_token").read_text() if os.path.exists("/run/secrets/hf_token") else None,
}))
"""
"""Program that prints the ids, privileges, writable folders and environment of a process in a service."""


@pytest.fixture(scope="module")
def project(docker_compose_project_name: str) -> Iterator[str]:
    """The Compose project's name; our own commands get it from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPOSE_PROJECT_NAME", docker_compose_project_name)
        patch.setenv("TUTOR_OLLAMA_PORT", "")  # any free one
        yield docker_compose_project_name


@pytest.fixture(scope="module")
def recipe(project: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe in one folder with its rows, which the containers mount."""
    folder = tmp_path_factory.mktemp("recipe") / "data"
    folder.mkdir()
    for rows in (ROOT / "data").glob("*.jsonl"):
        shutil.copy(rows, folder)
    path = folder / RECIPE.name
    path.write_text(RECIPE.read_text().replace("../../data/", ""))
    return read_recipe(path)


@pytest.fixture(scope="module")
def compose(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """The stack of that recipe, with its folders."""
    made = Stack(recipe.path, tmp_path_factory.mktemp("contained") / "build")
    stack.prepare(made)
    return made


@pytest.fixture(scope="module")
def images(base_image: str, compose: Stack) -> None:
    """The images of the stages, built while a token is in the environment."""
    command = compose.command("--progress", "plain", "build", "trainer", "converter", "publisher")
    subprocess.run(command, env={**compose.environment(), "HF_TOKEN": CANARY}, check=True, timeout=3000)


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


# The images


@pytest.mark.parametrize("image", ["tutor-trainer", "tutor-converter", "tutor-client"])
def test_image_built_with_token_is_unprivileged_and_without_it(images: None, image: str) -> None:
    assert inspected("image", image)["Config"]["User"] == "10001:10001"
    assert CANARY not in docker("history", "--no-trunc", image)
    assert CANARY not in json.dumps(inspected("image", image))


def test_images_contain_only_the_programs_they_need(images: None) -> None:
    def has(image: str, *command: str) -> bool:
        run = ["docker", "run", "--rm", "--network", "none", image, *command]
        return subprocess.run(run, capture_output=True, check=False).returncode == 0

    assert has("tutor-client", "python", "-c", "import tutor.serving.publish, ollama")
    assert not has("tutor-client", "python", "-c", "import torch")
    assert has("tutor-client", "tutor", "--version")
    assert has("tutor-trainer", "gcc", "--version")  # Triton's
    assert has("tutor-trainer", "test", "-x", "/opt/llama.cpp/bin/llama-tokenize")  # the base stage's
    assert not has("tutor-trainer", "test", "-e", "/opt/llama.cpp/bin/llama-server")
    assert not has("tutor-converter", "g++", "--version")


def test_converter_image_shares_the_layers_of_trainer(images: None) -> None:
    """They store PyTorch once."""
    layers = [inspected("image", name)["RootFS"]["Layers"] for name in ("tutor-trainer", "tutor-converter")]
    sizes = [inspected("image", name)["Size"] for name in ("tutor-trainer", "tutor-converter")]
    shared = [layer for layer in layers[0] if layer in layers[1]]
    assert shared == layers[0][: len(shared)]
    assert sizes[1] - sizes[0] < 500e6
    assert len(shared) >= len(layers[0]) - 1


INDEX = """
import functools, http.server, ssl
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory="/served")
server = http.server.HTTPServer(("", 8443), handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/served/ca.crt", "/served/ca.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
"""Package index with a certificate of an unknown authority, as a proxy that inspects TLS presents it."""


@pytest.fixture(scope="module")
def trusting_build(
    images: None, base_image: str, project: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """The Dockerfile's first stage on a base image that trusts one more authority, and the network of an index."""
    served = tmp_path_factory.mktemp("served")
    served.chmod(0o755)  # the index runs as the image's own user
    subject = ("-subj", "/CN=index", "-addext", "subjectAltName=DNS:index")
    key = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "/served/ca.key", "-out", "/served/ca.crt")
    as_root = ("run", "--rm", "--user", "0", "--volume", f"{served}:/served", "tutor-client")
    docker(*as_root, "openssl", *key, *subject)
    docker(*as_root, "chmod", "0644", "/served/ca.key")
    with zipfile.ZipFile(served / "probe-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("probe-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: probe\nVersion: 1\n")
        wheel.writestr("probe-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("probe-1.dist-info/RECORD", "")
    lines = (
        f"FROM {base_image}",
        "RUN apt-get update && apt-get install --yes --no-install-recommends ca-certificates",
        "COPY ca.crt /usr/local/share/ca-certificates/",
        "RUN update-ca-certificates",
    )
    (served / "Dockerfile").write_text("\n".join(lines) + "\n")
    trusting, first = f"{project}-base", f"{project}-python"
    docker("build", "--quiet", "--tag", trusting, str(served))
    dockerfile = ("--file", str(ROOT / "docker" / "Dockerfile"), "--target", "python", str(ROOT))
    docker("build", "--quiet", "--build-arg", f"BASE_IMAGE={trusting}", "--tag", first, *dockerfile)
    docker("network", "create", "--internal", first)
    index = ("--name", f"{project}-index", "--network", first, "--network-alias", "index")
    docker("run", "--detach", *index, "--volume", f"{served}:/served:ro", "tutor-client", "python", "-c", INDEX)
    yield first, first
    docker("rm", "--force", f"{project}-index")
    docker("network", "rm", first)
    docker("image", "rm", first, trusting)


def test_build_trusts_only_certificates_of_base_image(trusting_build: tuple[str, str]) -> None:
    image, network = trusting_build

    def download(image: str) -> "subprocess.CompletedProcess[str]":
        pip = ("pip", "download", "--retries", "5", "--no-index", "--find-links", "https://index:8443/", "probe")
        run = ["docker", "run", "--rm", "--network", network, "--workdir", "/tmp", image, *pip]
        return subprocess.run(run, capture_output=True, text=True, check=False)

    trusted, other = download(image), download("tutor-client")
    assert trusted.returncode == 0, trusted.stderr
    assert "Saved ./probe-1-py3-none-any.whl" in trusted.stdout
    assert other.returncode != 0
    assert "CERTIFICATE_VERIFY_FAILED" in other.stdout + other.stderr


# The services


@pytest.mark.parametrize("service", ["trainer", "merger", "converter", "publisher", "evaluator", "reporter"])
def test_service_user_is_unprivileged_and_writes_own_folders(images: None, compose: Stack, service: str) -> None:
    found = inside(compose, service)
    assert (found["uid"], found["gid"]) == stack.owner()
    assert found["uid"] != 0
    assert 0 not in found["groups"]
    assert (found["effective"], found["bounding"], found["no_new_privileges"]) == (0, 0, "1")
    # The build folder's top is the caller's, who may be root; the recipe's own folder is the service's.
    own = {"/work/build"} if os.getuid() else set()
    assert set(found["writable"]) == own | ({"/cache"} if service == "trainer" else set())
    assert (found["interfaces"] == ["lo"]) == (service in ("merger", "reporter"))


def test_token_reaches_only_trainer_and_only_as_file(
    images: None, compose: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inside(compose, "trainer")["token"] == ""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with stack.hub_token() as token:
        found = inside(compose, "trainer", token)
        assert found.pop("token") == CANARY
        assert CANARY not in json.dumps(found)
        assert inside(compose, "converter", token)["token"] is None


def test_service_outputs_belong_to_caller_and_are_readable(contained: Path) -> None:
    made = [path for name in (*MADE, "data", "base", "model") for path in (contained / name).rglob("*")]
    assert len(made) > 20
    for path in made:
        assert (path.stat().st_uid, path.stat().st_gid) == stack.owner()
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
    assert [stack.had_work(stack.run_service(compose, name)) for name in stack.SERVICES_BEFORE] == [False] * 3


def test_service_that_fails_returns_its_exit_code(images: None, recipe: Recipe, tmp_path: Path) -> None:
    """Exit code 5 without an adapter to merge; Docker's own error where a folder does not exist."""
    empty = Stack(recipe.path, tmp_path / "build")
    stack.prepare(empty)
    with pytest.raises(StackError, match="tutor run --until data") as caught:
        stack.run_service(empty, "merger")
    assert caught.value.code == 5
    assert "Error: " in (empty.logs / "merger.log").read_text()
    gone = Stack(tmp_path / "gone" / recipe.path.name, tmp_path / "build")
    with pytest.raises((HostError, StackError), match="gone"):
        stack.run_service(gone, "merger")


def test_gpu_not_available_raises_host_error(images: None, compose: Stack) -> None:
    if not preflight.gpu_faults(preflight.daemon()):
        pytest.skip("this host has a GPU")
    with pytest.raises(HostError, match="NVIDIA Container Toolkit"):
        stack.run_service(Stack(compose.recipe, compose.build, gpu=True), "trainer")


# Its Ollama


def test_ollama_is_unprivileged_and_listens_on_loopback_only(server: str, compose: Stack) -> None:
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
        subprocess.run(compose.command("down", "--volumes"), env=compose.environment(), capture_output=True, check=True)


# All of it


def test_stack_run_all_twice_does_nothing_more(server: str, images: None, recipe: Recipe, compose: Stack) -> None:
    """`tutor stack run` where Ollama's container is missing, and once more."""
    docker("rm", "--force", server)
    first = stack.run_all(recipe, compose.build, gpu=False)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", first["host"])
    assert set(first["services"]) == {*stack.SERVICES_BEFORE, *stack.SERVICES_AFTER}
    assert stack.run_all(recipe, compose.build, gpu=False)["ran"] == []
