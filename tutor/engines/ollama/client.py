"""Client for Ollama's HTTP API: models, blobs, streaming, error mapping.

In: a host. Out: the server's models and answers, or a ServiceError with the reason. Calls the `ollama` package, and
httpx (its dependency) for what the package lacks: progress and HEAD of a blob, `parser`, `truncate`,
`_debug_render_only`, /api/version, the system text of /api/show.
Does not decide what is published (serving/builds.py) and holds no conversation (engine.py).
"""

import contextlib
import logging
import os
import ssl
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import httpx
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from tutor.engines.ollama.protocol import (
    CONNECT_SECONDS,
    START_SERVER,
    MissingError,
    UnreachableError,
    json_object,
    normalized_url,
    not_ollama,
    server_error,
    split_lines,
)
from tutor.errors import ArtifactError, RecipeError, ServiceError
from tutor.prompt import Message

if TYPE_CHECKING:
    import ollama

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

SILENT_SECONDS = 900.0
"""Maximum seconds without a byte: the server may load a model, answer other requests first, or read a long prompt."""
QUICK_SECONDS = 60.0
"""Maximum seconds without a byte for requests that load no model."""
BUSY_STATUSES = (429, 503)
"""HTTP status codes of a busy server: 503 from a full queue, 429 from a proxy."""
MAX_TRIES = 5
"""Maximum number of attempts while the server is busy."""
PIECE_BYTES = 1 << 20
"""Size of a piece of an upload in bytes."""
SEE_LOG = "see its log for the reason"
"""Next step of an error inside the server."""


@dataclass(frozen=True)
class Tag:
    """A name of a model on the server; two tags with one digest are one model."""

    name: str
    digest: str
    modified: str  # UTC, ISO 8601
    size: int  # bytes


@contextlib.contextmanager
def connect(host: str | None = None, *, silent: float = SILENT_SECONDS, pause: float = 0.5) -> Iterator["Ollama"]:
    """A client of the server at a host; sends nothing yet.

    A request fails after `silent` seconds without a byte. While the server is busy, the request is sent again after
    `pause` seconds, then after twice as long; at most MAX_TRIES attempts.
    """
    address = normalized_url(host)
    try:
        import ollama  # its import creates a client for OLLAMA_HOST
    except ValueError as error:
        raise RecipeError(f"OLLAMA_HOST is {os.environ.get('OLLAMA_HOST')!r}: {error}", "unset it") from None
    slow, quick = (httpx.Timeout(seconds, connect=CONNECT_SECONDS) for seconds in (silent, min(silent, QUICK_SECONDS)))
    # The system's certificates are read for HTTPS only: reading them takes longer than a request over plain HTTP.
    secure = address.startswith("https")
    trust = ssl.create_default_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The environment's proxies are for other addresses.
    settings: dict[str, Any] = {"trust_env": False, "verify": trust}
    with (
        ollama.Client(address, timeout=quick, **settings) as client,
        httpx.Client(base_url=address, timeout=slow, **settings) as http,
    ):
        yield Ollama(address, client, http, quick, pause)


