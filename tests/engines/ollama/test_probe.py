"""engines/ollama/probe.py: a server that listens, none, and a host that does not exist."""

import pytest
from support.fakes.ollama import running

from tutor.engines.ollama.probe import require_listener
from tutor.engines.ollama.protocol import UnreachableError
from tutor.errors import ServiceError


def test_listener_gets_a_connection_and_no_request() -> None:
    with running() as server:
        require_listener(server.host)
        assert server.requests == []


def test_refused_connection_raises_unreachable() -> None:
    with pytest.raises(UnreachableError, match=r"no Ollama at http://127\.0\.0\.1:1 \(Connection refused\); start it"):
        require_listener("127.0.0.1:1")


def test_unknown_host_is_named_and_is_no_absence() -> None:
    with pytest.raises(ServiceError, match=r"Ollama's host 'host\.invalid' cannot be found \(.+\)") as caught:
        require_listener("host.invalid")
    assert not isinstance(caught.value, UnreachableError)
