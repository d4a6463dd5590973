"""Ollama's HTTP API: one server, its models, and every way in which it says no.

In: a host. Out: what the server has and does, or a ServiceError that says why not. The `ollama` package where it has
the call; httpx, which it brings, where it lacks something: progress and HEAD of a blob, `parser`, `truncate`,
`_debug_render_only`, /api/version, the system text of /api/show.
Does not decide what is published (serving/builds.py), does not hold a conversation (ollama.py).
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
    MissingError,
    UnreachableError,
    json_object,
    lines_of,
    normalised,
    refusal,
    stranger,
)
from tutor.errors import ArtifactError, RecipeError, ServiceError
from tutor.prompt import Message

if TYPE_CHECKING:
    import ollama

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

CONNECT_SECONDS = 5.0
SILENT_SECONDS = 900.0
"""Without a byte: a model is loaded, other requests come first, or a long prompt is read by a slow processor."""
QUICK_SECONDS = 60.0
"""The same where no model has to be loaded."""
BUSY = (429, 503)
"""A full queue says 503, a proxy 429."""
TRIES = 5
PIECE = 1 << 20
LOG = "its log says why"
START = "start it (make up, or: ollama serve), or name another with --host or OLLAMA_HOST"


@dataclass(frozen=True)
class Tag:
    """A model's name on the server; two tags of one digest are one model."""

    name: str
    digest: str
    modified: str  # UTC, ISO 8601
    size: int  # bytes


@contextlib.contextmanager
def connect(host: str | None = None, *, silent: float = SILENT_SECONDS, pause: float = 0.5) -> Iterator["Ollama"]:
    """The server at a host, not yet asked anything.

    It is given up after `silent` seconds without a byte. While it is busy it is asked again after `pause` seconds,
    then after twice as many, TRIES times in all.
    """
    address = normalised(host)
    try:
        import ollama  # makes a client of OLLAMA_HOST while it is imported
    except ValueError as error:
        raise RecipeError(f"OLLAMA_HOST is {os.environ.get('OLLAMA_HOST')!r}: {error}", "unset it") from None
    slow, quick = (httpx.Timeout(seconds, connect=CONNECT_SECONDS) for seconds in (silent, min(silent, QUICK_SECONDS)))
    # Certificates are the system's; to read them takes longer than an answer over plain HTTP.
    secure = address.startswith("https")
    trust = ssl.create_default_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Proxies of the environment are for other addresses.
    settings: dict[str, Any] = {"trust_env": False, "verify": trust}
    with (
        ollama.Client(address, timeout=quick, **settings) as client,
        httpx.Client(base_url=address, timeout=slow, **settings) as http,
    ):
        yield Ollama(address, client, http, quick, pause)


