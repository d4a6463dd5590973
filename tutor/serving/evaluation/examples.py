"""Examples for a model that was not tuned: rows of the training split as earlier turns of a conversation.

In: the training rows, the held-out prompts. Out: the same few rows for every prompt, or the rows that are most similar
to each prompt (BM25, by bm25s); a prompt with its examples. Reads no file and knows no held-out row.
"""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from tutor.prompt.messages import Message, row_answer, row_messages

Row = Mapping[str, Any]

WORDS = r"(?u)\b\w\w+\b"
"""Terms of the index: words of two letters and more, as bm25s has them by default."""
LETTER_PAIRS = r"(?u)(?=(\w\w))"
"""Terms of a language that writes no blanks between words: every two letters that are neighbours."""
WITHOUT_BLANKS = ("ja", "th", "zh")
"""Languages that are written without blanks between words, as ISO 639-1 codes."""


def fixed_examples(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Choose examples by chance, from each category in turn; the first ones of a larger `count` are those of a smaller.

    The choice depends on the rows and the seed, not on the order of the rows.
    """
    by_category: defaultdict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: _rank(seed, row)):
        by_category[row.get("category", "")].append(row)
    groups = sorted(by_category.values(), key=lambda group: _rank(seed, group[0]))
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*groups))
    return [row for row in in_turn if row is not None][:count]


def _rank(seed: int, row: Row) -> str:
    return hashlib.sha256(f"{seed}\0{row['instruction']}\0{row['response']}".encode()).hexdigest()


def similar_rows(rows: Sequence[Row], prompts: Sequence[Row], count: int, language: str) -> list[list[Row]]:
    """Return the rows that are most similar to each prompt, the most similar one first; all rows for a larger `count`.

    Terms of a row's questions and answer count, and of a prompt its questions. Rows of equal score have their order.
    """
    import bm25s  # 0.2 s: only this command needs it

    def terms(texts: Sequence[str]) -> list[list[str]]:
        pattern = LETTER_PAIRS if language in WITHOUT_BLANKS else WORDS
        found = bm25s.tokenize(
            list(texts), stopwords=None, token_pattern=pattern, return_ids=False, show_progress=False
        )
        return [list(each) for each in found]

    documents = terms([_text([*row_messages(row, ""), row_answer(row)]) for row in rows])
    if not any(documents):
        return [list(rows[:count]) for _ in prompts]
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    chosen = []
    for asked in terms([_text(row_messages(prompt, "")) for prompt in prompts]):
        scores = index.get_scores(asked) if asked else [0.0] * len(rows)
        best = sorted(range(len(rows)), key=lambda place: (-float(scores[place]), place))[:count]
        chosen.append([rows[place] for place in best])
    return chosen


def _text(messages: Sequence[Message]) -> str:
    return "\n\n".join(message["content"] for message in messages if message["role"] != "system")


def with_examples(prompt: Row, examples: Sequence[Row]) -> dict[str, Any]:
    """Return a prompt whose conversation begins with the examples, behind its own system text where it has one.

    An example is the whole conversation of its row without its system text and without thoughts.
    """
    turns = [
        {"role": message["role"], "content": message["content"]}
        for row in examples
        for message in (*row_messages(row, ""), row_answer(row))
        if message["role"] != "system"
    ]
    history = list(prompt.get("history", ()))
    own = 1 if history and history[0]["role"] == "system" else 0
    return {**prompt, "history": [*history[:own], *turns, *history[own:]]}