class Ollama:
    """A server. Methods raise ServiceError: UnreachableError without a server, MissingError for a missing model."""

    def __init__(
        self, host: str, client: "ollama.Client", http: httpx.Client, quick: httpx.Timeout, pause: float
    ) -> None:
        self.host = host
        self._client = client
        self._http = http
        self._quick = quick
        self._retry = Retrying(
            retry=retry_if_exception(_is_busy),
            stop=stop_after_attempt(MAX_TRIES),
            wait=wait_exponential(pause),
            before_sleep=lambda state: logger.info("Ollama is busy: try %d of %d", state.attempt_number + 1, MAX_TRIES),
            reraise=True,
        )

    def version(self, seconds: float = CONNECT_SECONDS) -> str:
        """The server's version within `seconds`; "0.0.0" for one built from source."""
        version = self._json("GET", "/api/version", timeout=httpx.Timeout(seconds)).get("version")
        if not isinstance(version, str):
            raise not_ollama(self.host, "it returns no version")
        return version

    def wait_ready(self, seconds: float) -> str:
        """The version of a server that may still be starting. Raises UnreachableError after `seconds`."""
        end, logged = time.monotonic() + seconds, False
        while True:
            try:
                return self.version(max(0.2, min(CONNECT_SECONDS, end - time.monotonic())))
            except UnreachableError:
                if time.monotonic() + 0.5 > end:
                    raise
            if not logged:
                logger.info("waiting up to %.0f s for Ollama at %s", seconds, self.host)
                logged = True
            time.sleep(0.5)

    def has_blob(self, digest: str) -> bool:
        """Whether the server has a file with this digest ("sha256:...")."""
        response = self._call(lambda: self._http.head(f"/api/blobs/{digest}", timeout=self._quick))
        if response.status_code not in (200, 404):
            raise server_error(self.host, response.text, response.status_code)
        return response.status_code == 200

    def upload_blob(self, path: Path, digest: str) -> bool:
        """Send a file unless the server has it; return whether it was sent. Raises ArtifactError if it changes."""
        if self.has_blob(digest):
            return False
        size = path.stat().st_size
        options: dict[str, Any] = {
            "headers": {"Content-Length": str(size)},
            "timeout": httpx.Timeout(None, connect=CONNECT_SECONDS),
        }
        with path.open("rb") as file:
            self._call(lambda: self._send("POST", f"/api/blobs/{digest}", content=_pieces(file, size), **options))
        return True

    def create(self, model: str, body: Mapping[str, Any]) -> None:
        """Make a model from blobs on the server; `body` is the request without the model's name."""
        last = ""
        # The package's call has no `parser`.
        for event in self.stream("/api/create", {"model": model, **body, "stream": True}):
            counts = {"done": event["completed"], "total": event["total"]} if event.get("completed") else {}
            before, last = last, str(event.get("status", ""))
            if counts or (last != before and " layer " not in last):
                logger.info("%s: %s", model, last, extra=counts)
        if last != "success":
            raise ServiceError(f"creating {model} ended without success, after {last!r}", "publish again")

    def show(self, model: str) -> dict[str, Any] | None:
        """The server's description of a model; None when it has no model of that name."""
        try:
            return self._json("POST", "/api/show", {"model": model}, timeout=self._quick)
        except MissingError:
            return None

    def tags(self) -> list[Tag]:
        """All names of models, the newest first."""
        models = self._call(self._client.list).models
        tags = [
            Tag(item.model or "", item.digest or "", _utc(item.modified_at), int(item.size or 0)) for item in models
        ]
        return sorted(tags, key=lambda tag: tag.modified, reverse=True)

    def loaded(self) -> dict[str, float]:
        """The names of the models in memory, each with its share on a GPU (0 to 1)."""
        models = self._call(self._client.ps).models
        return {item.model or "": int(item.size_vram or 0) / max(int(item.size or 0), 1) for item in models}

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name. The name is taken from another model that has it."""
        self._call(lambda: self._client.copy(source, destination))

    def delete(self, model: str) -> None:
        """Remove a model's name; its files are removed with its last name."""
        self._call(lambda: self._client.delete(model))

    def unload(self, model: str) -> None:
        """Free a model's memory, after an answer in progress."""
        self._call(lambda: self._client.generate(model=model, keep_alive=0))

    def rendered(self, model: str, question: str | Sequence[Message]) -> str | None:
        """The prompt that the server renders for a text (/api/generate) or for messages (/api/chat); no answer is made.

        None when the server does not support the undocumented field `_debug_render_only`.
        """
        path, field = ("/api/generate", "prompt") if isinstance(question, str) else ("/api/chat", "messages")
        body = {"model": model, field: question, "stream": False, "truncate": False, "options": {"num_predict": 1}}
        answer = self._json("POST", path, {**body, "_debug_render_only": True})
        info = answer.get("_debug_info")
        return str(info["rendered_template"]) if isinstance(info, dict) and "rendered_template" in info else None

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a request. Closing the iterator closes the connection, which ends the generation too."""
        response = self._call(lambda: self._send("POST", path, stream=True, json=body))
        with contextlib.closing(response):
            lines = split_lines(response.iter_bytes())
            while (line := self._call(lambda: next(lines, None))) is not None:
                yield self._call(partial(json_object, line))

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        return self._call(lambda: json_object(self._send(method, path, json=body, **options).content))

    def _send(self, method: str, path: str, *, stream: bool = False, **options: Any) -> httpx.Response:
        """The response to a request; a stream's body is not read yet. Raises ResponseError for an error status."""
        from ollama import ResponseError

        response = self._http.send(self._http.build_request(method, path, **options), stream=stream)
        if not response.is_success:
            response.read()
            raise ResponseError(response.text, response.status_code)
        return response

    def _call(self, call: Callable[[], Result]) -> Result:
        """The result of a call, repeated while the server is busy; the one place that maps errors to ServiceError."""
        from ollama import ResponseError

        try:
            return self._retry(call)
        except ResponseError as error:
            raise server_error(self.host, error.error, error.status_code) from error
        except (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnreachableError(f"no Ollama at {self.host}", START_SERVER) from error
        except httpx.TimeoutException as error:
            raise ServiceError(f"Ollama at {self.host} does not answer", SEE_LOG) from error
        except httpx.RequestError as error:
            raise ServiceError(f"the connection to Ollama at {self.host} broke: {error}", SEE_LOG) from error
        except ValueError as error:
            raise not_ollama(self.host, f"its answer has another form ({str(error)[:120]})") from error
        except (TypeError, AttributeError) as error:
            # The package fails on an error body that is JSON but no object.
            raise ServiceError(
                f"Ollama at {self.host} sent an error that its own client cannot read", SEE_LOG
            ) from error


def _is_busy(error: BaseException) -> bool:
    return getattr(error, "status_code", None) in BUSY_STATUSES


def _utc(moment: datetime | None) -> str:
    return moment.astimezone(UTC).isoformat() if moment else ""


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The pieces of a file of `size` bytes; logs the progress in MB. Raises ArtifactError for another size."""
    file.seek(0)
    name, done = Path(file.name).name, 0
    while (piece := file.read(PIECE_BYTES)) and done + len(piece) <= size:
        yield piece
        done += len(piece)
        counts = {"done": done // 1_000_000, "total": size // 1_000_000}
        logger.info("sending %s: %d of %d MB", name, counts["done"], counts["total"], extra=counts)
    if piece or done != size:
        raise ArtifactError(f"{file.name} changed while it was sent", "publish again")
