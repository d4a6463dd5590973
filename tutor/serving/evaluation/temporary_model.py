"""A GGUF under a temporary name on an Ollama server, while it is asked.

In: a file, a server. Out: the model's name within a `with` block, which deletes the model at its end, also after an
error or Ctrl-C. A killed process leaves it there: the next one replaces and deletes it. Asks nothing, and checks
nothing of the model: its prompts are rendered here (engines/ollama/engine.py, raw).
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from tutor.engines.ollama.client import Ollama
from tutor.engines.ollama.protocol import MissingError
from tutor.errors import TutorError
from tutor.recipe.ollama_names import canonical

log = logging.getLogger(__name__)

SUFFIX = "-untuned:temporary"
"""End of the name, which no build has: `tutor models` lists tags of the model's own name."""


def temporary_name(owner: str) -> str:
    """Return the name of the untuned base of a model."""
    return f"{owner}{SUFFIX}"


@contextlib.contextmanager
def temporary_model(server: Ollama, owner: str, gguf: Path, sha256: str, context: int) -> Iterator[str]:
    """Put a file on a server, below the name of the model `owner`; yield its name, and delete it at the end.

    The owner is unloaded: two models need twice the memory. Raises ServiceError for faults of the server.
    """
    name, digest = temporary_name(owner), f"sha256:{sha256}"
    log.info("sending %s (%.1f GB) to Ollama for this evaluation", gguf.name, gguf.stat().st_size / 1e9)
    try:
        server.upload_blob(gguf, digest)
        server.create(name, {"files": {gguf.name: digest}, "parameters": {"num_ctx": context}})
        for loaded in server.loaded():
            if canonical(loaded)[0] == canonical(owner)[0]:
                server.unload(loaded)
        yield name
    finally:
        _delete(server, name)


def _delete(server: Ollama, name: str) -> None:
    """Free a model's memory and remove it; a server that fails now hides no earlier error."""
    try:
        server.unload(name)
        server.delete(name)
        log.info("deleted %s from Ollama", name)
    except MissingError:
        log.warning("%s was not complete; its file stays on the server until the next evaluation or start of it", name)
    except TutorError as error:
        log.warning("%s is still on the server: %s; remove it: ollama rm %s", name, error, name)
