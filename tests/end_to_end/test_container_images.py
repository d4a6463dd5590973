"""The images of the Compose stack in Docker: users, programs, layers, secrets, certificates.

make test-docker
"""

import json
import subprocess
import zipfile
from collections.abc import Iterator

import pytest
from support.processes.command import ROOT
from support.processes.docker_cli import CANARY, docker, inspected

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("target", ["trainer", "converter", "client"])
def test_image_built_with_token_is_unprivileged_and_without_it(images: None, project: str, target: str) -> None:
    image = f"{project}-{target}"
    assert inspected("image", image)["Config"]["User"] == "10001:10001"
    assert CANARY not in docker("history", "--no-trunc", image)
    assert CANARY not in json.dumps(inspected("image", image))


def test_images_contain_only_the_programs_they_need(images: None, project: str) -> None:
    def has(target: str, *command: str) -> bool:
        run = ["docker", "run", "--rm", "--network", "none", f"{project}-{target}", *command]
        return subprocess.run(run, capture_output=True, check=False).returncode == 0

    assert has("client", "python", "-c", "import tutor.serving.publish, ollama")
    assert not has("client", "python", "-c", "import torch")
    assert has("client", "tutor", "--version")
    assert has("trainer", "gcc", "--version")  # Triton's
    assert has("trainer", "test", "-x", "/opt/llama.cpp/bin/llama-tokenize")  # the base stage's
    assert not has("trainer", "test", "-e", "/opt/llama.cpp/bin/llama-server")
    assert not has("converter", "g++", "--version")


def test_converter_image_shares_the_layers_of_trainer(images: None, project: str) -> None:
    """They store PyTorch once."""
    names = (f"{project}-trainer", f"{project}-converter")
    layers = [inspected("image", name)["RootFS"]["Layers"] for name in names]
    sizes = [inspected("image", name)["Size"] for name in names]
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
    as_root = ("run", "--rm", "--user", "0", "--volume", f"{served}:/served", f"{project}-client")
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
    docker("run", "--detach", *index, "--volume", f"{served}:/served:ro", f"{project}-client", "python", "-c", INDEX)
    yield first, first
    docker("rm", "--force", f"{project}-index")
    docker("network", "rm", first)
    docker("image", "rm", first, trusting)


def test_build_trusts_only_certificates_of_base_image(trusting_build: tuple[str, str], project: str) -> None:
    image, network = trusting_build

    def download(image: str) -> "subprocess.CompletedProcess[str]":
        pip = ("pip", "download", "--retries", "5", "--no-index", "--find-links", "https://index:8443/", "probe")
        run = ["docker", "run", "--rm", "--network", network, "--workdir", "/tmp", image, *pip]
        return subprocess.run(run, capture_output=True, text=True, check=False)

    trusted, other = download(image), download(f"{project}-client")
    assert trusted.returncode == 0, trusted.stderr
    assert "Saved ./probe-1-py3-none-any.whl" in trusted.stdout
    assert other.returncode != 0
    assert "CERTIFICATE_VERIFY_FAILED" in other.stdout + other.stderr
