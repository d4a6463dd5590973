"""The interface of every engine: settings of a generation, an answer, the `Engine` protocol.

In: the recipe's generation settings. Out: the values that engines exchange with their callers. Generates nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from tutor.engines.answer_limit import max_new_tokens
from tutor.prompt.messages import Message
from tutor.prompt.tutor_format import STOPS
from tutor.recipe.settings import GenerateSettings

TOP_K = 40
"""Default number of candidates for sampling: Ollama's. The project's specification sets none; transformers has 50."""
SCORE_CHUNK_TOKENS = 256
"""Number of tokens whose logits are computed at a time when an answer is scored."""
Finish = Literal["eos", "stop", "length"]
"""Reason of an answer's end. eos: the end-of-sequence token; stop: a stop text; length: cut at max_new_tokens."""


@dataclass(frozen=True)
class Generation:
    """Settings of a generation; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int
    stops: tuple[str, ...] = STOPS
    top_k: int = TOP_K
    repeatable: bool = False  # equal answers whatever was asked before: without a prompt cache; greedy ones always are


@dataclass(frozen=True)
class Answer:
    """An answer. `text` keeps the leading blank of the prompt format and has no stop text, no EOS and no thought."""

    text: str
    finish: Finish
    prompt_tokens: int
    tokens: int  # generated, without EOS
    seconds: float  # from the request to the last token
    tokens_per_second: float  # of the generation, without the prompt
    thought: str = ""  # before the answer, without its tags


class Engine(Protocol):
    """A generator of answers. A KeyboardInterrupt stops an answer cleanly.

    `on_text` receives each piece of the generated text, a thought and its tags included.
    """

    name: str

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """The answer to the last message. Raises ServiceError when the engine fails."""
        ...


def sampling(settings: GenerateSettings, seed: int, stops: tuple[str, ...] = STOPS) -> Generation:
    """The generation settings of the served model; `stops` of its prompt format. See `max_new_tokens`."""
    return Generation(
        max_new_tokens=max_new_tokens(settings),
        temperature=settings.temperature,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        seed=seed,
        stops=stops,
    )


def greedy(settings: GenerateSettings, seed: int, stops: tuple[str, ...] = STOPS) -> Generation:
    """The generation settings of an evaluation: those of the served model at temperature 0, so that runs repeat."""
    return replace(sampling(settings, seed, stops), temperature=0.0, top_p=1.0)
