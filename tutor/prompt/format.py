"""What a prompt format provides to training, conversion and serving.

In: messages. Out: texts; encoding.py makes ids of them. The formats: tutor_format.py, and the template of a base.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tutor.prompt.messages import Message, row_messages


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that the prompt package uses."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """`input_ids` of a text, with the tokenizer's own special tokens or without."""
        ...


@dataclass(frozen=True)
class SplitAnswer:
    """What a model generated: its thought, "" where there is none, and its answer."""

    thought: str
    answer: str


class PromptFormat(Protocol):
    """One way to write conversations, equal in training and in every engine."""

    @property
    def kind(self) -> Literal["tutor", "base"]:
        """Value of the recipe's `prompt`."""
        ...

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer, in addition to the end-of-turn token."""
        ...

    @property
    def think(self) -> bool | None:
        """Value of `think` in requests to Ollama; None: not sent."""
        ...

    @property
    def tags(self) -> tuple[str, str]:
        """Texts around a thought in a generated text; empty where the format has no thoughts."""
        ...

    @property
    def end_id(self) -> int | None:
        """Id of the token that ends an answer; None: the tokenizer's EOS."""
        ...

    @property
    def go_template(self) -> str:
        """TEMPLATE of the Modelfile; empty: none, because the server renders the template in the GGUF."""
        ...

    def chat_template(self, *, add_bos: bool) -> str:
        """Return the Jinja template of the merged tokenizer, for a tokenizer that adds BOS to plain text or not."""
        ...

    def render(self, messages: Sequence[Message]) -> str:
        """Return the exact prompt text of a conversation, without a BOS that the tokenizer adds itself.

        A last assistant message is a prefill: the answer continues it. Raises ValueError for a conversation that the
        format cannot write.
        """
        ...

    def history(self, answer: Message) -> Message:
        """Return an earlier answer as an engine gets it back: the text that the model generated."""
        ...

    def completion(self, answer: Message) -> str:
        """Return the training target after the prompt; the end-of-turn token follows as an id, never as text."""
        ...

    def reply(self, text: str) -> SplitAnswer:
        """Return a generated text as thought and answer; the answer is unchanged, so that it can be sent as history."""
        ...


class AnswerText:
    """Sends the pieces of a generated text on, the thought and the answer apart.

    The beginning of a tag, and blanks before the first word, are held back until more of the text decides.
    """

    def __init__(
        self, prompt: PromptFormat, on_text: Callable[[str], None], on_thought: Callable[[str], None] | None = None
    ) -> None:
        self._prompt = prompt
        self._answer, self._thought = _Growing(on_text), _Growing(on_thought or _ignore)
        self._text = ""

    def add(self, piece: str) -> None:
        """Send what a further piece adds to the thought or the answer."""
        self._text += piece
        first, last = self._prompt.tags
        if first and first.startswith(self._text.strip()):
            return
        found = self._prompt.reply(self._text)
        thought = found.thought
        if not found.answer:
            thought = thought[: len(thought) - withheld(thought, (last,))].rstrip()
        self._thought.send(thought)
        if found.answer.strip():
            self._answer.send(found.answer)

    def close(self) -> SplitAnswer:
        """Send what was held back; return the whole text as thought and answer."""
        found = self._prompt.reply(self._text)
        self._thought.send(found.thought)
        self._answer.send(found.answer)
        return found


class _Growing:
    """Sends what a text has more than the last time."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._sent = ""

    def send(self, text: str) -> None:
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self._on_text(text[len(self._sent) :])
            self._sent = text


def withheld(text: str, awaited: Sequence[str]) -> int:
    """Return the number of last characters that may be the beginning of one of these texts: a tag, a stop text."""
    return max((n for each in awaited for n in range(len(each) - 1, 0, -1) if text.endswith(each[:n])), default=0)


def _ignore(piece: str) -> None:
    del piece


def served_messages(prompt: PromptFormat, messages: Sequence[Message]) -> list[Message]:
    """Return the messages of a row as an engine gets them: earlier answers as the model generates them."""
    return [prompt.history(message) if message["role"] == "assistant" else message for message in messages]


def asked_messages(prompt: PromptFormat, row: Mapping[str, Any], system: str) -> list[Message]:
    """Return the messages before the last answer of a row as an engine gets them; `system` is the recipe's text."""
    return served_messages(prompt, row_messages(row, system))


def end_token(prompt: PromptFormat, tokenizer: Tokenizer) -> int | None:
    """Return the id of the token that ends an answer; None where the tokenizer has no EOS and the format no other."""
    return tokenizer.eos_token_id if prompt.end_id is None else prompt.end_id
