"""Encode the rows for the trainer, and check that its collator returns them unchanged.

In: rows of a split, the trainer. Out: ids and masks, labels; DataError for a row that is too long, that holds a control
token, or that the collator changes. Does not change the rows or the trainer.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.errors import DataError, RecipeError
from tutor.formats.rows.control_tokens import INSTEAD, control_tokens, refuse_rows
from tutor.prompt.encoding import Encoded, RowEncoder, audit
from tutor.prompt.format import PromptFormat
from tutor.prompt.messages import row_texts
from tutor.prompt.tutor_format import TUTOR
from tutor.stages.train.kernels.chunked_loss import IGNORE_INDEX
from tutor.stages.train.kernels.packed_attention import split_rows

if TYPE_CHECKING:
    from transformers import Trainer


def encode_rows(
    encoder: RowEncoder, rows: Sequence[Mapping[str, Any]], max_length: int, file: Path | None = None
) -> list[Encoded]:
    """Return the ids and masks of all rows, uncut, one or more a row; `file` is the user's file that they come from.

    Raises DataError listing rows that are longer than `max_length`, or that the prompt format cannot write.
    """
    encoded = [_encode(encoder, row, file) for row in rows]
    long = [
        f"{_place(file, source)}{max(lengths)} tokens: {source['instruction'][:60]!r}"
        for lengths, source in zip([[len(each.ids) for each in group] for group in encoded], rows, strict=True)
        if max(lengths) > max_length
    ]
    if long:
        raise DataError(
            f"{len(long)} of {len(rows)} rows are longer than train.max_length ({max_length} tokens)",
            "raise it, or shorten them: a cut row would never show the model its end",
            problems=tuple(long[:20]),
        )
    return [each for group in encoded for each in group]


def _encode(encoder: RowEncoder, row: Mapping[str, Any], file: Path | None) -> list[Encoded]:
    try:
        return encoder.encode(row)
    except ValueError as error:
        raise DataError(
            f"{_place(file, row)}the prompt cannot be written: {error}", "change or delete the row"
        ) from None


def _place(file: Path | None, row: Mapping[str, Any]) -> str:
    return f"{file}:{row.get('line')}: " if file else ""


def refuse_control_tokens(encoder: RowEncoder, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Check that no text gives a control token of the base; each row has its file and line.

    Raises RecipeError for the system text, DataError that lists the first rows.
    """
    tokenizer: Any = encoder.tokenizer
    tokens = control_tokens(tokenizer.added_tokens_decoder, tokenizer("a")["input_ids"], tokenizer.get_vocab())

    def found(text: str) -> list[str]:
        return tokens.found(tokenizer(text)["input_ids"], text)

    if held := found(encoder.system):
        raise RecipeError(f"system holds {', '.join(held)}, a control token of the base", INSTEAD)
    refuse_rows([(where, found("\n".join(row_texts(row)))) for where, row in rows])


def audit_labels(trainer: "Trainer", rows: Sequence[Encoded], tokenizer: Any, prompt: PromptFormat = TUTOR) -> int:
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
        found = audit(Encoded(ids, mask), row.ids[: row.n_prompt], tokenizer, prompt)
        if not found and (ids, mask) != (row.ids, row.mask):
            found = ["it is another row"]
        problems += [f"train row {number}: {problem}" for problem in found]
    if problems:
        raise DataError(f"{len(problems)} breaches of the prompt contract", problems=tuple(problems[:20]))
    return len(rows)


def label_ids(row: Encoded) -> list[int]:
    """Return a row's ids where they carry loss, IGNORE_INDEX elsewhere."""
    return [token if on else IGNORE_INDEX for token, on in zip(row.ids, row.mask, strict=True)]
