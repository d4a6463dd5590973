"""Requirements of the Compose stack that this host does not meet, all together and before anything is built.

In: a recipe, a build folder, the programs on PATH. Out: faults, one line each. Starts nothing and changes nothing.
What Docker itself lacks is in container_host.py.
"""

import logging
import os
import re
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from tutor.artifacts.layout import BuildFolder
from tutor.artifacts.manifest import MANIFEST
from tutor.errors import HostError, RecipeError
from tutor.machine import capacity, container_host, device, host, run_cost
from tutor.machine.container_host import Daemon, Fault, Project
from tutor.machine.host import dotted, run_program, version
from tutor.machine.memory.estimate import gb
from tutor.machine.memory.shapes import Shape
from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

TOOLKIT_VERSION = (1, 17, 8)
"""Minimum version of the NVIDIA Container Toolkit; older ones let an image escape (CVE-2025-23266)."""

TOOLKIT = "sudo nvidia-ctk runtime configure --runtime=docker"
"""Command that adds the NVIDIA Container Toolkit to Docker."""

ROOTLESS_TOOLKIT = (
    "nvidia-ctk runtime configure --runtime=docker --config=$HOME/.config/docker/daemon.json, "
    "and sudo nvidia-ctk config --set nvidia-container-cli.no-cgroups --in-place"
)
"""Commands that add the NVIDIA Container Toolkit to rootless Docker, from NVIDIA's installation guide."""

IMAGES_GB = 14.0
"""Disk space of the images in GB."""

VIRTUAL = 0.95
"""Share of this machine's memory below which Docker's is that of a virtual machine; both count a little apart."""

OLLAMA_PORT = 11434
"""Default port of Ollama on 127.0.0.1."""


