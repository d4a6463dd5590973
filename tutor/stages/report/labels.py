"""The labels of training rows for the page: each token, and whether the token carries loss.

In: rows and the base's tokenizer. Out: runs of tokens. Checks nothing: the audit of the train stage does.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

from tutor.prompt.encoding import Encoded, RowEncoder
from tutor.prompt.format import Tokenizer
from tutor.prompt.messages import row_answer, row_messages, row_questions

SHOWN_ROWS = 3
"""Number of rows on the page."""
TEXTS = ("content", "reasoning")
"""Keys of a message that are trained or read."""
MAX_TOKENS_PER_CHARACTER = 12
"""Maximum number of tokens of one character, such as the bytes of a composed emoji."""


class Decoder(Tokenizer, Protocol):
    """A tokenizer that also decodes ids and lists its special tokens."""

    all_special_ids: list[int]

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Return the text of ids."""
        ...


def sample_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the shortest, a middle and the longest row; the middle one has several turns where any row has."""
    ordered = sorted(rows, key=lambda row: (_characters(row), row["instruction"]))
    if not ordered:
        return []
    several = [place for place, row in enumerate(ordered) if len(row_questions(row)) > 1]
    middle = several[len(several) // 2] if several else len(ordered) // 2
    return [ordered[place] for place in sorted({0, middle, len(ordered) - 1})[:SHOWN_ROWS]]


def _characters(row: Mapping[str, Any]) -> int:
    texts = (message.get(name, "") for message in [*row_messages(row, ""), row_answer(row)] for name in TEXTS)
    return sum(map(len, texts))


def labelled_runs(encoder: RowEncoder, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row as it is trained, once or answer by answer: runs of tokens, each with `carries_loss`.

    Each token has its text and `special`, each run with loss the number of its `answer` in the row. `part` of `parts`
    numbers the texts of one row, `turns` are the row's.
    """
    turns = len(row_questions(row))
    found = [_runs(encoder.tokenizer, encoded) for encoded in encoder.encode(row)]
    trained = [run for each in found for run in each["runs"] if run["carries_loss"]]
    for answer, run in enumerate(trained, turns - len(trained) + 1):  # the last ones, where not all carry loss
        run["answer"] = answer
    where = {"line": row.get("line"), "parts": len(found), "turns": turns}
    return [{**each, **where, "part": part} for part, each in enumerate(found, 1)]


def _runs(tokenizer: Any, encoded: Encoded) -> dict[str, Any]:
    runs = [
        {"carries_loss": bool(on), "tokens": _texts(tokenizer, [token for token, _ in pairs])}
        for on, pairs in ((on, list(found)) for on, found in groupby(_pairs(encoded), key=lambda pair: pair[1]))
    ]
    supervised = sum(encoded.mask)
    return {"runs": runs, "tokens": len(encoded.ids), "supervised": supervised}


def _pairs(encoded: Encoded) -> list[tuple[int, int]]:
    return list(zip(encoded.ids, encoded.mask, strict=True))


def _texts(tokenizer: Decoder, ids: Sequence[int]) -> list[dict[str, Any]]:
    """The texts of tokens; tokens that share one character (bytes of an accent) are one entry."""
    special, texts = set(tokenizer.all_special_ids), list[dict[str, Any]]()
    held: list[int] = []
    for token in ids:
        if token in special:
            if held:
                texts.append(_entry(tokenizer, held))
            texts.append({**_entry(tokenizer, [token]), "special": True})
            held = []
            continue
        held.append(token)
        entry = _entry(tokenizer, held)
        if "\N{REPLACEMENT CHARACTER}" not in entry["text"] or len(held) >= MAX_TOKENS_PER_CHARACTER:
            texts.append(entry)
            held = []
    return [*texts, _entry(tokenizer, held)] if held else texts


def _entry(tokenizer: Decoder, ids: Sequence[int]) -> dict[str, Any]:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return {"text": text.replace("\n", "↵\n"), "special": False}
