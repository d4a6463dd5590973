"""Requirements of the Compose stack that this host does not meet, all together and before anything is built.

In: a recipe, a build folder, the programs on PATH. Out: faults, one line each. Starts nothing and changes nothing.
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
from tutor.machine import capacity, device, host, run_cost
from tutor.machine.host import dotted, run_program, version
from tutor.machine.memory.shapes import Shape
from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

COMPOSE_VERSION = (2, 24)
"""Minimum version of Docker Compose."""

TOOLKIT_VERSION = (1, 17, 8)
"""Minimum version of the NVIDIA Container Toolkit; older ones let an image escape (CVE-2025-23266)."""

IMAGES = ("tutor-trainer", "tutor-converter", "tutor-client", "tutor-ollama")
"""Images that the stack builds."""

IMAGES_GB = 14.0
"""Disk space of the images in GB."""

OLLAMA_PORT = 11434
"""Default port of Ollama on 127.0.0.1."""


@dataclass(frozen=True)
class Fault:
    """One requirement that is not met, and the next step."""

    what: str
    hint: str

    def __str__(self) -> str:
        return f"{self.what}; {self.hint}"


class UnfitError(HostError):
    """This host cannot run the stack; `problems` has one line for each fault."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        count = "one thing is" if len(faults) == 1 else f"{len(faults)} things are"
        super().__init__(f"this host cannot run the stack: {count} missing", "without Docker and GPU: make demo")
        self.problems = tuple(map(str, faults))


def check_host(recipe: Recipe, build: Path, *, gpu: bool | None = None) -> bool:
    """Whether the stack of a recipe gets a GPU here. Raises UnfitError with all faults, RecipeError.

    `gpu`: True requires one, False uses none, None uses an available one and requires one for a large base.
    """
    refuse_files_outside(recipe)
    info = daemon()
    without_gpu = [] if gpu is False else gpu_faults(info)
    required = gpu or (gpu is None and is_large(recipe))
    faults = [*docker_faults(info), *(without_gpu if required else ())]
    shape = capacity.find_shape(recipe, build)
    if shape is None:
        log.warning("%s is not known before it is fetched: memory and disk cannot be estimated", recipe.base.source)
    else:
        capacity.refuse_lengths(recipe, shape)
    if shape and not (required and without_gpu):
        faults += memory_faults(recipe, build, shape, gpu=gpu is not False and not without_gpu)
    faults += disk_faults(recipe, build, shape, info)
    if info:
        faults += port_faults()
    if faults:
        raise UnfitError(faults)
    return gpu is not False and not without_gpu


def is_large(recipe: Recipe) -> bool:
    """Whether the base may have billions of parameters, too many for a CPU: a base from the hub or a folder."""
    return recipe.base.source.startswith(("hub:", "path:"))


def refuse_files_outside(recipe: Recipe) -> None:
    """Raise RecipeError for files outside the recipe's folder: the containers see no other files of the host."""
    folder = recipe.path.parent
    named = {"data.train": recipe.data.train, "data.eval": recipe.data.eval}
    # An empty value resolves to the folder itself.
    named |= {f"evaluate.{name}": value for name, value in recipe.evaluate.model_dump().items()}
    if recipe.base.source.startswith("path:"):
        named["base.source"] = recipe.base.source.removeprefix("path:")
    outside = [
        f"{name} is {value}" for name, value in named.items() if not recipe.resolve(value).is_relative_to(folder)
    ]
    if outside:
        raise RecipeError(
            f"{recipe.path}: {', '.join(outside)}, and the containers see only {folder}", "move it into that folder"
        )


def daemon() -> dict[str, Any]:
    """The output of `docker info`; empty when there is no daemon, or it does not answer."""
    code, text = run_program("docker", "info", "--format", "{{json .}}")
    with contextlib.suppress(ValueError):
        info = json.loads(text)
        if code == 0 and isinstance(info, dict) and not info.get("ServerErrors"):
            return info
    return {}


def docker_faults(info: Mapping[str, Any]) -> list[Fault]:
    """Faults of Docker, its daemon and Compose."""
    if shutil.which("docker") is None:
        return [Fault("Docker is not installed (no `docker` on PATH)", "install Docker Engine with Compose")]
    faults = []
    if not info:
        _, text = run_program("docker", "info")
        denied = "permission denied" in text.lower()
        faults.append(
            Fault("this user may not use Docker", "add it to the group docker, then log in again")
            if denied
            else Fault("the Docker daemon does not answer", "start it: sudo systemctl start docker")
        )
    code, text = run_program("docker", "compose", "version", "--short")
    needed = dotted(COMPOSE_VERSION)
    if code:
        faults.append(Fault("Docker has no Compose plugin", f"install docker-compose-plugin {needed} or newer"))
    elif version(text) < COMPOSE_VERSION:
        faults.append(Fault(f"Docker Compose is {text.strip()}", f"update it to {needed} or newer"))
    return faults