class Ollama:
    """A server. Every method raises ServiceError: UnreachableError without one, MissingError for what it lacks."""

    def __init__(
        self, host: str, client: "ollama.Client", http: httpx.Client, quick: httpx.Timeout, pause: float
    ) -> None:
        self.host = host
        self._client = client
        self._http = http
        self._quick = quick
        self._patiently = Retrying(
            retry=retry_if_exception(_is_busy),
            stop=stop_after_attempt(TRIES),
            wait=wait_exponential(pause),
            before_sleep=lambda state: logger.info("Ollama is busy: try %d of %d", state.attempt_number + 1, TRIES),
            reraise=True,
        )

    def version(self, seconds: float = CONNECT_SECONDS) -> str:
        """The server's version, waited for so many seconds; "0.0.0" for one built from source."""
        version = self._ask("GET", "/api/version", timeout=httpx.Timeout(seconds)).get("version")
        if not isinstance(version, str):
            raise stranger(self.host, "it gives no version")
        return version

    def wait_ready(self, seconds: float) -> str:
        """The version of a server that may still be starting. Raises UnreachableError after so many seconds."""
        end, told = time.monotonic() + seconds, False
        while True:
            try:
                return self.version(max(0.2, min(CONNECT_SECONDS, end - time.monotonic())))
            except UnreachableError:
                if time.monotonic() + 0.5 > end:
                    raise
            if not told:
                logger.info("waiting up to %.0f s for Ollama at %s", seconds, self.host)
                told = True
            time.sleep(0.5)

    def has_blob(self, digest: str) -> bool:
        """Whether the server has a file of this digest ("sha256:...")."""
        response = self._through(lambda: self._http.head(f"/api/blobs/{digest}", timeout=self._quick))
        if response.status_code not in (200, 404):
            raise refusal(self.host, response.text, response.status_code)
        return response.status_code == 200

    def upload_blob(self, path: Path, digest: str) -> bool:
        """Send a file unless the server has it; whether it was sent. Raises ArtifactError when it changes meanwhile."""
        if self.has_blob(digest):
            return False
        size = path.stat().st_size
        options: dict[str, Any] = {
            "headers": {"Content-Length": str(size)},
            "timeout": httpx.Timeout(None, connect=CONNECT_SECONDS),
        }
        with path.open("rb") as file:
            self._through(lambda: self._send("POST", f"/api/blobs/{digest}", content=_pieces(file, size), **options))
        return True

    def create(self, model: str, body: Mapping[str, Any]) -> None:
        """Make a model of blobs that the server has; `body` is the request's, without its name."""
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
        """What the server says of a model; None when it has none of that name."""
        try:
            return self._ask("POST", "/api/show", {"model": model}, timeout=self._quick)
        except MissingError:
            return None

    def tags(self) -> list[Tag]:
        """Every model's name, the newest first."""
        models = self._through(self._client.list).models
        tags = [
            Tag(item.model or "", item.digest or "", _utc(item.modified_at), int(item.size or 0)) for item in models
        ]
        return sorted(tags, key=lambda tag: tag.modified, reverse=True)

    def loaded(self) -> dict[str, float]:
        """The models in memory, each with the share of it that is on a GPU."""
        models = self._through(self._client.ps).models
        return {item.model or "": int(item.size_vram or 0) / max(int(item.size or 0), 1) for item in models}

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name, which may be another's until now."""
        self._through(lambda: self._client.copy(source, destination))

    def delete(self, model: str) -> None:
        """Take a model's name away; its files go with its last name."""
        self._through(lambda: self._client.delete(model))

    def unload(self, model: str) -> None:
        """Free a model's memory, after the answer that it may be giving."""
        self._through(lambda: self._client.generate(model=model, keep_alive=0))

    def rendered(self, model: str, question: str | Sequence[Message]) -> str | None:
        """The prompt that the server makes of a text (/api/generate) or of messages (/api/chat), not answered.

        None where the server does not know the field, which is undocumented.
        """
        path, field = ("/api/generate", "prompt") if isinstance(question, str) else ("/api/chat", "messages")
        body = {"model": model, field: question, "stream": False, "truncate": False, "options": {"num_predict": 1}}
        answer = self._ask("POST", path, {**body, "_debug_render_only": True})
        info = answer.get("_debug_info")
        return str(info["rendered_template"]) if isinstance(info, dict) and "rendered_template" in info else None

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of a request. Closing the iterator closes the connection, which ends the generation too."""
        response = self._through(lambda: self._send("POST", path, stream=True, json=body))
        with contextlib.closing(response):
            lines = lines_of(response.iter_bytes())
            while (line := self._through(lambda: next(lines, None))) is not None:
                yield self._through(partial(json_object, line))

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        return self._through(lambda: json_object(self._send(method, path, json=body, **options).content))

    def _send(self, method: str, path: str, *, stream: bool = False, **options: Any) -> httpx.Response:
        """An answer that is no refusal; of a stream only its head has come."""
        from ollama import ResponseError

        response = self._http.send(self._http.build_request(method, path, **options), stream=stream)
        if not response.is_success:
            response.read()
            raise ResponseError(response.text, response.status_code)
        return response

    def _through(self, call: Callable[[], Result]) -> Result:
        """What a call gives, tried again while the server is busy; the one place where its errors become ours."""
        from ollama import ResponseError

        try:
            return self._patiently(call)
        except ResponseError as error:
            raise refusal(self.host, error.error, error.status_code) from error
        except (ConnectionError, httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnreachableError(f"no Ollama at {self.host}", START) from error
        except httpx.TimeoutException as error:
            raise ServiceError(f"Ollama at {self.host} is silent", LOG) from error
        except httpx.RequestError as error:
            raise ServiceError(f"the connection to Ollama at {self.host} broke: {error}", LOG) from error
        except ValueError as error:
            raise stranger(self.host, f"it answers in another form ({str(error)[:120]})") from error
        except (TypeError, AttributeError) as error:
            # The package fails on an error that is itself JSON, but no object.
            raise ServiceError(f"Ollama at {self.host} sent an error that its own client cannot read", LOG) from error


def _is_busy(error: BaseException) -> bool:
    return getattr(error, "status_code", None) in BUSY


def _utc(moment: datetime | None) -> str:
    return moment.astimezone(UTC).isoformat() if moment else ""


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """A file of `size` bytes from its beginning, with its progress in MB. Raises ArtifactError for another size."""
    file.seek(0)
    name, done = Path(file.name).name, 0
    while (piece := file.read(PIECE)) and done + len(piece) <= size:
        yield piece
        done += len(piece)
        counts = {"done": done // 1_000_000, "total": size // 1_000_000}
        logger.info("sending %s: %d of %d MB", name, counts["done"], counts["total"], extra=counts)
    if piece or done != size:
        raise ArtifactError(f"{file.name} changed while it was sent", "publish again")
