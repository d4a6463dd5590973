"""How pytest-docker runs this repository's compose.yaml: under a project name, a port and volumes of the tests' own.

Its `docker_services` starts Ollama, and stops and removes what the project has left; the images stay. The fixtures here
skip, with the reason, where Docker or an image is not on this machine and cannot be pulled.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes.command import ROOT
from support.processes.docker_cli import is_available

from tutor.machine import preflight


@pytest.fixture(scope="session")
def docker_compose_file() -> Path:
    """The stack's own file."""
    return ROOT / "compose.yaml"


@pytest.fixture(scope="session")
def docker_compose_command() -> str:
    """`docker compose` that publishes Ollama on any free port."""
    return "TUTOR_OLLAMA_PORT= docker compose"


@pytest.fixture(scope="session")
def docker_cleanup() -> list[str]:
    """The command that removes the project with its volumes."""
    return ["--profile '*' down --volumes --remove-orphans --timeout 5"]


@pytest.fixture(scope="session")
def docker_compose_project_name(
    docker_compose_command: str, docker_compose_file: Path, docker_cleanup: list[str]
) -> Iterator[str]:
    """The project's name, whatever is left of the project at the end removed.

    pytest-docker removes nothing after a start that failed, nor what `docker compose run` makes without its services.
    """
    if faults := preflight.docker_faults(preflight.daemon()):
        pytest.skip(str(faults[0]))
    from pytest_docker.plugin import get_docker_services

    name = f"tutor-test-{os.getpid()}"
    with get_docker_services(docker_compose_command, docker_compose_file, name, [], docker_cleanup):
        yield name


@pytest.fixture(scope="session")
def ollama_image(docker_compose_file: Path, docker_compose_project_name: str) -> str:
    """The Ollama image that compose.yaml (or OLLAMA_IMAGE) names."""
    command = ["docker", "compose", "--file", docker_compose_file, "config", "--format", "json"]
    shown = subprocess.run(command, capture_output=True, check=True)
    image = str(json.loads(shown.stdout)["services"]["ollama"]["build"]["args"]["OLLAMA_IMAGE"])
    if not is_available(image):
        pytest.skip(f"the Ollama image {image} is not here and cannot be pulled")
    return image


@pytest.fixture(scope="session")
def docker_setup(ollama_image: str) -> list[str]:
    """The commands that start Ollama and wait until it is healthy."""
    return ["build --quiet ollama", "up --detach --wait --wait-timeout 180 --no-deps ollama"]


@pytest.fixture(scope="session")
def base_image(docker_compose_project_name: str) -> str:
    """The image that docker/Dockerfile starts from (BASE_IMAGE names another)."""
    image = os.environ.get("BASE_IMAGE", "debian:trixie-slim")
    if not is_available(image):
        pytest.skip(f"the base image {image} is not here and cannot be pulled")
    return image
