"""engines/ollama/prompts.py: the number of equal prompts.

tests/serving/test_builds.py has templates that are refused.
"""

from support.fakes.ollama import FakeOllama

from tutor.engines.ollama.client import Ollama
from tutor.engines.ollama.prompts import PROBES, check_prompts


def test_every_probe_is_rendered_as_in_training(server: FakeOllama, api: Ollama) -> None:
    assert check_prompts(api, "tutor", "") == 7
    asked = server.bodies("POST /api/chat") + server.bodies("POST /api/generate")
    assert len(asked) == 7 > len(PROBES)
    assert all(body["_debug_render_only"] for body in asked)
