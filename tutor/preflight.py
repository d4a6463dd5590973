"""What this host lacks for the Compose stack, all at once and before anything is built.

In: a recipe, a build folder, the programs on PATH. Out: findings, a line each. Starts nothing and changes nothing.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutor.errors import HostError, RecipeError
from tutor.recipe import Recipe

COMPOSE = (2, 24)
TOOLKIT = (1, 17, 8)  # older ones let a hostile image out of its container (CVE-2025-23266)
IMAGES = ("tutor-trainer", "tutor-converter", "tutor-client", "tutor-ollama")
IMAGES_GB = 14.0
LARGE_GB, SMALL_GB = (52.0, 35.0), (2.0, 1.0)
"""In the build folder and in Docker's own (the hub's cache, Ollama's copies): an 8B model, a toy."""
ASKING = 60  # seconds until a program has answered
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
    findings += disk_faults(recipe, build, info)
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


def disk_faults(recipe: Recipe, build: Path, info: Mapping[str, Any]) -> list[Finding]:
    """Disks without room for what is not there yet; two folders on one disk need the sum."""
    in_build, in_docker = LARGE_GB if is_large(recipe) else SMALL_GB
    if (build / recipe.name / "gguf" / "manifest.json").exists():
        in_build, in_docker = 0.0, SMALL_GB[1]
    if not info or said("docker", "image", "inspect", *IMAGES)[0]:
        in_docker += IMAGES_GB
    needs: dict[int, tuple[Path, float]] = {}
    for folder, gigabytes in ((build, in_build), (Path(info.get("DockerRootDir") or "/"), in_docker)):
        place = next((path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()), Path("/"))
        device = place.stat().st_dev
        needs[device] = (needs[device][0] if device in needs else place, needs.get(device, (place, 0.0))[1] + gigabytes)
    findings = []
    for place, gigabytes in needs.values():
        free = shutil.disk_usage(place).free / 1e9
        if free < gigabytes:
            findings.append(Finding(f"the disk of {place} has {free:.0f} GB free of {gigabytes:.0f} GB", "make room"))
    return findings


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


def version(text: str) -> tuple[int, ...]:
    """The first dotted number of a text; (0,) without one."""
    found = re.search(r"\d+(\.\d+)+", text)
    return tuple(map(int, found[0].split("."))) if found else (0,)


def said(*command: str) -> tuple[int, str]:
    """A program's exit code and all that it prints; 127 when it is not there."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=ASKING,
            check=False,
        )
    except FileNotFoundError:
        return 127, ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return 126, str(error)
    return done.returncode, done.stdout
