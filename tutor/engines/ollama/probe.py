"""Whether a server listens at Ollama's address.

In: a host. Out: nothing, or a ServiceError. Sends no request, and imports no HTTP client: where no Ollama runs,
`tutor run --publish` must not wait for one.
"""

import socket
from urllib.parse import urlsplit

from tutor.engines.ollama.address import normalized_url
from tutor.engines.ollama.protocol import CONNECT_SECONDS, connection_error


def require_listener(host: str | None = None) -> None:
    """Raise UnreachableError where connections are refused, RecipeError for an invalid host.

    Raises another ServiceError where the host cannot be found or reached, which is no absence.
    """
    url = normalized_url(host)
    address = urlsplit(url)
    try:
        socket.create_connection((str(address.hostname), address.port or 0), CONNECT_SECONDS).close()
    except OSError as error:
        raise connection_error(url, error) from error
