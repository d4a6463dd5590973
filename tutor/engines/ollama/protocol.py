"""Values of Ollama's API without a connection: hosts, versions, parameters, events, error texts.

In: text from the server. Out: plain values, or a ServiceError with the next step. Sends nothing.
"""

import contextlib
import json
import logging
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic_core import ValidationError, from_json

from tutor.errors import ServiceError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
"""Maximum seconds of a connection's start."""
HTTP_PORT = 80
"""Port of http:// without a port."""
START_SERVER = "start it (make up, or: ollama serve), or name another with --host or OLLAMA_HOST"
"""Next step of an error without a server."""
SEE_LOG = "see its log for the reason"
"""Next step of an error inside the server."""
MAX_LINE_BYTES = 1 << 20
"""Maximum bytes of an event; one token with its 20 candidates has 3 kB."""
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
    r"HTTP request to an HTTPS server": "the server has TLS: give its address as https://NAME:PORT",
    r"busy|maximum pending": "other requests are being answered: try again later",
}
"""Next steps by a pattern of the server's error text."""
LOOP_ERROR = "aborted: the model repeated one token over and over"
"""Error text of Ollama's limit on repeated tokens."""


class UnreachableError(ServiceError):
    """The host refuses connections to the port: no server is there."""


class MissingError(ServiceError):
    """The server has no such model, blob or address."""


def connection_error(url: str, error: object) -> ServiceError:
    """The error for a failed connection: UnreachableError for a refused one alone, else one that names the cause."""
    address = urlsplit(url)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, ConnectionRefusedError):
        hint = "http:// without a port is port 80, Ollama's own is 11434; " if address.port == HTTP_PORT else ""
        return UnreachableError(f"no Ollama at {url} ({reason})", hint + START_SERVER)
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = "name its CA in SSL_CERT_FILE, and the server as its certificate does"
        return ServiceError(f"TLS to {url} fails: its certificate is not trusted ({error.verify_message})", hint)
    if isinstance(error, ssl.SSLError):
        hint = f"a server without TLS has the address http://{url.partition('://')[2]}"
        return ServiceError(f"TLS to {url} fails ({error.reason or reason})", hint)
    if isinstance(error, socket.gaierror):
        return ServiceError(
            f"Ollama's host {address.hostname!r} cannot be found ({reason})", "check the name and the network"
        )
    hint = "check the host and the network" + ("; has the server TLS?" if address.scheme == "https" else "")
    return ServiceError(f"no connection to Ollama at {url} ({reason})", hint)


def check_version(version: str, why: str = "") -> None:
    """Raise ServiceError for a version that is too old; log a warning for an unknown one."""
    found = re.match(r"v?(\d{1,9})\.(\d{1,9})", version)
    number = (int(found[1]), int(found[2])) if found else (0, 0)
    if number == (0, 0):
        logger.warning("Ollama has version %s (built from source?): accepted as new enough", version)
    elif number < MIN_VERSION:
        wanted = ".".join(map(str, MIN_VERSION))
        raise ServiceError(f"Ollama {version} is too old: {wanted} or newer is needed{why}", "update the server")


def parse_parameters(description: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters in a response of /api/show, which has them as Go text; `stop` is a list."""
    found: dict[str, Any] = {}
    for line in str(description.get("parameters") or "").split("\n"):
        name, _, text = line.strip().partition(" ")
        try:
            value = from_json(text)
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


def wrong_field(host: str, endpoint: str, error: ValidationError) -> ServiceError:
    """The error for an answer that lacks a field, or has one of another type."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"]))
    hint = "update the server; a proxy, or another program? give --host"
    return ServiceError(f"the answer of Ollama at {host} to {endpoint} has a wrong {field}: {first['msg']}", hint)


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
        inner = from_json(error.encode("utf-8", "replace"))  # the package's parser lets lone surrogates through
        if isinstance(inner, dict):
            return error_text(inner)
    return error.strip()[:300]


def json_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ollama's ResponseError for one with an error, ValueError for anything else."""
    from ollama import ResponseError

    value = from_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text[:60]!r}")
    if "error" in value:
        raise ResponseError(json.dumps(value))
    return value


def split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines separated by newlines alone; httpx would also split at the U+0085 that a model may write.

    Raises ValueError for a line of more than MAX_LINE_BYTES.
    """
    rest = bytearray()
    for chunk in chunks:
        rest += chunk
        if b"\n" in chunk:  # the rest before it was searched already
            *complete, rest = rest.split(b"\n")
            yield from (bytes(line) for line in complete if line.strip())
        if len(rest) > MAX_LINE_BYTES:
            raise ValueError(f"a line has more than {MAX_LINE_BYTES} bytes")
    if rest.strip():
        yield bytes(rest)