class UnfitError(HostError):
    """This host cannot run the stack; `problems` has one line for each fault."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        count = "one thing is" if len(faults) == 1 else f"{len(faults)} things are"
        super().__init__(f"this host cannot run the stack: {count} missing", "without Docker and GPU: make demo")
        self.problems = tuple(map(str, faults))


def check_host(recipe: Recipe, build: Path, daemon: Daemon, project: Project, *, gpu: bool | None = None) -> bool:
    """Whether the stack of a recipe gets a GPU here. Raises UnfitError with all faults, RecipeError.

    `gpu`: True requires one, False uses none, None uses an available one and requires one for a large base.
    """
    refuse_files_outside(recipe)
    without_gpu = [] if gpu is False else gpu_faults(daemon)
    required = gpu or (gpu is None and is_large(recipe))
    faults = container_host.docker_faults(daemon) or container_host.project_faults(project)
    faults += without_gpu if required else ()
    shape = capacity.find_shape(recipe, build)
    if shape is None:
        log.warning("%s is not known before it is fetched: memory and disk cannot be estimated", recipe.base.source)
    else:
        capacity.refuse_lengths(recipe, shape)
    if shape and not (required and without_gpu):
        with_gpu = gpu is not False and not without_gpu
        faults += memory_faults(recipe, build, shape, gpu=with_gpu)
        faults += [] if with_gpu else docker_memory_faults(recipe, build, shape, daemon)
    faults += disk_faults(recipe, build, shape, daemon, project)
    if daemon.info:
        faults += port_faults(project)
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


def gpu_faults(daemon: Daemon) -> list[Fault]:
    """Faults of the GPU, its driver, and the toolkit that gives containers access to it."""
    faults = []
    code, text, _ = run_program("nvidia-smi", "--list-gpus")
    if code or "GPU " not in text:
        faults.append(
            Fault("no NVIDIA GPU answers (nvidia-smi --list-gpus)", "another recipe runs on the CPU: data/demo.toml")
        )
    for gpu in host.gpus()[:1]:
        try:
            device.refuse_old_driver(gpu, device.PINNED_CUDA)
        except HostError as error:
            faults.append(Fault(error.message, error.hint or ""))
    devices = [str(found) for found in daemon.info.get("DiscoveredDevices") or ()]
    known = "nvidia" in (daemon.info.get("Runtimes") or {}) or any("nvidia.com/gpu" in name for name in devices)
    if not known and shutil.which("nvidia-container-runtime-hook") is None:
        command = ROOTLESS_TOOLKIT if daemon.rootless else TOOLKIT
        hint = f"install nvidia-container-toolkit, run: {command}, restart Docker"
        faults.append(Fault("Docker has no NVIDIA Container Toolkit", hint))
        return faults
    code, text, _ = run_program("nvidia-ctk", "--version")
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
    gpus = host.gpus() if gpu else []
    if gpu and not gpus:
        return []  # nvidia-smi omits a value that is needed here: the trainer checks it
    name = os.environ.get("TUTOR_GPU") or "0"
    chosen = next((found for found in gpus if name in (str(found.index), found.uuid)), None)
    if gpus and chosen is None:
        visible = ", ".join(str(found.index) for found in gpus)
        return [Fault(f"TUTOR_GPU is {name!r}, and the visible GPUs are {visible}", "set TUTOR_GPU to one of them")]
    try:
        capacity.refuse_training(recipe, build, shape, chosen)
    except HostError as error:
        return [Fault(error.message, error.hint or "")]
    return []


def docker_memory_faults(recipe: Recipe, build: Path, shape: Shape, daemon: Daemon) -> list[Fault]:
    """The fault of a training on the CPU that does not fit the virtual machine of Docker, smaller than this one."""
    here = host.memory()
    if is_made(recipe, build, "train") or not daemon.memory or (here and daemon.memory >= VIRTUAL * here.total):
        return []
    need = capacity.forecast_memory(recipe, build, shape, None).certain
    if need <= daemon.memory:
        return []
    return [
        Fault(
            f"this training takes at least {gb(need)} of memory, and Docker's machine has {gb(daemon.memory)}",
            "raise its memory (Docker Desktop: Settings, Resources)",
        )
    ]


def disk_faults(recipe: Recipe, build: Path, shape: Shape | None, daemon: Daemon, project: Project) -> list[Fault]:
    """Faults of disks with too little space for the files still to write; folders on one disk are added up.

    The disk of a virtual machine of Docker cannot be seen from here: what it needs is logged.
    """
    to_do = [name for name in capacity.WEIGHT_STAGES if not is_made(recipe, build, name)]
    sizes = run_cost.disk_sizes(recipe, shape, [*to_do, "publish"]) if shape else {}
    if BuildFolder(build, recipe.name).published().exists():
        sizes.pop("publish", None)
    # The hub's cache and Ollama's models are in volumes of Docker.
    in_docker = sum(sizes.pop(name, 0) for name in ("hub", "publish"))
    images = sorted(set(project.images.values()))
    if not images or run_program("docker", "image", "inspect", *images).code:
        in_docker += round(IMAGES_GB * 1e9)
    needs = [(build, sum(sizes.values()))]
    if daemon.desktop:
        log.warning("the disk of Docker Desktop's machine needs %s for images and models", gb(in_docker))
    else:
        needs.append((Path(daemon.info.get("DockerRootDir") or "/"), in_docker))
    return [
        Fault(f"the disk of {place} has {free / 1e9:.0f} GB free of {need / 1e9:.0f} GB", "free disk space")
        for place, free, need in run_cost.short_disks(needs)
    ]


def is_made(recipe: Recipe, build: Path, stage: str) -> bool:
    """Whether a stage's folder exists; an unfinished folder has no manifest."""
    return (BuildFolder(build, recipe.name).stage(stage) / MANIFEST).exists()


def port_faults(project: Project) -> list[Fault]:
    """The fault of another program on Ollama's published port; the project's own Ollama may use it."""
    given = os.environ.get("TUTOR_OLLAMA_PORT", str(OLLAMA_PORT))
    if given in ("", "0"):
        return []
    if not re.fullmatch(r"[0-9]{1,5}", given) or int(given) > 65535:
        return [Fault(f"TUTOR_OLLAMA_PORT is {given!r}", "give a number up to 65535")]
    shown = ("--format", '{{.Names}}\t{{.Label "com.docker.compose.project"}}')
    found = run_program("docker", "ps", "--filter", f"publish={given}", *shown).text.splitlines()
    names = [name for name, _, owner in (line.partition("\t") for line in found) if owner != project.name]
    if found and not names:
        return []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(given)))
        except OSError as error:
            holder = f"container {names[0]}" if names else host.listener(int(given))
            held = f", held by {holder}" if holder else ""
            end = f"docker stop {names[0]}" if names else "end what listens there (an Ollama of your own?)"
            hint = f"{end}, or set TUTOR_OLLAMA_PORT to another"
            return [Fault(f"port {given} of 127.0.0.1 cannot be used: {error.strerror}{held}", hint)]
    return []
