"""engines/ollama/health.py: address, version and GPU of a server."""

import pytest
from support.fakes.ollama import FakeOllama

from tutor.engines.ollama.client import Ollama, connect
from tutor.engines.ollama.health import REMEDY, absence, gpu_fault, gpu_notice, gpu_share, server_states
from tutor.errors import ServiceError


@pytest.mark.parametrize(("share", "said"), [(0.0, "0% of tutor on it"), (0.4, "40% of tutor on it"), (1.0, None)])
def test_share_below_one_is_said_with_the_remedy(
    server: FakeOllama, api: Ollama, share: float, said: str | None
) -> None:
    server.gpu_share = share
    notice = gpu_notice(api, host_has_gpu=True, model="tutor")
    assert server.loaded == ["tutor:latest"], "it was loaded, to look"
    if said is None:
        assert notice is None
    else:
        assert notice is not None
        assert said in notice.replace("tutor:latest", "tutor")
        assert "restart Ollama (docker restart" in notice


def test_nothing_is_asked_without_a_gpu_here(server: FakeOllama, api: Ollama) -> None:
    assert gpu_notice(api, host_has_gpu=False, model="tutor") is None
    with connect("192.0.2.1:1") as elsewhere:
        assert gpu_notice(elsewhere, host_has_gpu=True, model="tutor") is None
    assert server.requests == []


def test_models_in_memory_count_when_none_is_named(server: FakeOllama, api: Ollama) -> None:
    assert gpu_fault(api, host_has_gpu=True) is None
    server.loaded = ["other:latest"]
    assert "75% of other:latest" in str(gpu_fault(api, host_has_gpu=True))


def test_share_is_found_by_any_spelling_of_the_name(server: FakeOllama, api: Ollama) -> None:
    server.loaded = ["tutor:latest"]
    assert gpu_share(api, "library/Tutor") == 0.75
    assert gpu_share(api, "user/tutor") is None


def test_states_name_the_address_the_version_and_the_gpu(server: FakeOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", f" :{server.server_port} ")
    server.loaded, server.gpu_share = ["tutor:latest"], 0.0
    states = list(server_states(2.0, host_has_gpu=True))
    assert states == [
        ("OLLAMA_HOST", "ok", f"' :{server.server_port} ' is {server.host}", ""),
        ("Ollama", "ok", f"0.33.0-rc2 at {server.host}", ""),
        (
            "GPU of Ollama",
            "warning",
            "this machine has a GPU, but Ollama has only 0% of tutor:latest on it",
            REMEDY,
        ),
    ]
    assert len(list(server_states(2.0, host_has_gpu=False))) == 2


def test_states_without_a_server_name_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    (_, (what, state, found, hint)) = server_states(2.0, host_has_gpu=True)
    assert (what, state) == ("Ollama", "missing")
    assert "no Ollama at http://127.0.0.1:1 (Connection refused)" in found
    assert "start it" in hint
    monkeypatch.setenv("OLLAMA_HOST", "a b")
    ((what, state, found, hint),) = server_states(2.0, host_has_gpu=True)
    assert (what, state) == ("Ollama", "missing")
    assert "'a b'" in found
    monkeypatch.delenv("OLLAMA_HOST")
    assert next(server_states(2.0, host_has_gpu=True))[2] == "not set: http://127.0.0.1:11434"


def test_absent_server_is_one_that_refuses_connections(server: FakeOllama) -> None:
    assert absence(server.host, 0) is None
    assert absence("127.0.0.1:1", 0) == "no Ollama at http://127.0.0.1:1 (Connection refused)"
    with pytest.raises(ServiceError, match=r"Ollama's host 'host\.invalid' cannot be found"):
        absence("host.invalid", 0)
    with pytest.raises(ServiceError, match="TLS to https"):
        absence(server.host.replace("http:", "https:"), 0)
