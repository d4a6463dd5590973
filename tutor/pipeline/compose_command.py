"""The command line and environment of `docker compose` for the stack of one recipe, on the kind of Docker that is here.

In: a recipe's file, a build folder, the daemon. Out: command lines, variables, prepared folders, the hub's token as a
file. Runs no service (compose.py).
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tutor.artifacts.layout import BuildFolder
from tutor.errors import HostError
from tutor.machine.container_host import CHECKOUT, Daemon

UID = 10001
"""Uid and gid of the images. Services use them when the caller is root, which no container may be."""


@dataclass(frozen=True)
class Stack:
    """The containers of a recipe: the host folders that they see, and whether they use its GPU."""

    recipe: Path
    build: Path
    gpu: bool = False
    daemon: Daemon = field(default_factory=Daemon)
    images: Mapping[str, str] = field(default_factory=dict)  # of each service, with its digest or id

    @property
    def folder(self) -> Path:
        """The folder that the services write."""
        return BuildFolder(self.build, self.recipe.stem).path

    @property
    def logs(self) -> Path:
        """The folder of the services' logs."""
        return BuildFolder(self.build, self.recipe.stem).service_logs

    def command(self, *arguments: str) -> list[str]:
        """Return a command line of `docker compose`. Raises HostError outside a checkout."""
        if not (CHECKOUT / "compose.yaml").is_file():
            raise HostError(f"{CHECKOUT} has no compose.yaml", "the stack needs a checkout: git clone, then make all")
        overlays = {"gpu": self.gpu, "selinux": self.daemon.selinux}
        files = [CHECKOUT / "docker" / f"compose.{name}.yaml" for name, used in overlays.items() if used]
        named = [word for path in (CHECKOUT / "compose.yaml", *files) for word in ("--file", str(path))]
        return ["docker", "compose", *named, *arguments]

    def environment(self, token: Path | None = None) -> dict[str, str]:
        """Return the variables that compose.yaml reads; the hub's token is in a file, never in a variable."""
        uid, gid = owner(self.daemon)
        values = {
            "TUTOR_UID": str(uid),
            "TUTOR_GID": str(gid),
            "TUTOR_DATA": str(self.recipe.parent),
            "TUTOR_BUILD": str(self.build.resolve()),
            "TUTOR_RECIPE": f"data/{self.recipe.name}",
            **({"TUTOR_USERNS": "host"} if self.daemon.remapped else {}),
            **({"HF_TOKEN_FILE": str(token)} if token else {}),
        }
        return {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | values


def owner(daemon: Daemon) -> tuple[int, int]:
    """Return the uid and gid of the services: those with which they are the caller; for root those of the images."""
    if daemon.rootless:
        return 0, 0  # in the daemon's user namespace: the caller outside
    return (os.getuid(), os.getgid()) if os.getuid() else (UID, UID)


def prepare(stack: Stack) -> None:
    """Make the folders for the uid of the services. Raises HostError when they cannot be made."""
    try:
        stack.logs.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:
            for path in (stack.folder, *stack.folder.rglob("*")):
                os.chown(path, *owner(stack.daemon), follow_symlinks=False)
    except OSError as error:
        raise HostError(f"cannot prepare {stack.folder}: {error.strerror}", "give another --build") from None


@contextlib.contextmanager
def hub_token(daemon: Daemon) -> Iterator[Path | None]:
    """HF_TOKEN as a file that only the services' user can read, removed at the end; None when it is not set."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="tutor-") as folder:
        path = Path(folder) / "hf_token"
        path.touch(0o600)
        path.write_text(token, "utf-8")
        if os.getuid() == 0:
            os.chown(path, *owner(daemon))
        yield path
