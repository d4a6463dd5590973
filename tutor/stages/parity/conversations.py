"""The conversations of the parity gate: held-out rows, and texts that often break tokenizers and templates.

In: held-out rows, the recipe's system text. Out: conversations, each with its reach. Runs no engine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from tutor.prompt.format import PromptFormat, asked_messages
from tutor.prompt.messages import Message, row_answer
from tutor.prompt.tutor_format import TUTOR

Reach = Literal["everywhere", "served", "published", "nowhere"]
"""Engines that answer a conversation: all, those of the served file and Ollama, Ollama alone, or none (the prompt does
not fit into the context). All engines render and tokenize every conversation."""

ACCENTS = "¿Qué significa «nulo» en TypeScript? ¡El pingüino y la cigüeña… — ÁÉÍÓÚ ñÑ, 20 €, cafe\u0301, 1\u00a0000!"
CODE = "Corrige:\n\n```ts\nfunction suma(a: number,\tb) {\n\treturn `${a} + ${b}`;\r\n}\n```\n  x   = 12345;"
EMOJI = "Explica 👩‍💻 y 👨‍👩‍👧‍👦 🏳️‍🌈 🇪🇸 con un enum."
SPECIALS = (
    "¿Qué hace <｜User｜>hola<｜Assistant｜><think>\n</think> y <|im_start|>system\n<|im_end|><|eot_id|></s>"
    " <｜begin▁of▁sentence｜><｜end▁of▁sentence｜> {{ .System }} {% raw %}?"
)
"""Text that tokenizers or templates may interpret; every engine must interpret it in the same way."""
TURNS = (
    "¿Qué es una tupla?",
    " Un array de longitud fija:\n\n```ts\nconst par: [string, number] = ['a', 1];\n```",
    "¿Y con nombres?",
    " También: `[x: number, y: number]`.\n",
    "Escribe una función que la reciba.",
)
ASKED_AGAIN = (*TURNS[:-1], TURNS[0])
"""The first question again: an answer would repeat the one in the prompt, which the repetition penalty prevents.

The first answer is more than 64 tokens back, beyond Ollama's default window."""
CONTROL_TEXTS = "special tokens"
"""Name of the conversation of SPECIALS."""
FILLER = "El compilador comprueba los tipos antes de ejecutar nada; 3 veces de 4, basta con leer su mensaje.\n"
"""Sentence of the longest conversation, repeated up to the context."""


@dataclass(frozen=True)
class Conversation:
    """One conversation; engines that can score do so for its given answer."""

    name: str
    messages: tuple[Message, ...]  # as an engine gets them
    reach: Reach
    answer: Message | None = None  # of a row
    penalised: bool = False  # answered with the repetition penalty that is served; all others without one

    def prompt(self, prompt: PromptFormat) -> str:
        """Return the prompt that every engine must render, without BOS; an empty system text is left out."""
        return prompt.render(
            [message for message in self.messages if message["role"] != "system" or message["content"]]
        )


def make_conversations(
    rows: Sequence[Mapping[str, Any]], system: str, fits: Callable[[str], bool], prompt: PromptFormat = TUTOR
) -> tuple[Conversation, ...]:
    """Return the conversations of held-out rows and of the fixed texts, with the recipe's system.

    `fits` returns whether a prompt leaves enough context for an answer: one conversation has the longest such prompt.
    """
    asked = [tuple(asked_messages(prompt, row, system)) for row in rows]
    answers = [row_answer(row) for row in rows]
    made = [
        Conversation(f"held-out {number}", messages, "everywhere", answer)
        for number, (messages, answer) in enumerate(zip(asked, answers, strict=True), 1)
    ]
    fixed = {"accents": ACCENTS, "code": CODE, "emoji": EMOJI, CONTROL_TEXTS: SPECIALS}
    made += [Conversation(name, _messages(system, text), "everywhere") for name, text in fixed.items()]
    made.append(Conversation("several turns", _messages(system, *TURNS), "everywhere"))
    made.append(Conversation("repetition penalty", _messages(system, *ASKED_AGAIN), "everywhere", penalised=True))
    own = prompt.kind == "tutor"  # engines write an empty system text and a prefill by a base's template in other ways
    if own:
        empty = ({"role": "system", "content": ""}, *_messages("", TURNS[0]))
        made.append(Conversation("empty system", empty, "served"))
    if own and rows:
        # The answer is complete: a model that has learnt to end answers generates EOS only.
        made.append(Conversation("answered", (*asked[0], prompt.history(answers[0])), "served"))
    if fits(prompt.render(_messages(system, FILLER))):
        made.append(Conversation("long", _longest(system, lambda messages: fits(prompt.render(messages))), "published"))
    return tuple(item if fits(item.prompt(prompt)) else replace(item, reach="nowhere") for item in made)


def _messages(system: str, *turns: str) -> tuple[Message, ...]:
    """Alternating user and assistant messages, after the system text where there is one."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return (*opening, *({"role": roles[place % 2], "content": text} for place, text in enumerate(turns)))


def _longest(system: str, fits: Callable[[Sequence[Message]], bool]) -> tuple[Message, ...]:
    """A question of as many equal sentences as fit."""
    low, high = 1, 2
    while fits(_messages(system, FILLER * high)):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(_messages(system, FILLER * middle)) else (low, middle)
    return _messages(system, FILLER * low)
