"""The Compose stack for real: its images, its services on a small recipe, its own Ollama (faults.md A3, G02, O23-O28).

    make test-docker

Skipped, with the reason, where Docker or the pinned Ollama image is not at hand. Everything runs under a project name,
a port and volumes of its own, which are removed at the end; the images stay. TUTOR_TEST_RECIPE=data/demo.toml takes
the demo's recipe instead of the tiny one's.
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

import pytest
from conftest import ROOT, TUTOR, environment

from tutor.artifacts import stage_folder as artifacts
from tutor.engines.llamacpp import build as llamacpp_build
from tutor.engines.ollama import engine as ollama
from tutor.engines.protocol import Generation
from tutor.errors import HostError, ServiceError
from tutor.machine import preflight
from tutor.pipeline import compose as stack
from tutor.pipeline.compose import Stack, StackError
from tutor.prompt import conversation
from tutor.recipe.settings import Recipe, read_recipe

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

RECIPE = ROOT / os.environ.get("TUTOR_TEST_RECIPE", "tests/tiny.toml")
CANARY = "hf_canary0123456789"
MADE = ("adapter", "merged", "gguf")
ASKED = """
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
"""What a process inside a service says of itself."""


def docker(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"docker {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def inspected(kind: str, name: str) -> Any:
    return json.loads(docker(kind, "inspect", name))[0]


def at_hand(image: str) -> bool:
    """Whether an image is here, or can be pulled."""
    here = subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False).returncode == 0
    return (
        here or subprocess.run(["docker", "pull", "--quiet", image], capture_output=True, check=False).returncode == 0
    )


