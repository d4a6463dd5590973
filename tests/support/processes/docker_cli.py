"""Docker for the container tests.

In: the `docker` on PATH. Out: what its commands print, and whether an image can be used. Does not start services:
pytest-docker does.
"""

import json
import subprocess
from typing import Any

CANARY = "hf_canary0123456789"
"""Token in the environment while the images are built; it must be in none of them."""


def docker(*arguments: str, check: bool = True) -> str:
    """Run `docker` with arguments; return its stdout. Fails where the command does, without `check` it does not."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"docker {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def inspected(kind: str, name: str) -> Any:
    """Return the description of an image or a container."""
    return json.loads(docker(kind, "inspect", name))[0]


def is_available(image: str) -> bool:
    """Return whether an image is on this machine, or can be pulled."""
    commands = (["docker", "image", "inspect", image], ["docker", "pull", "--quiet", image])
    return any(subprocess.run(each, capture_output=True, check=False).returncode == 0 for each in commands)
