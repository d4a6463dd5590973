"""The prompt format, defined once for training and for every engine.

    [system\\n\\n]Instrucción: {question}\\nRespuesta:     the prompt: no token carries loss
     {answer}<EOS>                                       the completion: every token carries loss

In: questions, answers, messages. Out: the prompt text, the ids and loss mask of a training row, the Jinja template of
the tokenizer, the Go template and stop strings of Ollama, and an audit of rows against all of them. A later turn
follows its predecessor after one blank line. The prompt ends without a blank: the model itself produces ` {answer}`, so
history is sent unchanged, blank included. No template here writes BOS text for llama.cpp or Ollama: their tokenizers
add BOS exactly where training had it. Loads no tokenizer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tutor.errors import DataError

QUESTION = "Instrucción: "
CUE = "\nRespuesta:"
TURN_END = "\n\n"
STOPS = ("\nInstrucción:",)
"""Stop strings in addition to EOS: they end an answer that goes on with the next question."""

GO_TEMPLATE = (
    "{{ if .System }}{{ .System }}"
    + TURN_END
    + "{{ end }}"
    + QUESTION
    + "{{ .Prompt }}"
    + CUE
    + "{{ .Response }}"
    + TURN_END
)
"""Template of Ollama's legacy form: executed once a turn, and cut after `.Response` in the last turn (template.go)."""

JINJA_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- if message['content'] -%}{{- message['content'] + '\\n\\n' -}}{%- endif -%}"
    "{%- elif message['role'] == 'user' -%}{{- 'Instrucción: ' + message['content'] + '\\nRespuesta:' -}}"
    "{%- else -%}{{- message['content'] -}}{%- if not loop.last -%}{{- '\\n\\n' -}}{%- endif -%}"
    "{%- endif -%}{%- endfor -%}"
)
BOS_PREFIX = "{{- bos_token -}}"
"""Start of the Jinja template: apply_chat_template adds no BOS; llama.cpp strips it, and its tokenizer adds BOS."""

_BEFORE = re.compile(r"\A(?:\s*\n)?(?:[^\S\t](?=\S))?")
"""Blank lines at the start, and a single blank: more blanks, or a tab, are the indentation of code."""

Message = Mapping[str, str]
"""A message: `role` (system, user or assistant) and `content`."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that this module uses."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """`input_ids` of a text, with the tokenizer's own special tokens or without."""
        ...


@dataclass(frozen=True)
class Encoded:
    """One training row: token ids, and a mask that is 1 where an id carries loss."""

    ids: list[int]
    mask: list[int]

    @property
    def n_prompt(self) -> int:
        """Number of ids before the completion."""
        return self.mask.index(1)


def chat_template(*, add_bos: bool) -> str:
    """Return the Jinja template, with BOS for a tokenizer that adds BOS to plain text."""
    return (BOS_PREFIX if add_bos else "") + JINJA_TEMPLATE


def conversation(question: str, system: str = "") -> list[Message]:
    """Return one question as messages; an empty system text adds none."""
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": question}]


def render(messages: Sequence[Message]) -> str:
    """Return the exact prompt text, without BOS, of at most one system text and alternating user and assistant turns.

    A last assistant message is a prefill: the answer continues it.
    Raises ValueError where roles do not alternate or a text is empty (Ollama would silently drop a turn).
    """
    _check(messages)
    parts: list[str] = []
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "system":
            parts.append(content + TURN_END)
        elif message["role"] == "user":
            parts.append(QUESTION + content + CUE)
        else:
            parts.append(content + (TURN_END if index + 1 < len(messages) else ""))
    return "".join(parts)


def _check(messages: Sequence[Message]) -> None:
    turns = list(messages)
    if turns and turns[0]["role"] == "system":
        if not turns[0]["content"]:
            raise ValueError("an empty system text is no message: leave it out")
        turns = turns[1:]
    if not turns:
        raise ValueError("a conversation needs a question")
    for index, message in enumerate(turns):
        expected = "assistant" if index % 2 else "user"
        if message["role"] != expected:
            raise ValueError(f"turn {index + 1} must be from the {expected}, got {message['role']!r}")
        if not message["content"]:
            raise ValueError(f"turn {index + 1} ({expected}) is empty")


def trim(answer: str) -> str:
    """Return an answer without the blanks around it; an indentation of its first line, of two or more, stays."""
    return _BEFORE.sub("", answer).rstrip()


def completion(answer: str) -> str:
    """Return the training target after the cue: one blank and the answer. EOS follows as an id, never as text."""
    return " " + trim(answer)


def display_start(answer: str) -> str:
    """Return the beginning of an answer for display, without the blank of the prompt format."""
    return _BEFORE.sub("", answer.removeprefix(" "))


def display_text(answer: str) -> str:
    """Return an answer for display, without the blank of the prompt format and the blanks behind it."""
    return display_start(answer).rstrip()


def encode(tokenizer: Tokenizer, question: str, answer: str, system: str = "") -> Encoded:
    """Return ids and loss mask of one row: prompt ids as served, then the completion's ids and EOS.

    Raises DataError when the tokenizer has no EOS.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the base's tokenizer has no EOS token, so no answer could learn to end")
    prompt = list(tokenizer(render(conversation(question, system)))["input_ids"])
    target = list(tokenizer(completion(answer), add_special_tokens=False)["input_ids"])
    target.append(tokenizer.eos_token_id)
    return Encoded(prompt + target, [0] * len(prompt) + [1] * len(target))


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer puts BOS before plain text; measured, its configuration may be wrong."""
    ids = list(tokenizer("a")["input_ids"])
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def audit(row: Encoded, prompt_ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the faults of an encoded row; empty when there is none.

    `prompt_ids` are the ids that an engine sends for the same question. The faults are those that spoil a model without
    an error (docs/facts.md, 10): EOS not learnt, BOS missing or doubled, another prompt than the served one.
    """
    problems = []
    supervised = [token for token, on in zip(row.ids, row.mask, strict=True) if on]
    if not supervised:
        return ["no token carries loss"]
    if supervised[-1] != tokenizer.eos_token_id or row.mask[-1] != 1:
        problems.append("EOS is not supervised at the end")
    elif 0 in row.mask[row.n_prompt :]:
        problems.append("part of the completion carries no loss")
    ends = sum(token == tokenizer.eos_token_id for token in supervised)
    if ends > 1:
        problems.append("EOS is supervised more than once")
    expected = 1 if adds_bos(tokenizer) else 0
    found = row.ids.count(tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else 0
    if tokenizer.bos_token_id == tokenizer.eos_token_id:
        found -= ends
    if found != expected:
        problems.append(f"{found} BOS tokens instead of {expected}")
    if list(row.ids[: row.n_prompt]) != list(prompt_ids):
        problems.append("the served prompt is not a prefix of the row")
    return problems
