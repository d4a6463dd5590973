"""Values of Ollama's API without a connection: hosts, versions, parameters, events, error texts.

In: text from the server. Out: plain values, or a ServiceError with the next step. Sends nothing.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from tutor.errors import RecipeError, ServiceError

logger = logging.getLogger(__name__)

DEFAULT_PORT = 11434
"""Ollama's default port."""
CONNECT_SECONDS = 5.0
"""Maximum seconds of a connection's start."""
START_SERVER = "start it (make up, or: ollama serve), or name another with --host or OLLAMA_HOST"
"""Next step of an error without a server."""
MIN_VERSION = (0, 30)
"""Minimum version of Ollama: since then llama-server generates, and a rule chooses the template (docs/facts.md, 1)."""
MEMORY_HINT = "memory may be short: try a smaller ollama.quantization or generate.context; see the server's log"
"""Next step of an error that a lack of memory may cause."""
HINTS = {
    r"model .* not found|not found, try pulling": "publish it: tutor publish; list the models: tutor models",
    r"context (size|length)": "use a shorter prompt, or raise generate.context and publish again",
    r"llama-server|llama runner|system memory|terminated|out of memory|failed to load": MEMORY_HINT,
    r"llama-quantize|GGUF|file size|unknown type|EOF$": "the file may be damaged: tutor status --verify",
    r"digest mismatch": "the file changed while it was sent: publish again",
    r"no space left": "free disk space: a model needs up to three times its size while it is created",
    r"busy|maximum pending": "other requests are being answered: try again later",
}
"""Next steps by a pattern of the server's error text."""
LOOP_ERROR = "aborted: the model repeated one token over and over"
"""Error text of Ollama's limit on repeated tokens."""


class UnreachableError(ServiceError):
    """No server answers at the host."""


class MissingError(ServiceError):
    """The server has no such model, blob or address."""


def normalized_url(host: str | None) -> str:
    """`host`, else OLLAMA_HOST, else this machine, as a URL with its port. Raises RecipeError for an invalid host."""
    given = (host or os.environ.get("OLLAMA_HOST", "")).strip(" \"'") or "127.0.0.1"
    hint = "give it as NAME, NAME:PORT or http://NAME:PORT"
    if "@" in given:
        raise RecipeError("Ollama's host holds a user name, which would appear in logs", hint)
    try:
        parts = urlsplit(given if "://" in given else f"http://{given}")
        # Ollama's port also for http://, where the package would use 80.
        name, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else DEFAULT_PORT)
    except ValueError as error:
        raise RecipeError(f"Ollama's host is {given!r}: {error}", hint) from None
    if (
        parts.scheme not in ("http", "https")
        or not re.fullmatch(r"[A-Za-z0-9_.:-]+", name)
        or parts.query
        or parts.fragment
    ):
        raise RecipeError(f"Ollama's host is {given!r}", hint)
    # A client cannot connect to a wildcard address.
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name, name)  # noqa: S104
    return f"{parts.scheme}://{f'[{name}]' if ':' in name else name}:{port}{parts.path.rstrip('/')}"


def check_version(version: str) -> None:
    """Raise ServiceError for a version that is too old; log a warning for an unknown one."""
    found = re.match(r"v?(\d+)\.(\d+)", version)
    number = (int(found[1]), int(found[2])) if found else (0, 0)
    if number == (0, 0):
        logger.warning("Ollama has version %s (built from source?): accepted as new enough", version)
    elif number < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        raise ServiceError(f"Ollama {version} is too old: {wanted} or newer is needed", "update the server")


def parse_parameters(description: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in a response of /api/show, which has them as Go text; `stop` is a list."""
    found: dict[str, Any] = {}
    for line in str(description.get("parameters") or "").split("\n"):
        name, _, text = line.strip().partition(" ")
        try:
            value = json.loads(text)
        except ValueError:
            value = text.strip()
        if name == "stop":
            found.setdefault(name, []).append(value)
        elif name:
            found[name] = value
    return found


def not_ollama(host: str, why: str) -> ServiceError:
    """The error for a server that is not Ollama."""
    return ServiceError(f"the server at {host} is not Ollama: {why}", "a proxy, or another program? give --host")


def server_error(host: str, error: object, status: int) -> ServiceError:
    """The ServiceError for a server's error text; `status` is the HTTP status, -1 inside a stream."""
    what = error_text(error)
    if what.startswith("<"):
        return not_ollama(host, f"it answers {status} with a web page")
    if 300 <= status < 400 or (status == 404 and "model" not in what):
        return not_ollama(host, f"it answers {status} to a request that Ollama supports ({what[:60] or 'no text'})")
    if "token repeat limit" in what:
        return ServiceError(f"Ollama {LOOP_ERROR}")
    hint = next((hint for pattern, hint in HINTS.items() if re.search(pattern, what)), None)
    number = f" ({status})" if status > 0 else ""
    return (MissingError if status == 404 else ServiceError)(f"Ollama reports{number}: {what or 'nothing'}", hint)


def error_text(error: object) -> str:
    """The message in an error at any depth: llama-server's errors are JSON in a string."""
    while not isinstance(error, str):
        if not isinstance(error, dict) or not error:
            return str(error)[:300]
        error = error.get("message", error.get("error", str(error)))
    with contextlib.suppress(ValueError):
        inner = json.loads(error)
        if isinstance(inner, dict):
            return error_text(inner)
    return error.strip()[:300]


def json_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ollama's ResponseError for one with an error, ValueError for anything else."""
    from ollama import ResponseError

    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text[:60]!r}")
    if "error" in value:
        raise ResponseError(json.dumps(value))
    return value


def split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines separated by newlines alone; httpx would also split at the U+0085 that a model may write."""
    rest = b""
    for chunk in chunks:
        *complete, rest = (rest + chunk).split(b"\n")
        yield from (line for line in complete if line.strip())
    if rest.strip():
        yield rest
