"""engines/ollama/probe.py: a server that listens, none, and a host that does not exist."""

import pytest
from support.fakes.ollama import running

from tutor.engines.ollama.probe import require_listener
from tutor.engines.ollama.protocol import UnreachableError


def test_listener_gets_a_connection_and_no_request() -> None:
    with running() as server:
        require_listener(server.host)
        assert server.requests == []


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("127.0.0.1:1", r"no Ollama at http://127\.0\.0\.1:1 \(Connection refused\); start it"),
        ("host.invalid", r"no Ollama at http://host\.invalid:11434 \(.+\); start it"),
    ],
)
def test_host_without_a_listener_raises_with_the_reason(host: str, message: str) -> None:
    with pytest.raises(UnreachableError, match=message):
        require_listener(host)
