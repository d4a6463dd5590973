"""Rows as token ids and loss mask, and the audit of them.

In: a tokenizer, a prompt format, a row's messages. Out: ids exactly as an engine gets them, then those of the answer
and its end. Loads no tokenizer and cuts nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

from tutor.errors import DataError
from tutor.prompt.format import PromptFormat, Tokenizer, end_token, served_messages
from tutor.prompt.messages import Message, row_answer, row_messages
from tutor.prompt.tutor_format import TUTOR

LINE = "\n"
"""Text before a continuation whose ids are cut off."""
Pair = tuple[list[int], list[int]]
"""Ids of a prompt, and ids of its answer with the end-of-turn token."""


@dataclass(frozen=True)
class Encoded:
    """One training row: token ids, and a mask that is 1 where an id carries loss."""

    ids: list[int]
    mask: list[int]
    line: int = field(default=0, compare=False)  # of its row in the user's file

    @property
    def n_prompt(self) -> int:
        """Number of ids before the first answer."""
        return self.mask.index(1)

    def answers(self) -> list[Pair]:
        """Return every supervised answer, with all ids before it as its prompt."""
        return [(self.ids[:first], self.ids[first:last]) for first, last in _runs(self.mask)]


def encode(tokenizer: Tokenizer, question: str, answer: str, system: str = "", prompt: PromptFormat = TUTOR) -> Encoded:
    """Return ids and loss mask of one question and answer. Raises DataError when the tokenizer has no EOS."""
    (encoded,) = RowEncoder(tokenizer, prompt, system).encode({"instruction": question, "response": answer})
    return encoded


@dataclass(frozen=True)
class RowEncoder:
    """Makes ids of rows with the tokenizer and the settings of one training."""

    tokenizer: Tokenizer
    prompt: PromptFormat = TUTOR
    system: str = ""  # of the recipe
    loss: str = "all"  # the answers that carry loss: "all" or "last"

    @cached_property
    def line_ids(self) -> list[int]:
        """Return `line_ids` of the tokenizer, which is measured once."""
        return line_ids(self.tokenizer)

    def encode(self, row: Mapping[str, Any]) -> list[Encoded]:
        """Return a row as it is trained: each answer that carries loss, behind its prompt as served.

        Answers share one `Encoded` where the served prompt of the later one continues the ids of the earlier one. Else
        (a format that writes another end into the history, or leaves thoughts out of it) each has its own.
        Raises DataError when the tokenizer has no EOS, ValueError for a conversation that the format cannot write.
        """
        encoded = _encode_row(self, [*row_messages(row, self.system), row_answer(row)])
        return [replace(each, line=row.get("line", 0)) for each in encoded]

    def answers(self, row: Mapping[str, Any]) -> list[Pair]:
        """Return every answer of a row that carries loss, each with the ids of its prompt. Raises as `encode`."""
        return [pair for encoded in self.encode(row) for pair in encoded.answers()]


def _encode_row(encoder: RowEncoder, messages: Sequence[Message]) -> list[Encoded]:
    prompt = encoder.prompt
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    found: list[Encoded] = []
    for place in places if encoder.loss == "all" else places[-1:]:
        encoded = _encode_answer(encoder, served_messages(prompt, messages[:place]), messages[place])
        before = found[-1] if found else None
        if before and encoded.ids[: encoded.n_prompt][: len(before.ids)] == before.ids:
            mask = [*before.mask, *encoded.mask[len(before.ids) :]]
            found[-1] = Encoded(encoded.ids, mask)
        else:
            found.append(encoded)
    return found


def _encode_answer(encoder: RowEncoder, messages: Sequence[Message], answer: Message) -> Encoded:
    """Return prompt ids as served, then the answer's ids and the end-of-turn token."""
    tokenizer, prompt = encoder.tokenizer, encoder.prompt
    end = end_token(prompt, tokenizer)
    if end is None:
        raise DataError("the base's tokenizer has no EOS token, so no answer could learn to end")
    asked = list(tokenizer(prompt.render(messages))["input_ids"])
    target = [*continuation_ids(tokenizer, prompt.completion(answer), encoder.line_ids), end]
    return Encoded(asked + target, [0] * len(asked) + [1] * len(target))


def line_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of LINE where a tokenizer puts a blank before every text, as SentencePiece does; else none."""
    before, alone, together = (
        list(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in (LINE, "a", LINE + "a")
    )
    return before if before + alone != together and before == together[: len(before)] else []


def continuation_ids(tokenizer: Tokenizer, text: str, line: Sequence[int] | None = None) -> list[int]:
    """Return the ids of a text that continues a prompt: without the blank that SentencePiece puts before a text.

    `line` is `line_ids` of the tokenizer; None: measured now.
    """
    if before := list(line_ids(tokenizer) if line is None else line):
        continued = list(tokenizer(LINE + text, add_special_tokens=False)["input_ids"])
        if continued[: len(before)] == before:
            return continued[len(before) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer puts BOS before plain text; measured, its configuration may be wrong."""
    ids = list(tokenizer("a")["input_ids"])
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def audit(row: Encoded, prompt_ids: Sequence[int], tokenizer: Tokenizer, prompt: PromptFormat = TUTOR) -> list[str]:
    """Return the faults of an encoded row; empty when there is none.

    `prompt_ids` are the ids that an engine sends for the row's first answer. The faults are those that spoil a model
    without an error (docs/facts.md, 10): EOS not learnt, BOS missing or doubled, another prompt than the served one.
    """
    runs = [row.ids[first:last] for first, last in _runs(row.mask)]
    if not runs:
        return ["no token carries loss"]
    problems, end = [], end_token(prompt, tokenizer)
    if runs[-1][-1] != end or row.mask[-1] != 1:
        problems.append("EOS is not supervised at the end")
    elif any(run[-1] != end for run in runs):
        problems.append("part of the completion carries no loss")
    ends = sum(run.count(end) for run in runs if end is not None)
    if ends > len(runs):
        problems.append("EOS is supervised more than once")
    problems += _bos_problems(row, ends, tokenizer, prompt)
    if list(row.ids[: row.n_prompt]) != list(prompt_ids):
        problems.append("the served prompt is not a prefix of the row")
    return problems


def _bos_problems(row: Encoded, ends: int, tokenizer: Tokenizer, prompt: PromptFormat) -> list[str]:
    expected = 1 if adds_bos(tokenizer) else 0
    bos = tokenizer.bos_token_id
    if prompt.kind == "base":  # a template may begin every turn with BOS; twice at the start is one too many
        found = next((place for place, token in enumerate(row.ids) if token != bos), len(row.ids))
        return [f"{found} BOS tokens at the start"] if found > 1 or found < expected else []
    found = row.ids.count(bos) if bos is not None else 0
    if bos == tokenizer.eos_token_id:
        found -= ends
    return [f"{found} BOS tokens instead of {expected}"] if found != expected else []


def _runs(mask: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield first and last (exclusive) place of every run of ids with loss."""
    first = 0
    for on, group in groupby(mask):
        last = first + sum(1 for _ in group)
        if on:
            yield first, last
        first = last
