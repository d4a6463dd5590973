"""State of an Ollama server: its address, its version, and whether it uses the GPU of this machine.

In: a server or OLLAMA_HOST, whether this machine has a GPU. Out: lines for the user, each with the next step. A
container loses its GPUs after `systemctl daemon-reload` or a suspend, and Ollama then answers from the CPU. Restarts
nothing.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Literal

from tutor.engines.ollama.address import is_loopback, normalized_url
from tutor.engines.ollama.client import Ollama, connect
from tutor.engines.ollama.protocol import UnreachableError, check_version
from tutor.errors import TutorError
from tutor.recipe.ollama_names import canonical

State = tuple[str, Literal["ok", "warning", "missing"], str, str]
"""What is checked, its state, what was found, and the next step."""

REMEDY = (
    "restart Ollama (docker restart CONTAINER, or systemctl restart ollama): it loses the GPU after a suspend or "
    "systemctl daemon-reload; where the GPU's memory is too small, a smaller ollama.quantization helps"
)
"""Next step where a model is not on the GPU."""


def server_states(seconds: float, *, host_has_gpu: bool) -> Iterator[State]:
    """Yield how OLLAMA_HOST is understood, and the state of that server, which has `seconds` to answer."""
    given = os.environ.get("OLLAMA_HOST", "")
    try:
        url = normalized_url(None)
        yield "OLLAMA_HOST", "ok", f"{given!r} is {url}" if given else f"not set: {url}", ""
        with connect(None, silent=seconds) as server:
            version = server.version(seconds)
            source = "built from source? assumed to be new enough" if version.startswith("0.0.0") else ""
            if not source:
                check_version(version)
            yield "Ollama", "warning" if source else "ok", f"{version} at {url}", source
            if fault := gpu_fault(server, host_has_gpu=host_has_gpu):
                yield "GPU of Ollama", "warning", fault, REMEDY
    except UnreachableError as error:
        program = "installed, " if shutil.which("ollama") else ""
        yield "Ollama", "missing", f"{program}{error.message}", error.hint or ""
    except TutorError as error:
        yield "Ollama", "missing", error.message, error.hint or ""


def absence(host: str | None, wait: float) -> str | None:
    """Why no server is at a host after `wait` seconds; None when one is. Raises ServiceError for any other fault."""
    try:
        with connect(host) as server:
            server.wait_ready(wait)
    except UnreachableError as error:
        return str(error.message)
    return None


def gpu_share(server: Ollama, model: str) -> float | None:
    """The share of a model that is on a GPU; None when it is not in memory under this name."""
    return next(iter(_named(server.loaded(), model).values()), None)


def _named(shares: Mapping[str, float], model: str) -> dict[str, float]:
    """The shares of a model, by whatever spelling of its name."""
    return {name: share for name, share in shares.items() if canonical(name) == canonical(model)}


def gpu_fault(server: Ollama, *, host_has_gpu: bool, model: str | None = None) -> str | None:
    """What is not on a GPU though this machine has one; None when nothing is missing there.

    Loads `model` if it is not in memory. Without one, or where its file is in memory under another name, all models in
    memory count. A server on another machine is not asked: this machine's GPU is not its own.
    """
    if not host_has_gpu or not is_loopback(server.host):
        return None
    shares = server.loaded()
    if model is not None:
        if _named(shares, model) == {}:
            server.load(model)
            shares = server.loaded()
        shares = _named(shares, model) or shares
    less = [f"{share:.0%} of {name}" for name, share in shares.items() if share < 1]
    return f"this machine has a GPU, but Ollama has only {', '.join(less)} on it" if less else None


def gpu_notice(server: Ollama, *, host_has_gpu: bool, model: str) -> str | None:
    """One line with the remedy when a model is not, or not all, on the GPU of this machine; None otherwise."""
    fault = gpu_fault(server, host_has_gpu=host_has_gpu, model=model)
    return f"{fault}; {REMEDY}" if fault else None