@pytest.fixture(scope="module")
def project() -> Iterator[str]:
    """A Compose project of this run's own, removed with its volumes afterwards."""
    if faults := preflight.docker_faults(preflight.daemon()):
        pytest.skip(str(faults[0]))
    with pytest.MonkeyPatch.context() as patch:
        name = f"tutor-test-{os.getpid()}"
        patch.setenv("COMPOSE_PROJECT_NAME", name)
        patch.setenv("TUTOR_OLLAMA_PORT", "")  # any free one
        yield name
        here = Stack(RECIPE, ROOT / "build")
        down = here.command("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "5")
        subprocess.run(down, env=here.environment(), capture_output=True, check=False)


@pytest.fixture(scope="module")
def recipe(project: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The recipe and its rows in a folder of their own, as the containers want them."""
    folder = tmp_path_factory.mktemp("recipe") / "data"
    folder.mkdir()
    for rows in (ROOT / "data").glob("*.jsonl"):
        shutil.copy(rows, folder)
    path = folder / RECIPE.name
    path.write_text(RECIPE.read_text().replace("../data/", ""))
    return read_recipe(path)


@pytest.fixture(scope="module")
def compose(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Stack:
    """The stack of that recipe, its folders made."""
    made = Stack(recipe.path, tmp_path_factory.mktemp("contained") / "build")
    stack.prepare(made)
    return made


@pytest.fixture(scope="module")
def pinned(compose: Stack) -> str:
    """The Ollama image that compose.yaml (or OLLAMA_IMAGE) names."""
    shown = subprocess.run(
        compose.command("config", "--format", "json"), env=compose.environment(), capture_output=True, check=True
    )
    image = str(json.loads(shown.stdout)["services"]["ollama"]["build"]["args"]["OLLAMA_IMAGE"])
    if not at_hand(image):
        pytest.skip(f"the Ollama image {image} is not here and cannot be pulled")
    return image


@pytest.fixture(scope="module")
def images(compose: Stack) -> None:
    """The images of the stages, built while a token is in the environment."""
    base = os.environ.get("BASE_IMAGE", "debian:trixie-slim")
    if not at_hand(base):
        pytest.skip(f"the base image {base} is not here and cannot be pulled")
    command = compose.command("--progress", "plain", "build", "trainer", "converter", "publisher")
    subprocess.run(command, env={**compose.environment(), "HF_TOKEN": CANARY}, check=True, timeout=3000)


@pytest.fixture(scope="module")
def contained(images: None, compose: Stack) -> Path:
    """What trainer, merger and converter make as containers."""
    for name in stack.BEFORE:
        assert stack.did_something(stack.run_service(compose, name))
    return compose.folder


@pytest.fixture(scope="module")
def server(pinned: str, compose: Stack) -> str:
    """The Compose file's own Ollama, healthy: its container's name."""
    subprocess.run(compose.command("build", "--quiet", "ollama"), env=compose.environment(), check=True)
    stack.start_server(compose)
    return f"{os.environ['COMPOSE_PROJECT_NAME']}-ollama-1"


def host(compose: Stack) -> str:
    """Where that Ollama is now: its port is another after every start."""
    return f"http://{stack.address(compose)}"


def inside(compose: Stack, service: str, token: Path | None = None) -> dict[str, Any]:
    """What a process in a service's container says of itself."""
    command = compose.command("--progress", "quiet", "run", "--rm", "--no-deps", "-T", service, "python", "-c", ASKED)
    done = subprocess.run(command, env=compose.environment(token), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# The files


@pytest.mark.parametrize("gpu", [False, True])
def test_compose_takes_its_file_without_a_word(compose: Stack, *, gpu: bool) -> None:
    here = Stack(compose.recipe, compose.build, gpu=gpu)
    command = here.command("--profile", "*", "config", "--quiet")
    done = subprocess.run(command, env=here.environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_its_variables_too(project: str) -> None:
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
def test_no_image_runs_as_root_or_holds_the_token_that_was_in_the_environment(images: None, image: str) -> None:
    assert inspected("image", image)["Config"]["User"] == "10001:10001"
    assert CANARY not in docker("history", "--no-trunc", image)
    assert CANARY not in json.dumps(inspected("image", image))


def test_the_client_has_no_torch_and_the_converter_no_compiler_for_cpp(images: None) -> None:
    def has(image: str, *command: str) -> bool:
        run = ["docker", "run", "--rm", "--network", "none", image, *command]
        return subprocess.run(run, capture_output=True, check=False).returncode == 0

    assert has("tutor-client", "python", "-c", "import tutor.serving.publish, ollama")
    assert not has("tutor-client", "python", "-c", "import torch")
    assert has("tutor-client", "tutor", "--version")
    assert has("tutor-trainer", "gcc", "--version")  # Triton's
    assert not has("tutor-converter", "g++", "--version")


def test_the_converters_share_the_trainers_layers(images: None) -> None:
    """PyTorch is stored once."""
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
"""A package index whose certificate only its own authority has signed, as behind a proxy that inspects TLS."""


@pytest.fixture(scope="module")
def inspected_base(images: None, project: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The Dockerfile's first stage on a base image that trusts one more authority, and a network with its index."""
    served = tmp_path_factory.mktemp("served")
    served.chmod(0o755)  # the index is no more root than any other container here
    subject = ("-subj", "/CN=index", "-addext", "subjectAltName=DNS:index")
    key = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "/served/ca.key", "-out", "/served/ca.crt")
    as_root = ("run", "--rm", "--user", "0", "--volume", f"{served}:/served", "tutor-client")
    docker(*as_root, "openssl", *key, *subject)
    docker(*as_root, "chmod", "0644", "/served/ca.key")
    with zipfile.ZipFile(served / "probe-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("probe-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: probe\nVersion: 1\n")
        wheel.writestr("probe-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("probe-1.dist-info/RECORD", "")
    base = os.environ.get("BASE_IMAGE", "debian:trixie-slim")
    lines = (
        f"FROM {base}",
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


def test_a_build_trusts_what_its_base_image_trusts_and_no_more(inspected_base: tuple[str, str]) -> None:
    image, network = inspected_base

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
def test_a_service_is_an_unprivileged_user_who_writes_only_what_it_makes(
    images: None, compose: Stack, service: str
) -> None:
    found = inside(compose, service)
    assert (found["uid"], found["gid"]) == stack.owner()
    assert found["uid"] != 0
    assert 0 not in found["groups"]
    assert (found["effective"], found["bounding"], found["no_new_privileges"]) == (0, 0, "1")
    # The build folder's top is the caller's, who may be root; the recipe's own folder is the service's.
    own = {"/work/build"} if os.getuid() else set()
    assert set(found["writable"]) == own | ({"/cache"} if service == "trainer" else set())
    assert (found["interfaces"] == ["lo"]) == (service in ("merger", "reporter"))


def test_the_token_reaches_the_trainer_as_a_file_and_nobody_as_a_variable(
    images: None, compose: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inside(compose, "trainer")["token"] == ""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    with stack.hub_token() as token:
        found = inside(compose, "trainer", token)
        assert found.pop("token") == CANARY
        assert CANARY not in json.dumps(found)
        assert inside(compose, "converter", token)["token"] is None


def test_what_the_services_made_is_the_callers_and_readable_by_all(contained: Path) -> None:
    made = [path for name in (*MADE, "data", "base", "model") for path in (contained / name).rglob("*")]
    assert len(made) > 20
    for path in made:
        assert (path.stat().st_uid, path.stat().st_gid) == stack.owner()
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


@pytest.fixture(scope="module")
def embedded(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tutor run` makes of the same recipe in this environment."""
    if not llamacpp_build.is_built(llamacpp_build.build_folder()):
        pytest.skip("the pinned llama.cpp is not built here: make llamacpp")
    build = tmp_path_factory.mktemp("embedded")
    command = [TUTOR, "run", "--until", "modelfile", "--recipe", recipe.path, "--build", build]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return build / recipe.name


@pytest.mark.parametrize("folder", [*MADE, "data", "base", "model"])
def test_containers_make_the_bytes_of_the_embedded_run(contained: Path, embedded: Path, folder: str) -> None:
    both = [artifacts.require(where / folder, folder) for where in (contained, embedded)]
    ours, theirs = ({name: entry["sha256"] for name, entry in made.outputs.items()} for made in both)
    assert ours == theirs


def test_a_second_time_the_services_do_nothing(contained: Path, compose: Stack) -> None:
    assert [stack.did_something(stack.run_service(compose, name)) for name in stack.BEFORE] == [False] * 3


def test_a_failing_service_gives_its_own_exit_code(images: None, recipe: Recipe, tmp_path: Path) -> None:
    """Nothing to merge: 5. A folder that is not there: Docker's own error, 4."""
    empty = Stack(recipe.path, tmp_path / "build")
    stack.prepare(empty)
    with pytest.raises(StackError, match="tutor run --until data") as caught:
        stack.run_service(empty, "merger")
    assert caught.value.code == 5
    assert "Error: " in (empty.logs / "merger.log").read_text()
    gone = Stack(tmp_path / "gone" / recipe.path.name, tmp_path / "build")
    with pytest.raises((HostError, StackError), match="gone"):
        stack.run_service(gone, "merger")


def test_a_gpu_that_docker_cannot_hand_over_is_this_machines_fault(images: None, compose: Stack) -> None:
    if not preflight.gpu_faults(preflight.daemon()):
        pytest.skip("this host has a GPU")
    with pytest.raises(HostError, match="NVIDIA Container Toolkit"):
        stack.run_service(Stack(compose.recipe, compose.build, gpu=True), "trainer")


# Its Ollama


def test_ollama_is_unprivileged_and_on_this_host_alone(server: str, compose: Stack) -> None:
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
    """The model, published by the publisher's container."""
    return stack.run_service(compose, "publisher")


def test_the_publisher_publishes_once_and_proves_it(published: dict[str, Any], compose: Stack) -> None:
    assert published["published"] is True
    assert published["prompts"] == 7
    assert stack.run_service(compose, "publisher")["published"] is False


def test_ollama_run_answers_as_its_api_does(published: dict[str, Any], server: str, compose: Stack) -> None:
    """`ollama run` samples by the Modelfile's own settings, which are as good as greedy and have a seed."""
    said = docker("exec", server, "ollama", "run", published["model"], "Hola")
    assert said.strip()
    again = docker("exec", server, "ollama", "run", published["tag"], "Hola")
    assert said == again


def test_the_evaluator_asks_every_prompt(published: dict[str, Any], compose: Stack, recipe: Recipe) -> None:
    result = stack.run_service(compose, "evaluator")
    assert result["all"]["n"] == recipe.data.prompts
    assert result["all"]["errors"] <= result["all"]["n"] // 2  # a tiny model may repeat itself until Ollama gives up


@pytest.fixture(scope="module")
def program(pinned: str, project: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """The image's `ollama` with its CPU libraries, copied to this host; None where it does not run here."""
    folder = tmp_path_factory.mktemp("ollama")
    binary, libraries = folder / "bin" / "ollama", folder / "lib" / "ollama"  # it looks for ../lib/ollama
    binary.parent.mkdir()
    libraries.mkdir(parents=True)
    container = f"{project}-files"
    docker("create", "--name", container, pinned)
    try:
        docker("cp", "--follow-link", f"{container}:/usr/bin/ollama", str(binary))
        copy = ["docker", "cp", f"{container}:/usr/lib/ollama/.", "-"]
        with (
            subprocess.Popen(copy, stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            for member in archive:
                if "/" not in member.name.removeprefix("./"):  # the folders in it are for GPUs, and are gigabytes
                    archive.extract(member, libraries)
    finally:
        docker("rm", container)
    commands = ([binary, "--version"], [libraries / "llama-server", "--version"])
    own = environment(HOME=str(folder))
    runs = all(subprocess.run(each, env=own, capture_output=True, check=False).returncode == 0 for each in commands)
    yield binary if runs else None
    shutil.rmtree(folder)


def test_the_tests_of_a_real_server_pass_on_this_one(
    contained: Path,
    server: str,
    program: Path | None,
    compose: Stack,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    pytestconfig: pytest.Config,
) -> None:
    """tests/test_publish_real.py: create, show, generate, chat, logprobs, adapter, rollback; what must be refused.

    Their JUnit report, where this run writes one, stands beside it: REPORT.real-server.xml.
    """
    if compose.recipe.stem != "tiny":
        pytest.skip("they want the tiny recipe's model")
    build = tmp_path / "build"
    shutil.copytree(contained, build / "tiny")
    outer = pytestconfig.getoption("xmlpath")
    report = Path(outer).with_suffix(".real-server.xml") if outer else tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "tests/test_publish_real.py", "-q", f"--junitxml={report}"]
    extra = {"TUTOR_TEST_OLLAMA": host(compose), "TUTOR_TEST_BUILD": str(build)}
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


def test_a_server_killed_while_it_answers_is_an_error_and_a_new_one_has_its_models(
    published: dict[str, Any], server: str, compose: Stack
) -> None:
    long = Generation(max_new_tokens=1500, temperature=1.5, top_p=1.0, repetition_penalty=1.0, seed=1)
    with ollama.serve(published["tag"], host(compose)) as engine:
        engine.answer(conversation("Hola"), Generation(1, 0.0, 1.0, 1.0, 1))  # loaded
        docker("update", "--cpus", "0.05", server)  # slow enough to be killed in the middle
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
    with ollama.connect(host(compose)) as again:
        assert published["tag"] in [tag.name for tag in again.tags()]
    assert stack.run_service(compose, "publisher")["published"] is False


def test_a_port_that_is_taken_is_this_machines_fault(
    server: str, compose: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = stack.address(compose).rpartition(":")[2]
    monkeypatch.setenv("COMPOSE_PROJECT_NAME", f"{os.environ['COMPOSE_PROJECT_NAME']}-second")
    monkeypatch.setenv("TUTOR_OLLAMA_PORT", port)
    try:
        with pytest.raises(HostError, match="TUTOR_OLLAMA_PORT"):
            stack.start_server(compose)
    finally:
        subprocess.run(compose.command("down", "--volumes"), env=compose.environment(), capture_output=True, check=True)


# All of it


def test_make_all_does_everything_once(pinned: str, images: None, recipe: Recipe, compose: Stack) -> None:
    """`tutor stack all` on what is there, and once more."""
    first = stack.run_all(recipe, compose.build, gpu=False)
    assert re.fullmatch(r"127\.0\.0\.1:\d+", first["host"])
    assert set(first["services"]) == {*stack.BEFORE, *stack.AFTER}
    assert stack.run_all(recipe, compose.build, gpu=False)["ran"] == []
