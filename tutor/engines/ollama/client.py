"""Client for Ollama's HTTP API: models, blobs, streaming, error mapping.

In: a host. Out: the server's models and answers, or a ServiceError with the reason. Calls the `ollama` package, and
httpx (its dependency) for what the package lacks: progress and HEAD of a blob, `parser`, `truncate`,
`_debug_render_only`, /api/version, the system text of /api/show. Both send through transport.py.
Does not decide what is published (serving/builds.py) and holds no conversation (engine.py).
"""

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from pydantic import ValidationError
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from tutor.engines.ollama.address import normalized_url, warn_in_clear
from tutor.engines.ollama.answers import (
    ChatEvent,
    CompletionEvent,
    CreateEvent,
    LoadedReply,
    RenderReply,
    Reply,
    ShowReply,
    Tag,
    TagsReply,
    VersionReply,
)
from tutor.engines.ollama.protocol import (
    CONNECT_SECONDS,
    SEE_LOG,
    MissingError,
    UnreachableError,
    json_object,
    not_ollama,
    server_error,
    split_lines,
    wrong_field,
)
from tutor.engines.ollama.transport import MIB, Limit, Transport, file_pieces, import_package
from tutor.errors import ServiceError
from tutor.prompt.messages import Message

if TYPE_CHECKING:
    import ollama

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
Parsed = TypeVar("Parsed", bound=Reply)

SILENT_SECONDS = 900.0
"""Maximum seconds without a byte: the server may load a model, answer other requests first, or read a long prompt."""
QUICK_SECONDS = 60.0
"""Maximum seconds of an answer to a request that loads no model, and maximum seconds without a byte of it."""
TOKEN_SECONDS = 10.0
"""Maximum mean seconds of a token of an answer; a model that does not fit into memory needs about 5."""
CREATE_SECONDS = 6 * 3600.0
"""Maximum seconds of the creation of a model: the server copies and checks its file."""
STREAM_BYTES = 64 * MIB
"""Maximum bytes of a stream; an answer of 100,000 tokens has 20 MB."""
BUSY_STATUSES = (429, 503)
"""HTTP status codes of a busy server: 503 from a full queue, 429 from a proxy."""
MAX_TRIES = 5
"""Maximum number of attempts while the server is busy."""
RECOGNISED = "using autodetected template "
"""Beginning of the status with which a server names its own template that it puts in the place of the GGUF's."""


@contextlib.contextmanager
def connect(host: str | None = None, *, silent: float = SILENT_SECONDS, pause: float = 0.5) -> Iterator["Ollama"]:
    """A client of the server at a host; sends nothing yet.

    A request fails after `silent` seconds without a byte. While the server is busy, the request is sent again after
    `pause` seconds, then after twice as long; at most MAX_TRIES attempts.
    """
    address = normalized_url(host)
    warn_in_clear(address)
    import_package()
    import ollama

    slow, quick = (httpx.Timeout(seconds, connect=CONNECT_SECONDS) for seconds in (silent, min(silent, QUICK_SECONDS)))
    # The environment's proxies are for other addresses. The package would follow redirects to other hosts.
    settings: dict[str, Any] = {"trust_env": False, "follow_redirects": False}
    settings["transport"] = Transport(address, QUICK_SECONDS)
    with (
        ollama.Client(address, timeout=quick, **settings) as client,
        httpx.Client(base_url=address, timeout=slow, **settings) as http,
    ):
        yield Ollama(address, client, http, (silent, quick), pause)