def gpu_faults(info: Mapping[str, Any]) -> list[Fault]:
    """Faults of the GPU, its driver, and the toolkit that gives containers access to it."""
    faults = []
    code, text = run_program("nvidia-smi", "--list-gpus")
    if code or "GPU " not in text:
        faults.append(
            Fault("no NVIDIA GPU answers (nvidia-smi --list-gpus)", "another recipe runs on the CPU: data/demo.toml")
        )
    for gpu in host.gpus()[:1]:
        try:
            device.refuse_old_driver(gpu, device.PINNED_CUDA)
        except HostError as error:
            faults.append(Fault(error.message, error.hint or ""))
    devices = [str(found) for found in info.get("DiscoveredDevices") or ()]
    known = "nvidia" in (info.get("Runtimes") or {}) or any("nvidia.com/gpu" in name for name in devices)
    if not known and shutil.which("nvidia-container-runtime-hook") is None:
        faults.append(
            Fault(
                "Docker has no NVIDIA Container Toolkit",
                "install nvidia-container-toolkit, run: sudo nvidia-ctk runtime configure --runtime=docker, "
                "restart Docker",
            )
        )
        return faults
    code, text = run_program("nvidia-ctk", "--version")
    if code == 0 and (0,) < version(text) < TOOLKIT_VERSION:
        oldest = dotted(TOOLKIT_VERSION)
        faults.append(
            Fault(f"the NVIDIA Container Toolkit is older than {oldest}, which has known escapes", "update it")
        )
    return faults


def memory_faults(recipe: Recipe, build: Path, shape: Shape, *, gpu: bool) -> list[Fault]:
    """The fault of a training still to run that fits neither the GPU nor, without one, main memory."""
    if is_made(recipe, build, "train"):
        return []
    gpus = {str(found.index): found for found in host.gpus()} if gpu else {}
    if gpu and not gpus:
        return []  # nvidia-smi omits a value that is needed here: the trainer checks it
    try:
        capacity.refuse_training(recipe, build, shape, gpus.get(os.environ.get("TUTOR_GPU", "0")))
    except HostError as error:
        return [Fault(error.message, error.hint or "")]
    return []


def disk_faults(recipe: Recipe, build: Path, shape: Shape | None, info: Mapping[str, Any]) -> list[Fault]:
    """Faults of disks with too little space for the files still to write; folders on one disk are added up."""
    to_do = [name for name in capacity.WEIGHT_STAGES if not is_made(recipe, build, name)]
    sizes = run_cost.disk_sizes(recipe, shape, [*to_do, "publish"]) if shape else {}
    if BuildFolder(build, recipe.name).published().exists():
        sizes.pop("publish", None)
    # The hub's cache and Ollama's models are in volumes of Docker.
    in_docker = sum(sizes.pop(name, 0) for name in ("hub", "publish"))
    if not info or run_program("docker", "image", "inspect", *IMAGES)[0]:
        in_docker += round(IMAGES_GB * 1e9)
    needs = [(build, sum(sizes.values())), (Path(info.get("DockerRootDir") or "/"), in_docker)]
    return [
        Fault(f"the disk of {place} has {free / 1e9:.0f} GB free of {need / 1e9:.0f} GB", "free disk space")
        for place, free, need in run_cost.short_disks(needs)
    ]


def is_made(recipe: Recipe, build: Path, stage: str) -> bool:
    """Whether a stage's folder exists; an unfinished folder has no manifest."""
    return (BuildFolder(build, recipe.name).stage(stage) / MANIFEST).exists()


def port_faults() -> list[Fault]:
    """The fault of another program on Ollama's published port; the stack's own Ollama may use it."""
    given = os.environ.get("TUTOR_OLLAMA_PORT", str(OLLAMA_PORT))
    if given in ("", "0"):
        return []
    if not re.fullmatch(r"[0-9]{1,5}", given) or int(given) > 65535:
        return [Fault(f"TUTOR_OLLAMA_PORT is {given!r}", "give a number up to 65535")]
    ours = ("--filter", "label=com.docker.compose.service=ollama", "--filter", f"publish={given}")
    if run_program("docker", "ps", "--quiet", *ours)[1].strip():
        return []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(given)))
        except OSError as error:
            hint = "end what listens there (an Ollama of your own?), or set TUTOR_OLLAMA_PORT to another"
            return [Fault(f"port {given} of 127.0.0.1 cannot be used: {error.strerror}", hint)]
    return []
