"""The address of an Ollama server: read OLLAMA_HOST or --host by Ollama's own rules (its envconfig package).

In: a host as a user writes it. Out: a URL with a port, to which a client can connect; a warning where it is not
private. Sends nothing.
"""

import functools
import ipaddress
import logging
import os
import re
from urllib.parse import urlsplit

from tutor.errors import RecipeError

logger = logging.getLogger(__name__)

DEFAULT_PORT = 11434
"""Ollama's port for a host without a scheme."""
PORTS = {"http": 80, "https": 443}
"""Default port of a host with a scheme, as Ollama's client has it."""
MAX_PORT = 65535
"""Maximum number of a port."""
HERE = "127.0.0.1"
"""Address of a host that is not given, or is given as a port alone."""
CONTAINER_HOSTS = ("ollama", "host.docker.internal", "host.containers.internal")
"""Names of a container's network that stay on one machine: the service of compose.yaml, and a container's own host."""
NAME = re.compile(r"(?=.{1,253}\Z)(?![0-9.]+\Z)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
"""Pattern of a host's name; one of digits alone would be an address."""
FORMS = "give it as NAME, NAME:PORT or http://NAME:PORT"
"""Next step of an error in a host."""


def normalized_url(host: str | None) -> str:
    """`host`, else OLLAMA_HOST, else this machine, as a URL with its port. Raises RecipeError for an invalid host.

    A port that is none is replaced by the default, with a warning, as Ollama does.
    """
    given = (host or os.environ.get("OLLAMA_HOST", "")).strip().strip("\"'").strip()
    if "@" in given:
        raise RecipeError("Ollama's host holds a user name, which would appear in logs", FORMS)
    scheme, separator, rest = given.partition("://")
    scheme, default = (scheme.lower(), PORTS.get(scheme.lower(), 0)) if separator else ("http", DEFAULT_PORT)
    name_port, _, path = (rest if separator else given).partition("/")
    if given == "ollama.com":
        scheme, default = "https", PORTS["https"]
    name, port = _split_port(name_port)
    number = int(port) if re.fullmatch(r"\+?[0-9]{1,9}", port) else -1
    if not 0 <= number <= MAX_PORT:
        if port:
            logger.warning("Ollama's host has the port %r, which is none: %d is used", port[:20], default)
        number = default
    name = _connectable(name)
    if not default or not name or not re.fullmatch(r"[!-~]*", path) or re.search(r"[?#]", path):
        raise RecipeError(f"Ollama's host is {given[:200]!r}", FORMS)
    return f"{scheme}://{f'[{name}]' if ':' in name else name}:{number}{f'/{path}'.rstrip('/')}"


def _split_port(text: str) -> tuple[str, str]:
    """Name and port of NAME:PORT or [IPV6]:PORT as Go's net.SplitHostPort has them; another text is a name alone."""
    if found := re.fullmatch(r"\[([^\[\]]*)\]:([^:\[\]]*)|([^:\[\]]*):([^:\[\]]*)", text):
        return (found[1], found[2]) if found[3] is None else (found[3], found[4])
    try:
        return str(ipaddress.ip_address(text.strip("[]"))), ""
    except ValueError:
        return text, ""


def _connectable(name: str) -> str:
    """An address that a client can connect to: the loopback one for none, and for a server's "all addresses".

    A text that is neither name nor address is returned as "".
    """
    try:
        address = ipaddress.ip_address(name or HERE)
    except ValueError:
        return name if NAME.fullmatch(name) else ""
    if not address.is_unspecified:
        return str(address)
    return HERE if address.version == 4 else "::1"


def is_loopback(url: str) -> bool:
    """Whether a server is on this machine, by its address."""
    name = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


@functools.cache  # once a command, which connects several times
def warn_in_clear(url: str) -> None:
    """Log a warning for plain HTTP to another machine: weights, prompts and answers can be read and changed on the way.

    A name of a container's network gets none: its packets stay on the bridge of one machine.
    """
    parts = urlsplit(url)
    if parts.scheme == "http" and not is_loopback(url) and parts.hostname not in CONTAINER_HOSTS:
        logger.warning("%s is another machine and has no TLS: weights and prompts travel unencrypted", url)
