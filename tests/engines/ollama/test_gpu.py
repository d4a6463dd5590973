"""engines/ollama/gpu.py: the line where a model is not on the GPU of this machine."""

import pytest
from support.fakes.ollama import FakeOllama

from tutor.engines.ollama.client import Ollama, connect
from tutor.engines.ollama.gpu import gpu_notice, gpu_share


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
    assert gpu_notice(api, host_has_gpu=True) is None
    server.loaded = ["other:latest"]
    assert "75% of other:latest" in str(gpu_notice(api, host_has_gpu=True))


def test_share_is_found_by_any_spelling_of_the_name(server: FakeOllama, api: Ollama) -> None:
    server.loaded = ["tutor:latest"]
    assert gpu_share(api, "library/Tutor") == 0.75
    assert gpu_share(api, "user/tutor") is None
