"""The Docker of this host: whether it answers, which kind it is, and which Compose project is this checkout's.

In: `docker` on PATH, the checkout's compose.yaml. Out: a `Daemon`, a `Project`, and faults with the next step, one line
each (docs/facts.md, 14). Reads only docker's stdout: warnings on stderr are no answer. Starts and changes nothing.
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tutor.machine.host import dotted, run_program, version

CHECKOUT = Path(__file__).resolve().parents[2]
"""Folder of compose.yaml."""
DOCKER_VERSION = (23, 0)
"""Minimum version of Docker Engine: the first one whose default builder is BuildKit."""
COMPOSE_VERSION = (2, 24)
"""Minimum version of Docker Compose."""
FIRST_PROJECT = "tutor"
"""Name of the Compose project of every checkout before the name was that of its folder."""
LOCAL = ("unix", "fd", "npipe")
"""Schemes of addresses of a daemon on this machine."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Host names of a daemon on this machine that listens on TCP."""
MESSAGE_LENGTH = 200
"""Maximum characters of a message of docker that a fault quotes."""


@dataclass(frozen=True)
class Fault:
    """One requirement that is not met, and the next step."""

    what: str
    hint: str

    def __str__(self) -> str:
        return f"{self.what}; {self.hint}"


@dataclass(frozen=True)
class Daemon:
    """The output of `docker info`; empty, with docker's message, where no daemon answers."""

    info: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def rootless(self) -> bool:
        """Whether the daemon runs as its user: uid 0 of a container is that user, any other uid a subordinate one."""
        return self._has("rootless")

    @property
    def remapped(self) -> bool:
        """Whether the uids of containers are subordinate ones (userns-remap)."""
        return self._has("userns")

    @property
    def selinux(self) -> bool:
        """Whether SELinux confines containers: they cannot read files of the host without its label."""
        return self._has("selinux")

    @property
    def desktop(self) -> bool:
        """Whether the daemon runs in the virtual machine of Docker Desktop."""
        return self.info.get("OperatingSystem") == "Docker Desktop"

    @property
    def memory(self) -> int:
        """Memory in bytes of the machine that the daemon runs on; 0 where unknown."""
        found = self.info.get("MemTotal")
        return found if isinstance(found, int) else 0

    def _has(self, option: str) -> bool:
        options = self.info.get("SecurityOptions") or ()
        return any(str(each).split(",")[0] == f"name={option}" for each in options)


def daemon() -> Daemon:
    """Return the daemon that answers `docker info`, or the reason why none does."""
    done = run_program("docker", "info", "--format", "{{json .}}")
    info: Any = None
    with contextlib.suppress(ValueError):
        info = json.loads(done.text)
    if not isinstance(info, dict):
        info = {}
    errors = [str(error) for error in info.get("ServerErrors") or ()]
    if done.code == 0 and info and not errors:
        return Daemon(info)
    return Daemon(error=_last_line("\n".join([*errors, done.error])) or f"docker info ended with exit code {done.code}")


def docker_faults(found: Daemon) -> list[Fault]:
    """Return the faults of Docker, its daemon and Compose."""
    if shutil.which("docker") is None:
        return [Fault("Docker is not installed (no `docker` on PATH)", "install Docker Engine with Compose")]
    return [*_daemon_faults(found), *_compose_faults()]


def _daemon_faults(found: Daemon) -> list[Fault]:
    place = run_program("docker", "context", "inspect", "--format", "{{.Endpoints.docker.Host}}").text.strip()
    address = urlsplit(place)
    fault = None
    if place and address.scheme not in LOCAL and address.hostname not in LOOPBACK:
        hint = "use the local one: docker context use default, and unset DOCKER_HOST and DOCKER_CONTEXT"
        fault = Fault(f"Docker's daemon is on another machine ({place}) and cannot mount folders of this one", hint)
    elif not found.info and "permission denied" in found.error.lower():
        fault = Fault("this user may not use Docker", "add it to the group docker, then log in again")
    elif not found.info:
        fault = Fault(f"the Docker daemon does not answer ({found.error})", _start_hint(place))
    elif _is_podman(found):
        hint = "install Docker Engine, or without containers: make demo"
        fault = Fault("`docker` is Podman, which starts containers without the GPU that they reserve", hint)
    elif found.rootless and os.getuid() == 0:
        fault = Fault("Docker is rootless and belongs to another user than root", "run this as that user")
    elif (0,) < version(engine := str(found.info.get("ServerVersion", ""))) < DOCKER_VERSION:
        fault = Fault(f"Docker Engine is {engine}", f"update it to {dotted(DOCKER_VERSION)} or newer")
    return [fault] if fault else []


