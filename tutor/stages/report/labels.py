"""The labels of training rows for the page: each token, and whether the token carries loss.

In: rows and the base's tokenizer. Out: runs of tokens. Checks nothing: the audit of the train stage does.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

from tutor.prompt.encoding import Encoded, RowEncoder
from tutor.prompt.format import Tokenizer

SHOWN_ROWS = 3
"""Number of rows on the page."""
MAX_TOKENS_PER_CHARACTER = 12
"""Maximum number of tokens of one character, such as the bytes of a composed emoji."""


class Decoder(Tokenizer, Protocol):
    """A tokenizer that also decodes ids and lists its special tokens."""

    all_special_ids: list[int]

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        """Return the text of ids."""
        ...


def sample_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the shortest, a middle and the longest row."""
    ordered = sorted(rows, key=lambda row: (len(row["instruction"]) + len(row["response"]), row["instruction"]))
    places = sorted({0, len(ordered) // 2, len(ordered) - 1}) if ordered else []
    return [ordered[place] for place in places[:SHOWN_ROWS]]


def labelled_runs(encoder: RowEncoder, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row as it is trained, once or answer by answer: runs of tokens, each with `carries_loss`.

    Each token has its text and `special`.
    """
    return [{**_runs(encoder.tokenizer, encoded), "line": row.get("line")} for encoded in encoder.encode(row)]


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
