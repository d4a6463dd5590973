"""Whether a server uses the GPU of its host.

In: a server, whether this host has a GPU. Out: a line for the user where a model is not, or not all, on the GPU: a
container loses its GPUs after `systemctl daemon-reload` or a suspend, and Ollama then answers from the CPU. Restarts
nothing.
"""

from tutor.engines.ollama.address import is_loopback
from tutor.engines.ollama.client import Ollama
from tutor.recipe.ollama_names import canonical

REMEDY = (
    "restart Ollama (docker restart CONTAINER, or systemctl restart ollama): it loses the GPU after a suspend or "
    "systemctl daemon-reload; where the GPU's memory is too small, a smaller ollama.quantization helps"
)
"""Next step where a model is not on the GPU."""


def gpu_share(server: Ollama, model: str) -> float | None:
    """The share of a model that is on a GPU; None when it is not in memory under this name."""
    return {canonical(name): share for name, share in server.loaded().items()}.get(canonical(model))


def gpu_notice(server: Ollama, *, host_has_gpu: bool, model: str | None = None) -> str | None:
    """One line when less than all of a model is on a GPU though the host has one; None otherwise.

    Loads `model` if it is not in memory. Without one, or where its file is in memory under another name, all models in
    memory count. A server on another machine is not asked: this host's GPU is not its own.
    """
    if not host_has_gpu or not is_loopback(server.host):
        return None
    shares = server.loaded()
    if model is not None:
        if gpu_share(server, model) is None:
            server.load(model)
            shares = server.loaded()
        shares = {name: share for name, share in shares.items() if canonical(name) == canonical(model)} or shares
    less = [f"{share:.0%} of {name}" for name, share in shares.items() if share < 1]
    if not less:
        return None
    return f"this machine has a GPU, but Ollama has only {', '.join(less)} on it; {REMEDY}"
