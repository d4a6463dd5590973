"""Whether a model on an Ollama server is the one that was sent: its description, and one answer.

In: a server, a model on it, what the description must be, its prompt format. Out: the answer, or a GateError with the
first differences. Changes nothing on the server.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tutor.engines.ollama.client import Ollama
from tutor.engines.ollama.engine import OllamaServer
from tutor.engines.ollama.prompts import OTHER_RENDERING, OWN_TEMPLATE, QUESTION
from tutor.engines.ollama.protocol import parse_parameters
from tutor.engines.ollama.trace import trace
from tutor.engines.protocol import Answer, Generation
from tutor.errors import GateError
from tutor.prompt.format import PromptFormat
from tutor.prompt.messages import conversation

WARM_UP_TOKENS = 24
"""Number of tokens of the warm-up answer; Ollama aborts a longer answer that repeats itself."""


@dataclass(frozen=True)
class Description:
    """What /api/show returns of a model, as far as it decides the answers."""

    template: str  # in use: that of the Modelfile, or of the GGUF
    system: str
    parameters: Mapping[str, Any]
    capabilities: tuple[str, ...]
    family: str  # general.architecture of the GGUF
    quantization: str


def check_description(
    server: Ollama, tag: str, expected: Description, *, is_native: bool, recognised: str | None = None
) -> None:
    """Raise GateError where a server describes a model otherwise. `is_native`: the GGUF's own template is expected.

    `recognised` is the name of the server's own template that it has recognised in the GGUF's, if it has.
    """
    shown = server.show(tag) or {}
    if problems := differences(shown, expected, is_native=is_native):
        what = f"{tag} is not what was sent: {'; '.join(problems[:3])}"
        template = str(shown.get("template"))
        if is_native and template != expected.template:
            name = f"took it for {recognised!r}, and " if recognised else ""
            hint = f"Ollama {name}serves a template of its own in its place; convert again: tutor clean convert"
            raise GateError(what, f"{hint}. Or {OTHER_RENDERING}")
        raise GateError(what, OWN_TEMPLATE if "{%" in template else "publish again")


def differences(shown: Mapping[str, Any], expected: Description, *, is_native: bool = False) -> list[str]:
    """Return the values in /api/show that are not as expected, as text.

    A template in a GGUF that mentions tools declares them, which changes no answer to a chat without tools.
    """
    details = shown.get("details") or {}
    capabilities = tuple(shown.get("capabilities", ()))
    found = Description(
        template=shown.get("template", ""),
        system=shown.get("system", ""),
        parameters=parse_parameters(shown),
        capabilities=tuple(name for name in capabilities if name != "tools") if is_native else capabilities,
        family=details.get("family", ""),
        quantization=details.get("quantization_level", ""),
    )
    pairs = [(field.name, getattr(found, field.name), getattr(expected, field.name)) for field in fields(Description)]
    return [f"{name} is {got!r:.160} instead of {want!r:.160}" for name, got, want in pairs if got != want]


def check_answer(server: Ollama, tag: str, prompt: PromptFormat) -> Answer:
    """Return the answer to one question. Raises GateError for an empty one, and where its thought is not separated."""
    asked, settings = conversation(QUESTION), Generation(WARM_UP_TOKENS, 0.0, 1.0, 1.0, 1, prompt.stops)
    answer = OllamaServer(server, tag, prompt).answer(asked, settings)
    if not (answer.text + answer.thought).strip():
        raise GateError(f"{tag} returns an empty answer to {QUESTION!r}", "look at its training: tutor summary")
    if prompt.tags[0]:
        text = trace(server, tag, asked, WARM_UP_TOKENS, prompt).text
        if bool(prompt.reply(text).thought) != bool(answer.thought):
            raise GateError(
                f"{tag} separates thoughts otherwise than its format: it generates {text!r:.120}, and Ollama makes of "
                f"it the thought {answer.thought!r:.60} and the answer {answer.text!r:.60}",
                f"are {' and '.join(prompt.tags)} control tokens of the base, which no engine prints?",
            )
    return answer
