"""What this host lacks for the Compose stack, all at once and before anything is built.

In: a recipe, a build folder, the programs on PATH. Out: findings, a line each. Starts nothing and changes nothing.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutor.artifacts.layout import BuildFolder
from tutor.artifacts.manifest import MANIFEST
from tutor.errors import HostError, RecipeError
from tutor.machine import capacity, host, run_cost
from tutor.machine.host import said, version
from tutor.machine.memory.shapes import Shape
from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

COMPOSE = (2, 24)
TOOLKIT = (1, 17, 8)  # older ones let a hostile image out of its container (CVE-2025-23266)
IMAGES = ("tutor-trainer", "tutor-converter", "tutor-client", "tutor-ollama")
IMAGES_GB = 14.0
PORT = 11434


@dataclass(frozen=True)
class Finding:
    """One thing that is missing, and what to do about it."""

    what: str
    hint: str

    def __str__(self) -> str:
        return f"{self.what}; {self.hint}"


class UnfitError(HostError):
    """This host cannot run the stack; `problems` holds a line for each thing that is missing."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        count = "one thing is" if len(findings) == 1 else f"{len(findings)} things are"
        super().__init__(f"this host cannot run the stack: {count} missing", "without Docker and GPU: make demo")
        self.problems = tuple(map(str, findings))


def check(recipe: Recipe, build: Path, *, gpu: bool | None = None) -> bool:
    """Whether the stack of a recipe gets a GPU here. Raises UnfitError with all that is missing, RecipeError.

    `gpu`: True wants one, False does without, None takes what is there and wants one where the base is large.
    """
    refuse_outside(recipe)
    info = daemon()
    faults = [] if gpu is False else gpu_faults(info)
    wanted = gpu or (gpu is None and is_large(recipe))
    findings = [*docker_faults(info), *(faults if wanted else ())]
    shape = capacity.find_shape(recipe, build)
    if shape is None:
        log.warning("%s is not known before it is fetched: memory and disk cannot be estimated", recipe.base.source)
    elif not (wanted and faults):
        findings += memory_faults(recipe, build, shape, gpu=gpu is not False and not faults)
    findings += disk_faults(recipe, build, shape, info)
    if info:
        findings += port_faults()
    if findings:
        raise UnfitError(findings)
    return gpu is not False and not faults


def is_large(recipe: Recipe) -> bool:
    """Whether the base may have billions of parameters, which would take weeks on a CPU: from the hub or a folder."""
    return recipe.base.source.startswith(("hub:", "path:"))


def refuse_outside(recipe: Recipe) -> None:
    """Raise RecipeError for what lies beyond the recipe's folder, all that the containers see of the host's files."""
    folder = recipe.path.parent
    named = {"data.train": recipe.data.train, "data.eval": recipe.data.eval}
    # An empty one is the folder itself.
    named |= {f"evaluate.{name}": value for name, value in recipe.evaluate.model_dump().items()}
    if recipe.base.source.startswith("path:"):
        named["base.source"] = recipe.base.source.removeprefix("path:")
    beyond = [f"{name} is {value}" for name, value in named.items() if not recipe.resolve(value).is_relative_to(folder)]
    if beyond:
        raise RecipeError(
            f"{recipe.path}: {', '.join(beyond)}, and the containers see only {folder}", "move it into that folder"
        )


def daemon() -> dict[str, Any]:
    """What `docker info` says of the daemon; empty when there is none, or it does not answer."""
    code, text = said("docker", "info", "--format", "{{json .}}")
    with contextlib.suppress(ValueError):
        info = json.loads(text)
        if code == 0 and isinstance(info, dict) and not info.get("ServerErrors"):
            return info
    return {}


def docker_faults(info: Mapping[str, Any]) -> list[Finding]:
    """Docker, its daemon and Compose."""
    if shutil.which("docker") is None:
        return [Finding("Docker is not installed (no `docker` on PATH)", "install Docker Engine with Compose")]
    findings = []
    if not info:
        _, text = said("docker", "info")
        denied = "permission denied" in text.lower()
        findings.append(
            Finding("this user may not use Docker", "add it to the group docker, then log in again")
            if denied
            else Finding("the Docker daemon does not answer", "start it: sudo systemctl start docker")
        )
    code, text = said("docker", "compose", "version", "--short")
    needed = ".".join(map(str, COMPOSE))
    if code:
        findings.append(Finding("Docker has no Compose plugin", f"install docker-compose-plugin {needed} or newer"))
    elif version(text) < COMPOSE:
        findings.append(Finding(f"Docker Compose is {text.strip()}", f"update it to {needed} or newer"))
    return findings


