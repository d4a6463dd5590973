"""What every engine takes and gives: settings of a generation in, an answer with its finish reason out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from tutor.prompt import STOPS, Message
from tutor.recipe.settings import GenerateSettings

SCORE_ROWS = 256
"""Number of tokens whose logits are computed at a time when an answer is scored."""
Finish = Literal["stop", "length"]
"""stop: the model ended by EOS or a stop text; length: it was cut at max_new_tokens."""


@dataclass(frozen=True)
class Generation:
    """How to generate; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int
    stops: tuple[str, ...] = STOPS


@dataclass(frozen=True)
class Answer:
    """What came, as it came: `text` keeps the contract's leading blank, stop text and EOS are not in it."""

    text: str
    finish: Finish
    prompt_tokens: int
    tokens: int  # generated, EOS not counted
    seconds: float  # from the request to the last token
    tokens_per_second: float  # of generation alone


class Engine(Protocol):
    """Answers conversations. `on_text` receives the pieces while they come; a KeyboardInterrupt stops cleanly."""

    name: str

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """The answer to the last message. Raises ServiceError when the engine fails."""
        ...


def sampling(settings: GenerateSettings, seed: int) -> Generation:
    """As the recipe serves it."""
    return Generation(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        repetition_penalty=settings.repetition_penalty,
        seed=seed,
    )


def greedy(settings: GenerateSettings, seed: int) -> Generation:
    """For evaluation: as the recipe serves it, at temperature 0, so that two runs say the same."""
    return replace(sampling(settings, seed), temperature=0.0, top_p=1.0)
