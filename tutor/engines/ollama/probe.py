"""Whether a server listens at Ollama's address.

In: a host. Out: nothing, or an UnreachableError. Sends no request, and imports no HTTP client: where no Ollama runs,
`tutor run --publish` must not wait for one.
"""

import socket
from urllib.parse import urlsplit

from tutor.engines.ollama.protocol import CONNECT_SECONDS, START_SERVER, UnreachableError, normalized_url


def require_listener(host: str | None = None) -> None:
    """Raise UnreachableError where no server accepts a connection, RecipeError for an invalid host."""
    url = normalized_url(host)
    address = urlsplit(url)
    try:
        socket.create_connection((str(address.hostname), address.port or 0), CONNECT_SECONDS).close()
    except OSError as error:
        raise UnreachableError(f"no Ollama at {url} ({error.strerror or error})", START_SERVER) from error
