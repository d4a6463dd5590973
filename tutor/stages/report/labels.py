"""The label audit for people: rows of the training as it saw them, token by token, with what carries loss.

In: rows and the base's tokenizer. Out: runs of tokens for the page. Judges nothing: the train stage's audit does.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

from tutor.prompt import Encoded, Tokenizer, encode

SHOWN = 3
LONGEST_SIGN = 12
"""Tokens that one sign may be spread over: bytes of an emoji of several."""


class Decoder(Tokenizer, Protocol):
    """What is needed beside the contract: a text for ids, and which ids are no text."""

    all_special_ids: list[int]

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """The text of ids."""
        ...


def chosen(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The shortest row, one of the middle and the longest: what is cut is cut at the ends."""
    ordered = sorted(rows, key=lambda row: (len(row["instruction"]) + len(row["response"]), row["instruction"]))
    places = sorted({0, len(ordered) // 2, len(ordered) - 1}) if ordered else []
    return [ordered[place] for place in places[:SHOWN]]


def marked(tokenizer: Decoder, row: Mapping[str, Any], system: str) -> dict[str, Any]:
    """A row as its runs: each with `learnt`, and its tokens' texts with `special`."""
    encoded = encode(tokenizer, row["instruction"], row["response"], system)
    runs = [
        {"learnt": bool(on), "tokens": _texts(tokenizer, [token for token, _ in pairs])}
        for on, pairs in ((on, list(found)) for on, found in groupby(_pairs(encoded), key=lambda pair: pair[1]))
    ]
    supervised = sum(encoded.mask)
    return {"runs": runs, "tokens": len(encoded.ids), "supervised": supervised, "line": row.get("line")}


def _pairs(encoded: Encoded) -> list[tuple[int, int]]:
    return list(zip(encoded.ids, encoded.mask, strict=True))


def _texts(tokenizer: Decoder, ids: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens as texts: those that share one sign (bytes of an accent) are one entry."""
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
        if "\N{REPLACEMENT CHARACTER}" not in entry["text"] or len(held) >= LONGEST_SIGN:
            texts.append(entry)
            held = []
    return [*texts, _entry(tokenizer, held)] if held else texts


def _entry(tokenizer: Decoder, ids: Sequence[int]) -> dict[str, Any]:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return {"text": text.replace("\n", "↵\n"), "special": False}
