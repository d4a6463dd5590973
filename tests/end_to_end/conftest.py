"""How pytest-docker runs compose.yaml: with a project name, a port, images and volumes of the tests' own.

Its `docker_services` starts Ollama, and stops and removes what the project has left; Docker's build cache stays. The
fixtures here skip, with the reason, where Docker or an image is not on this machine and cannot be pulled.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes.command import ROOT
from support.processes.docker_cli import CANARY, is_available

from tutor.machine import container_host
from tutor.pipeline import compose_command
from tutor.pipeline.compose_command import Stack
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe

RECIPE = ROOT / os.environ.get("TUTOR_TEST_RECIPE", "tests/support/tiny.toml")


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
    """The command that removes the project with its volumes and images."""
    return ["--profile '*' down --volumes --rmi all --remove-orphans --timeout 5"]


@pytest.fixture(scope="session")
def docker_compose_project_name(
    docker_compose_command: str, docker_compose_file: Path, docker_cleanup: list[str]
) -> Iterator[str]:
    """The project's name, whatever is left of the project at the end removed.

    pytest-docker removes nothing after a start that failed, nor what `docker compose run` makes without its services.
    """
    if faults := container_host.docker_faults(container_host.daemon()):
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
    made = Stack(recipe.path, tmp_path_factory.mktemp("contained") / "build", daemon=container_host.daemon())
    compose_command.prepare(made)
    return made


@pytest.fixture(scope="module")
def images(base_image: str, compose: Stack) -> None:
    """The images of the stages, built while a token is in the environment."""
    command = compose.command("--progress", "plain", "build", "trainer", "converter", "publisher")
    subprocess.run(command, env={**compose.environment(), "HF_TOKEN": CANARY}, check=True, timeout=3000)
