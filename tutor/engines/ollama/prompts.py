"""Whether an Ollama server renders conversations as training did.

In: a server, a model on it, the system text and the prompt format that it was published with. Out: the number of equal
prompts, or a GateError that shows the first difference. Generates no answer.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress

from tutor.engines.ollama.client import Ollama
from tutor.errors import GateError
from tutor.prompt.format import PromptFormat
from tutor.prompt.messages import Message, with_system
from tutor.prompt.tutor_format import TUTOR

logger = logging.getLogger(__name__)

QUESTION = "¿Qué es una interfaz en TypeScript?"
OWN_TEMPLATE = (
    "Ollama uses the GGUF's own chat template, which declares more (tools, thinking) than TEMPLATE: convert again, "
    "so that the file carries tutor's template"
)
OTHER_RENDERING = (
    "this server renders the base's chat template otherwise than transformers: update the server, or "
    'set prompt = "tutor"'
)
"""Next step where the prompts of the base's own template differ."""
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


def check_prompts(server: Ollama, tag: str, system: str, prompt: PromptFormat = TUTOR) -> int:
    """Return the number of prompts that the server renders as the prompt format does; the model has `system`.

    It is 0, with a warning, when the server cannot return rendered prompts. Raises GateError for another prompt, and
    without rendered prompts for a format whose template the server chooses itself.
    """
    cases = list(_cases(system, prompt))
    for asked, expected, think in cases:
        found = server.rendered(tag, asked, think)
        if found is None:
            what = "this Ollama does not return its prompts"
            if not prompt.go_template:
                raise GateError(f"{what}, so that nothing shows which template it renders", "update the server")
            logger.warning("%s: only /api/show was compared", what)
            return 0
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
            path = "/api/generate" if isinstance(asked, str) else "/api/chat"
            path += "" if think is None else f" with think = {str(think).lower()}"
            raise GateError(
                f"{tag} gets another prompt than in training: {path} sends {found[max(at - 20, 0) : at + 60]!r} "
                f"instead of {expected[max(at - 20, 0) : at + 60]!r}",
                OWN_TEMPLATE if prompt.go_template else OTHER_RENDERING,
            )
    return len(cases)


def _cases(system: str, prompt: PromptFormat) -> Iterator[tuple[str | Sequence[Message], str, bool | None]]:
    """Yield what is asked, its prompt, and the request's `think`.

    A client that sets no `think`, or another one, must get the prompt of training too. Left out are probes that the
    format cannot write: an answer to continue, a system text where its template has no place.
    """
    for turns in PROBES:
        with suppress(ValueError):
            expected = prompt.render(with_system(turns, system))
            yield turns, expected, prompt.think
            if len(turns) == 1:
                yield turns[0]["content"], expected, prompt.think
    if prompt.think is not None:
        expected = prompt.render(with_system(PROBES[0], system))
        yield from ((PROBES[0], expected, think) for think in (None, not prompt.think))
        yield PROBES[0][0]["content"], expected, None
