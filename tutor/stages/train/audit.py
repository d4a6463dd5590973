"""Encode the rows for the trainer, and check that its collator returns them unchanged.

In: rows of a split, the trainer. Out: ids and masks, labels; DataError for a row that is too long, that holds a control
token, or that the collator changes. Does not change the rows or the trainer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.errors import DataError, RecipeError
from tutor.formats.rows.control_tokens import INSTEAD, control_tokens, refuse_rows
from tutor.prompt.encoding import Encoded, audit, encode
from tutor.prompt.format import Tokenizer
from tutor.stages.train.kernels.chunked_loss import IGNORE_INDEX
from tutor.stages.train.kernels.packed_attention import split_rows

if TYPE_CHECKING:
    from transformers import Trainer


def encode_rows(
    tokenizer: Tokenizer, rows: Sequence[Mapping[str, Any]], system: str, max_length: int, file: Path | None = None
) -> list[Encoded]:
    """Return the ids and masks of all rows, uncut; `file` is the user's file that they come from.

    Raises DataError listing rows that are longer than `max_length`.
    """
    encoded = [encode(tokenizer, row["instruction"], row["response"], system) for row in rows]
    long = [
        f"{_place(file, source)}{len(row.ids)} tokens: {source['instruction'][:60]!r}"
        for row, source in zip(encoded, rows, strict=True)
        if len(row.ids) > max_length
    ]
    if long:
        raise DataError(
            f"{len(long)} of {len(rows)} rows are longer than train.max_length ({max_length} tokens)",
            "raise it, or shorten them: a cut row would never show the model its end",
            problems=tuple(long[:20]),
        )
    return encoded


def _place(file: Path | None, row: Mapping[str, Any]) -> str:
    return f"{file}:{row.get('line')}: " if file else ""


def encode_prompts(tokenizer: Tokenizer, rows: Sequence[Mapping[str, str]], system: str) -> list[Encoded]:
    """Return the ids of the evaluation prompts, each with an empty answer."""
    return [encode(tokenizer, row["instruction"], "", system) for row in rows]


def refuse_control_tokens(tokenizer: Any, rows: Sequence[tuple[str, Encoded]], system: str) -> None:
    """Check that no text gives a control token of the base; `rows` are encoded, each with its file and line.

    Raises RecipeError for the system text, DataError that lists the first rows.
    """
    tokens = control_tokens(tokenizer.added_tokens_decoder, encode(tokenizer, "a", "a").ids)
    if held := tokens.found(encode(tokenizer, "a", "a", system).ids):
        raise RecipeError(f"system holds {', '.join(held)}, a control token of the base", INSTEAD)
    refuse_rows([(where, tokens.found(row.ids)) for where, row in rows])


def audit_labels(trainer: "Trainer", rows: Sequence[Encoded], tokenizer: Any) -> int:
    """Collate every row as the trainer does and check the result against the prompt contract; return their number.

    Raises DataError listing the first rows that break it: this finds a library that drops, cuts or masks.
    """
    dataset = trainer.train_dataset
    if len(dataset) != len(rows):
        raise DataError(f"the trainer kept {len(dataset)} of {len(rows)} rows", "this is a library's doing: report it")
    size = trainer.args.per_device_train_batch_size
    batches = (list(dataset.select(range(at, min(at + size, len(rows))))) for at in range(0, len(rows), size))
    read = [row for items in batches for row in split_rows(trainer.data_collator(items))]
    problems = []
    for number, ((ids, marks), row) in enumerate(zip(read, rows, strict=True), 1):
        mask = [int(label != IGNORE_INDEX) for label in marks]
        found = audit(Encoded(ids, mask), row.ids[: row.n_prompt], tokenizer)
        if not found and (ids, mask) != (row.ids, row.mask):
            found = ["it is another row"]
        problems += [f"train row {number}: {problem}" for problem in found]
    if problems:
        raise DataError(f"{len(problems)} breaches of the prompt contract", problems=tuple(problems[:20]))
    return len(rows)


def label_ids(row: Encoded) -> list[int]:
    """Return a row's ids where they carry loss, IGNORE_INDEX elsewhere."""
    return [token if on else IGNORE_INDEX for token, on in zip(row.ids, row.mask, strict=True)]
