"""Whether an Ollama server renders conversations as training did.

In: a server, a model on it and the system text that it was published with. Out: the number of equal prompts, or a
GateError that shows the first difference. Generates no answer.
"""

import logging
from collections.abc import Sequence

from tutor.engines.ollama.client import Ollama
from tutor.errors import GateError
from tutor.prompt.messages import Message
from tutor.prompt.tutor_format import render

logger = logging.getLogger(__name__)

QUESTION = "¿Qué es una interfaz en TypeScript?"
OWN_TEMPLATE = (
    "Ollama uses the GGUF's own chat template, which declares more (tools, thinking) than TEMPLATE: convert again, "
    "so that the file carries tutor's template"
)
PROBES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Hola"}],
    [{"role": "system", "content": "Otro sistema: «ñ».\nDos líneas."}, {"role": "user", "content": QUESTION}],
    [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": " Describe la forma de un objeto:\n\n```ts\ninterface A { b?: string }\n```"},
        {"role": "user", "content": "¿Y \"esto\" o 'aquello'?"},
        {"role": "assistant", "content": " Sí.\n"},
        {"role": "user", "content": "  Gracias \\n {{ .System }} {% raw %} <think> \t$&"},
    ],
    [{"role": "user", "content": "Sigue."}, {"role": "assistant", "content": " Una respuesta que"}],
    [{"role": "user", "content": "Emoji 👩‍💻, combinado é, ancho\u00a0fijo, 日本語, \u2028, <b>&amp;</b>"}],
)
"""Conversations whose rendered prompts are compared; the model adds its system text to those without one."""


def check_prompts(server: Ollama, tag: str, system: str) -> int:
    """Return the number of prompts that the server renders as the prompt contract does; the model has `system`.

    It is 0, with a warning, when the server cannot return rendered prompts. Raises GateError for another prompt.
    """
    cases: list[tuple[str | Sequence[Message], str]] = []
    for turns in PROBES:
        opening: list[Message] = [{"role": "system", "content": system}] if system else []
        whole = turns if turns[0]["role"] == "system" else [*opening, *turns]
        cases.append((turns, render(whole)))
        if len(turns) == 1:
            cases.append((turns[0]["content"], render(whole)))
    for asked, expected in cases:
        prompt = server.rendered(tag, asked)
        if prompt is None:
            logger.warning("this Ollama does not return its prompts: only /api/show was compared")
            return 0
        if prompt != expected:
            at = next((i for i, (a, b) in enumerate(zip(prompt, expected, strict=False)) if a != b), len(expected))
            path = "/api/generate" if isinstance(asked, str) else "/api/chat"
            raise GateError(
                f"{tag} gets another prompt than in training: {path} sends {prompt[max(at - 20, 0) : at + 60]!r} "
                f"instead of {expected[max(at - 20, 0) : at + 60]!r}",
                OWN_TEMPLATE,
            )
    return len(cases)