def gpu_faults(info: Mapping[str, Any]) -> list[Finding]:
    """The GPU, its driver, and the toolkit that hands it to containers."""
    findings = []
    code, text = said("nvidia-smi", "--list-gpus")
    if code or "GPU " not in text:
        findings.append(
            Finding("no NVIDIA GPU answers (nvidia-smi --list-gpus)", "another recipe runs on the CPU: data/demo.toml")
        )
    devices = [str(device) for device in info.get("DiscoveredDevices") or ()]
    known = "nvidia" in (info.get("Runtimes") or {}) or any("nvidia.com/gpu" in device for device in devices)
    if not known and shutil.which("nvidia-container-runtime-hook") is None:
        findings.append(
            Finding(
                "Docker has no NVIDIA Container Toolkit",
                "install nvidia-container-toolkit, run: sudo nvidia-ctk runtime configure --runtime=docker, "
                "restart Docker",
            )
        )
        return findings
    code, text = said("nvidia-ctk", "--version")
    if code == 0 and (0,) < version(text) < TOOLKIT:
        oldest = ".".join(map(str, TOOLKIT))
        findings.append(
            Finding(f"the NVIDIA Container Toolkit is older than {oldest}, which has known escapes", "update it")
        )
    return findings


def memory_faults(recipe: Recipe, build: Path, shape: Shape, *, gpu: bool) -> list[Finding]:
    """A training to come that fits neither the GPU nor, without one, main memory; and a setting that does."""
    if is_made(recipe, build, "train"):
        return []
    gpus = {str(found.index): found for found in host.gpus()} if gpu else {}
    if gpu and not gpus:
        return []  # it answers with less than is asked: the trainer will see
    try:
        capacity.refuse_training(recipe, build, shape, gpus.get(os.environ.get("TUTOR_GPU", "0")))
    except HostError as error:
        return [Finding(error.message, error.hint or "")]
    return []


def disk_faults(recipe: Recipe, build: Path, shape: Shape | None, info: Mapping[str, Any]) -> list[Finding]:
    """Disks without room for what is not there yet; two folders on one disk need the sum."""
    to_do = [name for name in capacity.WEIGHT_STAGES if not is_made(recipe, build, name)]
    sizes = run_cost.disk_sizes(recipe, shape, [*to_do, "publish"]) if shape else {}
    if BuildFolder(build, recipe.name).published().exists():
        sizes.pop("publish", None)
    # The hub's cache and Ollama's models are volumes of Docker's.
    in_docker = sum(sizes.pop(name, 0) for name in ("hub", "publish"))
    if not info or said("docker", "image", "inspect", *IMAGES)[0]:
        in_docker += round(IMAGES_GB * 1e9)
    needs = [(build, sum(sizes.values())), (Path(info.get("DockerRootDir") or "/"), in_docker)]
    return [
        Finding(f"the disk of {place} has {free / 1e9:.0f} GB free of {need / 1e9:.0f} GB", "make room")
        for place, free, need in run_cost.short_disks(needs)
    ]


def is_made(recipe: Recipe, build: Path, stage: str) -> bool:
    """Whether a stage's folder is there and whole."""
    return (BuildFolder(build, recipe.name).stage(stage) / MANIFEST).exists()


def port_faults() -> list[Finding]:
    """Another program on the port that Ollama is published on; our own Ollama may have it."""
    given = os.environ.get("TUTOR_OLLAMA_PORT", str(PORT))
    if given in ("", "0"):
        return []
    if not re.fullmatch(r"[0-9]{1,5}", given) or int(given) > 65535:
        return [Finding(f"TUTOR_OLLAMA_PORT is {given!r}", "give a number up to 65535")]
    ours = ("--filter", "label=com.docker.compose.service=ollama", "--filter", f"publish={given}")
    if said("docker", "ps", "--quiet", *ours)[1].strip():
        return []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(given)))
        except OSError as error:
            hint = "end what listens there (an Ollama of your own?), or set TUTOR_OLLAMA_PORT to another"
            return [Finding(f"port {given} of 127.0.0.1 cannot be had: {error.strerror}", hint)]
    return []
