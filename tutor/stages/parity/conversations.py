"""The conversations that every engine is given in the parity gate: held-out rows, and texts that tend to break.

In: held-out rows, the recipe's system text. Out: conversations, each with how far it is taken. Asks no engine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tutor.prompt import Message, completion, render

Reach = Literal["everywhere", "served", "published", "nowhere"]
"""Who answers a conversation: every engine, the served file's and Ollama, Ollama alone, or (where it does not fit into
the context) none. All engines say how they prompt and read it."""

ACCENTS = "¿Qué significa «nulo» en TypeScript? ¡El pingüino y la cigüeña… — ÁÉÍÓÚ ñÑ, 20 €, cafe\u0301, 1\u00a0000!"
CODE = "Corrige:\n\n```ts\nfunction suma(a: number,\tb) {\n\treturn `${a} + ${b}`;\r\n}\n```\n  x   = 12345;"
EMOJI = "Explica 👩‍💻 y 👨‍👩‍👧‍👦 🏳️‍🌈 🇪🇸 con un enum."
SPECIALS = (
    "¿Qué hace <｜User｜>hola<｜Assistant｜><think>\n</think> y <|im_start|>system\n<|im_end|><|eot_id|></s>"
    " <｜begin▁of▁sentence｜><｜end▁of▁sentence｜> {{ .System }} {% raw %}?"
)
"""Text that a tokenizer or a template may take for its own; every engine has to take it for the same."""
TURNS = (
    "¿Qué es una tupla?",
    " Un array de longitud fija:\n\n```ts\nconst par: [string, number] = ['a', 1];\n```",
    "¿Y con nombres?",
    " También: `[x: number, y: number]`.\n",
    "Escribe una función que la reciba.",
)
FILLER = "El compilador comprueba los tipos antes de ejecutar nada; 3 veces de 4, basta con leer su mensaje.\n"


@dataclass(frozen=True)
class Conversation:
    """One conversation; where an answer is given, it is scored to its end by all that can."""

    name: str
    messages: tuple[Message, ...]
    reach: Reach
    answer: str | None = None  # of a row, without the contract's blank

    @property
    def prompt(self) -> str:
        """The prompt that it must have everywhere, without BOS: an empty system text is none."""
        return render([message for message in self.messages if message["role"] != "system" or message["content"]])


def conversations(
    rows: Sequence[tuple[str, str]], system: str, fits: Callable[[str], bool]
) -> tuple[Conversation, ...]:
    """The held-out rows (question, answer) and the fixed texts, each under the recipe's system text.

    `fits` says whether a prompt leaves room for an answer in the served context: one conversation just does.
    """
    made = [
        Conversation(f"held-out {number}", _talk(system, question), "everywhere", answer)
        for number, (question, answer) in enumerate(rows, 1)
    ]
    fixed = {"accents": ACCENTS, "code": CODE, "emoji": EMOJI, "special tokens": SPECIALS}
    made += [Conversation(name, _talk(system, text), "everywhere") for name, text in fixed.items()]
    made += [
        Conversation("several turns", _talk(system, *TURNS), "everywhere"),
        Conversation("empty system", ({"role": "system", "content": ""}, *_talk("", TURNS[0])), "served"),
    ]
    if rows:
        # The answer is all there: whoever has learnt where answers end says nothing more.
        question, answer = rows[0]
        made.append(Conversation("answered", _talk(system, question, completion(answer)), "served"))
    if fits(render(_talk(system, FILLER))):
        made.append(Conversation("long", _longest(system, fits), "published"))
    return tuple(item if fits(item.prompt) else replace(item, reach="nowhere") for item in made)


def _talk(system: str, *turns: str) -> tuple[Message, ...]:
    """User and assistant in turn, behind the system text where there is one."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return (*opening, *({"role": roles[place % 2], "content": text} for place, text in enumerate(turns)))


def _longest(system: str, fits: Callable[[str], bool]) -> tuple[Message, ...]:
    """A question of so many equal sentences as just fit."""
    low, high = 1, 2
    while fits(render(_talk(system, FILLER * high))):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(render(_talk(system, FILLER * middle))) else (low, middle)
    return _talk(system, FILLER * low)
