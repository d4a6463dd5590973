"""HTTP to one Ollama server: a connection a request, without keys, redirects and proxies, within time and size.

In: httpx's requests, each with the `Limit` of its answer. Out: responses, or a ServiceError that names the reason.
Interprets no answer.
"""

import contextlib
import logging
import os
import ssl
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import httpcore
import httpx

from tutor.engines.ollama.protocol import CONNECT_SECONDS, SEE_LOG, connection_error, not_ollama
from tutor.errors import ArtifactError, ServiceError

logger = logging.getLogger(__name__)

MIB = 1 << 20
"""Bytes of a mebibyte."""
PIECE_BYTES = MIB
"""Size of a piece of an upload in bytes."""
PRIVATE_HEADERS = (b"authorization", b"proxy-authorization", b"cookie", b"accept-encoding")
"""Headers that are not sent: the `ollama` package adds OLLAMA_API_KEY for any host."""
AMBIENT = ("OLLAMA_HOST", "OLLAMA_API_KEY", "SSL_CERT_FILE", "SSL_CERT_DIR")
"""Variables, besides those of proxies, that the import of the `ollama` package fails on when they are invalid."""


@dataclass(frozen=True)
class Limit:
    """Bounds of one answer, its headers included."""

    seconds: float = 60.0
    """Maximum seconds from the end of the request to the end of the answer."""
    size: int = 8 * MIB
    """Maximum bytes: a list of 10,000 models has 4 MB."""


class Transport(httpx.BaseTransport):
    """Transport of a client of one server. `seconds` is the default of a Limit's seconds."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url = url
        self._limit = Limit(seconds)
        # The system's certificates are read for HTTPS only: reading them takes longer than a request over plain HTTP.
        self._trust = ssl.create_default_context() if url.startswith("https") else None

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request. Raises ServiceError for a failed connection, a redirect and an encoded answer."""
        limit = request.extensions.get("limit", self._limit)
        pool = httpcore.ConnectionPool(self._trust, network_backend=_Backend(self._url, limit))
        target = request.url
        sent = httpcore.Request(
            request.method,
            httpcore.URL(scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path),
            headers=[item for item in request.headers.raw if item[0].lower() not in PRIVATE_HEADERS],
            content=request.stream,
            extensions=request.extensions,
        )
        answer = None
        try:
            with _service_errors(self._url):
                received = pool.handle_request(sent)
            answer = httpx.Response(
                received.status,
                headers=received.headers,
                stream=_Answer(self._url, pool, received),
                extensions=received.extensions,
            )
            self._check(answer)
        except BaseException:
            pool.close() if answer is None else answer.close()
            raise
        return answer

    def _check(self, answer: httpx.Response) -> None:
        if answer.is_redirect or 300 <= answer.status_code < 400:
            place = answer.headers.get("location", "")[:200]
            raise not_ollama(self._url, f"it redirects to {place or 'nowhere'}, and redirects are not followed")
        if (encoding := answer.headers.get("content-encoding", "identity")) != "identity":
            raise not_ollama(self._url, f"its answer is encoded as {encoding[:40]!r}, which was not requested")


class _Answer(httpx.SyncByteStream):
    """The body of an answer; closing it closes the connection, which ends a generation too."""

    def __init__(self, url: str, pool: httpcore.ConnectionPool, received: httpcore.Response) -> None:
        self._url = url
        self._pool = pool
        self._received = received

    def __iter__(self) -> Iterator[bytes]:
        with _service_errors(self._url):
            yield from self._received.iter_stream()

    def close(self) -> None:
        self._received.close()
        self._pool.close()


class _Backend(httpcore.NetworkBackend):
    """The network of one request, whose connection obeys a limit."""

    def __init__(self, url: str, limit: Limit) -> None:
        self._url = url
        self._limit = limit

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        stream = httpcore.SyncBackend().connect_tcp(host, port, timeout, local_address, socket_options)
        return _Connection(stream, self._url, self._limit)


class _Connection(httpcore.NetworkStream):
    """A connection that reads no more, and no longer, than a limit: headers that drip count too."""

    def __init__(self, stream: httpcore.NetworkStream, url: str, limit: Limit) -> None:
        self._stream = stream
        self._url = url
        self._limit = limit
        self._end: float | None = None
        self._bytes = 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        now = time.monotonic()
        self._end = now + self._limit.seconds if self._end is None else self._end
        allowed = self._end - now
        if allowed <= 0:
            raise self._exceeded(f"{self._limit.seconds:g} s")
        try:
            data = self._stream.read(max_bytes, allowed if timeout is None else min(timeout, allowed))
        except httpcore.ReadTimeout:
            if self._bytes and time.monotonic() >= self._end:
                raise self._exceeded(f"{self._limit.seconds:g} s") from None
            raise
        self._bytes += len(data)
        if self._bytes > self._limit.size:
            raise self._exceeded(f"{self._limit.size / MIB:g} MiB")
        return data

    def _exceeded(self, what: str) -> ServiceError:
        return ServiceError(f"Ollama at {self._url} did not end its answer within {what}", SEE_LOG)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Connection(self._stream.start_tls(ssl_context, server_hostname, timeout), self._url, self._limit)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


@contextlib.contextmanager
def _service_errors(url: str) -> Iterator[None]:
    """Map errors of the connection to ServiceError."""
    try:
        yield
    except httpcore.ConnectTimeout as error:
        problem = f"no connection to Ollama at {url} within {CONNECT_SECONDS:g} s"
        raise ServiceError(problem, "check the host, its port and a firewall between") from error
    except httpcore.ConnectError as error:
        raise connection_error(url, next(iter(error.args), error)) from error  # it holds the socket's error
    except httpcore.TimeoutException as error:
        raise ServiceError(f"Ollama at {url} does not answer", SEE_LOG) from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol) as error:
        raise ServiceError(f"the connection to Ollama at {url} broke: {str(error)[:200]}", SEE_LOG) from error


def import_package() -> None:
    """Import the `ollama` package, which creates a client of its own: without variables that this client may not read.

    A proxy that httpx does not support, a port that is none or a missing certificate file would fail the import.
    """
    if "ollama" in sys.modules:
        return
    names: Iterable[str] = [name for name in os.environ if name in AMBIENT or name.lower().endswith("_proxy")]
    kept = {name: os.environ.pop(name) for name in names}
    try:
        import ollama  # noqa: F401 - for its effect
    finally:
        os.environ.update(kept)


def file_pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
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