def _start_hint(place: str) -> str:
    """Return how to start the daemon of an address."""
    if sys.platform == "darwin" or "/desktop/" in place:
        return "start Docker Desktop"
    if "/run/user/" in place:
        return "start it: systemctl --user start docker"
    return "start it: sudo systemctl start docker"


def _is_podman(found: Daemon) -> bool:
    """Whether Podman answers: its own `docker`, whose info has other keys, or its socket, by the server's parts."""
    if "ServerVersion" not in found.info and "host" in found.info:
        return True
    return "Podman" in run_program("docker", "version", "--format", "{{json .Server}}").text


def _compose_faults() -> list[Fault]:
    done, needed = run_program("docker", "compose", "version", "--short"), dotted(COMPOSE_VERSION)
    if done.code:
        return [Fault("Docker has no Compose plugin", f"install docker-compose-plugin {needed} or newer")]
    if version(done.text) < COMPOSE_VERSION:
        return [Fault(f"Docker Compose is {done.text.strip()}", f"update it to {needed} or newer")]
    return []


@dataclass(frozen=True)
class Project:
    """The Compose project of this checkout: its name, its images by service, the images that they are built from."""

    name: str = ""
    images: Mapping[str, str] = field(default_factory=dict)  # service -> image
    bases: Mapping[str, str] = field(default_factory=dict)  # image -> image that it is built from
    error: str = ""  # Compose's message where it refuses the file or the name


def project() -> Project:
    """Return the project as Compose understands it: COMPOSE_PROJECT_NAME, else the name of the checkout's folder."""
    file = str(CHECKOUT / "compose.yaml")
    done = run_program("docker", "compose", "--file", file, "--profile", "*", "config", "--format", "json")
    try:
        found = json.loads(done.text)
        services: dict[str, Any] = found["services"]
        images = {name: str(each["image"]) for name, each in services.items()}
        built = {images[name]: each["build"]["args"] for name, each in services.items() if "build" in each}
        bases = {image: str(next(iter(args.values()))) for image, args in built.items()}
        return Project(str(found["name"]), images, bases)
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return Project(error=_last_line(done.error) or f"docker compose config ended with exit code {done.code}")


def project_faults(found: Project) -> list[Fault]:
    """Return the fault of a project that Compose refuses, or whose containers another checkout started."""
    if not found.name:
        hint = "a name of small letters, digits and hyphens for the project: COMPOSE_PROJECT_NAME"
        return [Fault(f"Compose refuses {CHECKOUT / 'compose.yaml'}: {found.error}", hint)]
    label = "com.docker.compose.project"
    shown = ("--format", f'{{{{.Label "{label}.working_dir"}}}}')
    done = run_program("docker", "ps", "--all", "--filter", f"label={label}={found.name}", *shown)
    for line in done.text.splitlines():
        # A checkout that was moved or removed no longer uses its containers.
        if line and Path(line) != CHECKOUT and (Path(line) / "compose.yaml").is_file():
            hint = f"run `make down` in {line}, or give this checkout a name of its own: COMPOSE_PROJECT_NAME"
            return [Fault(f"the containers of the Compose project {found.name} belong to the checkout {line}", hint)]
    return []


def first_volumes(found: Project) -> list[str]:
    """Return the volumes that this checkout used before projects had the names of folders; none once it has its own."""

    def volumes(name: str) -> list[str]:
        label = f"label=com.docker.compose.project={name}"
        return run_program("docker", "volume", "ls", "--quiet", "--filter", label).text.split()

    return [] if found.name == FIRST_PROJECT or volumes(found.name) else volumes(FIRST_PROJECT)


def identified(name: str) -> str:
    """Return an image's name with its digest in a registry, else with its id on this host, else the name alone."""
    if "@" in name:
        return name
    done = run_program("docker", "image", "inspect", "--format", "{{json .RepoDigests}} {{.Id}}", name)
    digests, _, own = done.text.strip().rpartition(" ")
    with contextlib.suppress(ValueError):
        found = json.loads(digests) if done.code == 0 else None
        if found:
            return f"{name}@{str(found[0]).partition('@')[2]}"
    return f"{name}, image id {own}" if done.code == 0 and own else name


def tagged_images(found: Project) -> str:
    """Return a line about the images that only a tag names, and what they are here; "" where each has its digest."""
    tagged = [name for name in dict.fromkeys(found.bases.values()) if "@" not in name]
    shown = [here if (here := identified(name)) != name else f"{name}, not pulled yet" for name in tagged]
    return f"named by tag only: {'; '.join(shown)}" if shown else ""


def _last_line(text: str) -> str:
    """Return the last line of a message that is not empty, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:MESSAGE_LENGTH] if lines else ""