class Ollama:
    """A server. Methods raise ServiceError: UnreachableError without a server, MissingError for a missing model."""

    def __init__(
        self,
        host: str,
        client: "ollama.Client",
        http: httpx.Client,
        limits: tuple[float, httpx.Timeout],
        pause: float,
    ) -> None:
        self.host = host
        self._client = client
        self._http = http
        self._silent, self._quick = limits
        self._retry = Retrying(
            retry=retry_if_exception(_is_busy),
            stop=stop_after_attempt(MAX_TRIES),
            wait=wait_exponential(pause),
            before_sleep=lambda state: logger.info("Ollama is busy: try %d of %d", state.attempt_number + 1, MAX_TRIES),
            reraise=True,
        )

    def version(self, seconds: float = CONNECT_SECONDS) -> str:
        """The server's version within `seconds`; "0.0.0" for one built from source."""
        limits: dict[str, Any] = {"timeout": httpx.Timeout(seconds), "limit": Limit(seconds)}
        return self._ask(VersionReply, "GET", "/api/version", **limits)[0].version

    def wait_ready(self, seconds: float) -> str:
        """The version of a server that may still be starting; one that listens has CONNECT_SECONDS to answer.

        Raises UnreachableError after `seconds`.
        """
        end, logged = time.monotonic() + seconds, False
        while True:
            try:
                return self.version()
            except UnreachableError:
                if time.monotonic() + 0.5 > end:
                    raise
            if not logged:
                logger.info("waiting up to %.0f s for Ollama at %s", seconds, self.host)
                logged = True
            time.sleep(0.5)

    def has_blob(self, digest: str) -> bool:
        """Whether the server has a file with this digest ("sha256:...")."""
        path = f"/api/blobs/{digest}"
        response = self._call(f"HEAD {path}", lambda: self._http.head(path, timeout=self._quick))
        if response.status_code not in (200, 404):
            raise server_error(self.host, response.text, response.status_code)
        return response.status_code == 200

    def upload_blob(self, path: Path, digest: str) -> bool:
        """Send a file unless the server has it; return whether it was sent. Raises ArtifactError if it changes."""
        if self.has_blob(digest):
            return False
        size = path.stat().st_size
        options: dict[str, Any] = {"headers": {"Content-Length": str(size)}, "limit": Limit(self._silent)}
        with path.open("rb") as file:
            send = partial(self._send, "POST", f"/api/blobs/{digest}", **options)
            self._call("POST /api/blobs", lambda: send(content=file_pieces(file, size)))
        return True

    def create(self, model: str, body: Mapping[str, Any]) -> str | None:
        """Make a model from blobs on the server; `body` is the request without the model's name.

        Return the name of Ollama's own template that the server recognised in the GGUF's, None where it knows none.
        """
        last, recognised = "", None
        # The package's call has no `parser`.
        request = {"model": model, **body, "stream": True}
        for event in self._stream("/api/create", request, CreateEvent, CREATE_SECONDS):
            counts = {"done": event.completed, "total": event.total} if event.completed else {}
            before, last = last, event.status
            if last.startswith(RECOGNISED):
                recognised = last.removeprefix(RECOGNISED)
            if counts or (last != before and " layer " not in last):
                logger.info("%s: %s", model, last, extra=counts)
        if last != "success":
            raise ServiceError(f"creating {model} ended without success, after {last!r:.200}", "publish again")
        return recognised

    def show(self, model: str) -> dict[str, Any] | None:
        """The server's description of a model, with the types of ShowReply; None when it has no model of that name."""
        try:
            return self._ask(ShowReply, "POST", "/api/show", {"model": model}, timeout=self._quick)[1]
        except MissingError:
            return None

    def tags(self) -> list[Tag]:
        """All names of models, the newest first."""
        tags = [item.tag for item in self._ask(TagsReply, "GET", "/api/tags", timeout=self._quick)[0].models]
        return sorted(tags, key=lambda tag: tag.modified, reverse=True)

    def loaded(self) -> dict[str, float]:
        """The names of the models in memory, each with its share on a GPU (0 to 1)."""
        models = self._ask(LoadedReply, "GET", "/api/ps", timeout=self._quick)[0].models
        return {item.model: min(1.0, item.size_vram / max(item.size, 1)) for item in models}

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name. The name is taken from another model that has it."""
        self._call("POST /api/copy", lambda: self._client.copy(source, destination))

    def delete(self, model: str) -> None:
        """Remove a model's name; its files are removed with its last name."""
        self._call("DELETE /api/delete", lambda: self._client.delete(model))

    def unload(self, model: str) -> None:
        """Free a model's memory, after an answer in progress."""
        self._call("POST /api/generate", lambda: self._client.generate(model=model, keep_alive=0))

    def load(self, model: str) -> None:
        """Load a model into memory, where it stays for the server's keep-alive time."""
        self._ask(Reply, "POST", "/api/generate", {"model": model, "stream": False}, limit=Limit(self._silent))

    def rendered(self, model: str, question: str | Sequence[Message], think: bool | None = None) -> str | None:  # noqa: FBT001
        """The prompt that the server renders for a text (/api/generate) or for messages (/api/chat); no answer is made.

        `think` is sent unless it is None. None when the server does not support the undocumented field
        `_debug_render_only`.
        """
        path, field = ("/api/generate", "prompt") if isinstance(question, str) else ("/api/chat", "messages")
        body = {"model": model, field: question, "stream": False, "truncate": False, "options": {"num_predict": 1}}
        body |= {"_debug_render_only": True} | ({} if think is None else {"think": think})
        info = self._ask(RenderReply, "POST", path, body, limit=Limit(self._silent))[0].debug_info
        return info.rendered_template if info else None

    def chat(self, body: Mapping[str, Any]) -> Generator[ChatEvent, None, None]:
        """The events of an answer, which `options.num_predict` of the request bounds, in time too.

        Closing the iterator closes the connection, which ends the generation too.
        """
        return self._answer("/api/chat", body, ChatEvent)

    def complete(self, body: Mapping[str, Any]) -> Generator[CompletionEvent, None, None]:
        """The events of POST /api/generate, bounded as those of `chat`."""
        return self._answer("/api/generate", body, CompletionEvent)

    def _answer(self, path: str, body: Mapping[str, Any], kind: type[Parsed]) -> Generator[Parsed, None, None]:
        seconds = self._silent + TOKEN_SECONDS * body.get("options", {}).get("num_predict", 0)
        return self._stream(path, body, kind, seconds)

    def _stream(
        self, path: str, body: Mapping[str, Any], kind: type[Parsed], seconds: float
    ) -> Generator[Parsed, None, None]:
        endpoint, limit = f"POST {path}", Limit(seconds, STREAM_BYTES)
        response = self._call(endpoint, lambda: self._send("POST", path, stream=True, json=body, limit=limit))
        with contextlib.closing(response):
            lines = split_lines(response.iter_bytes())
            while (line := self._call(endpoint, lambda: next(lines, None))) is not None:
                yield self._call(endpoint, partial(_parsed, kind, line))[0]

    def _ask(
        self, kind: type[Parsed], method: str, path: str, body: Mapping[str, Any] | None = None, **options: Any
    ) -> tuple[Parsed, dict[str, Any]]:
        """The answer to a request, as a model and as it is."""
        send = partial(self._send, method, path, json=body, **options)
        return self._call(f"{method} {path}", lambda: _parsed(kind, send().content))

    def _send(
        self, method: str, path: str, *, stream: bool = False, limit: Limit | None = None, **options: Any
    ) -> httpx.Response:
        """The response to a request; a stream's body is not read yet. Raises ResponseError for an error status."""
        from ollama import ResponseError

        extensions = {"limit": limit} if limit else {}
        request = self._http.build_request(method, path, extensions=extensions, **options)
        response = self._http.send(request, stream=stream)
        if not response.is_success:
            with contextlib.closing(response):
                response.read()
            raise ResponseError(response.text, response.status_code)
        return response

    def _call(self, endpoint: str, call: Callable[[], Result]) -> Result:
        """The result of a call, repeated while the server is busy; the one place that maps errors to ServiceError."""
        from ollama import ResponseError

        try:
            return self._retry(call)
        except ResponseError as error:
            raise server_error(self.host, error.error, error.status_code) from error
        except ValidationError as error:
            raise wrong_field(self.host, endpoint, error) from error
        except (ValueError, RecursionError) as error:
            raise not_ollama(self.host, f"its answer to {endpoint} has another form ({str(error)[:120]})") from error
        except (TypeError, AttributeError) as error:
            # The package fails on an error body that is JSON but no object.
            what = f"Ollama at {self.host} sent an error to {endpoint} that its own client cannot read"
            raise ServiceError(what, SEE_LOG) from error


def _parsed(kind: type[Parsed], text: bytes) -> tuple[Parsed, dict[str, Any]]:
    """An answer as a model and as it is. Raises ValueError, ValidationError or ollama's ResponseError."""
    value = json_object(text)
    return kind.model_validate(value), value


def _is_busy(error: BaseException) -> bool:
    return getattr(error, "status_code", None) in BUSY_STATUSES
