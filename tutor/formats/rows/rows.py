"""The rows of a user's file: their keys and types, and the checks that each row passes.

In: a file in any form that importing/ reads. Out: rows to train on or to ask, and notes on all that was tolerated. A
row that is not usable is an error with its line; nothing is guessed. Does not tokenize, and does not compile code.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from tutor.errors import DataError
from tutor.formats.importing.names import Options, Recognised
from tutor.formats.importing.reading import open_rows
from tutor.formats.markdown import fence_languages
from tutor.formats.rows.conversations import MESSAGES, flatten
from tutor.formats.rows.json_values import ONE_LINE, TOO_DEEP, RowError, kind, printable
from tutor.formats.rows.jsonl import Limits, check_file, unchanged
from tutor.formats.rows.texts import TURNS_AS_TEXT, clean_answer, clean_text, some_text, without_marks
from tutor.prompt.tutor_format import CUE, STOPS

MAX_DEPTH = 16
"""Maximum depth of lists and objects inside each other; a row needs four."""
OTHER_FORM = "a row is instruction and response, both text, or messages: tutor data import changes other forms"
"""Next step for a row of another form."""
IN_INSTRUCTION = "put all of the question into instruction, and a system text for every row into the recipe's system"
"""Next step for a row with a part of its question under another key."""
QUESTION_KEYS = frozenset(
    ("input", "context", "system", "system_prompt", "history", "conversations", "prompt", "question")
)
"""Keys of other formats that hold a part of the question: dropped, the rest would be trained as if it were all."""
WANTED = {"string_type": "a text", "list_type": "a list", "bool_type": "true or false", "model_type": "an object"}
"""Expected type in words, by pydantic's name of the error."""


@dataclass(frozen=True)
class Notes:
    """Counts of what was tolerated in one file; lines count from 1."""

    file: str  # name without folders, so that outputs do not depend on its place
    sha256: str  # of the file on disk
    rows: int  # blank lines not counted
    blank_lines: int = 0
    byte_order_marks: int = 0
    gzip_unnamed: bool = False  # gzip by its content, not by its name
    windows_line_ends: int = 0  # rows with a text that had CRLF
    read_as: str = ""  # container and formats; "" for JSON Lines of tutor's own rows
    dropped_keys: Mapping[str, int] = field(default_factory=dict)  # unknown key -> rows
    duplicates: tuple[tuple[int, int], ...] = ()  # dropped line, equal line that was kept
    conflicts: tuple[tuple[int, ...], ...] = ()  # lines of one question with different answers

    def as_dict(self) -> dict[str, Any]:
        """Return the notes as JSON values."""
        pairs = {"duplicates": list(map(list, self.duplicates)), "conflicts": list(map(list, self.conflicts))}
        return {**asdict(self), **pairs}

    def warnings(self) -> list[str]:
        """Return a line for each kind of note; empty when nothing was tolerated."""
        texts = [f"read as {self.read_as}"] if self.read_as else []
        if self.blank_lines:
            texts.append(f"{self.blank_lines} blank lines skipped")
        if self.byte_order_marks:
            texts.append("byte order mark (BOM) stripped")
        if self.gzip_unnamed:
            texts.append("is gzip, though its name does not end in .gz")
        if self.windows_line_ends:
            texts.append(f"line ends of Windows (CRLF) in the texts of {self.windows_line_ends} rows read as LF")
        if self.dropped_keys:
            counts = ", ".join(f"{key} ({count} rows)" for key, count in list(self.dropped_keys.items())[:5])
            texts.append(f"unknown keys dropped: {counts}")
        if self.duplicates:
            lines = ", ".join(f"{dropped} (= {kept})" for dropped, kept in self.duplicates[:10])
            texts.append(f"{len(self.duplicates)} duplicate rows dropped: lines {lines}")
        if self.conflicts:
            groups = "; ".join(", ".join(map(str, lines)) for lines in self.conflicts[:10])
            texts.append(f"{len(self.conflicts)} questions with different answers: lines {groups}")
        return [f"{self.file}: {text}" for text in texts]


_Text = Annotated[str, AfterValidator(clean_text)]
_Some = Annotated[_Text, AfterValidator(some_text)]
_Answer = Annotated[str, AfterValidator(clean_answer)]
_SomeAnswer = Annotated[_Answer, AfterValidator(some_text)]
_NO_STOP = AfterValidator(partial(without_marks, marks=STOPS))
_NO_TURN = AfterValidator(partial(without_marks, marks=(CUE, *STOPS)))


class _System(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["system"]
    content: _Some


class _Question(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["user"]
    content: Annotated[_Some, _NO_TURN]


class _EarlierAnswer(BaseModel):
    model_config = ConfigDict(strict=True)

    role: Literal["assistant"]
    content: Annotated[_SomeAnswer, _NO_STOP]
    reasoning: _Answer = ""


_History = list[Annotated[_System | _Question | _EarlierAnswer, Field(discriminator="role")]]


class _Expect(BaseModel):
    """Conditions on an answer. An unknown key is an error here: a misspelt condition would never be checked."""

    model_config = ConfigDict(strict=True, extra="forbid")

    code: bool = True
    include: list[Annotated[list[_Some], Field(min_length=1)]] = []
    exclude: list[_Some] = []


class PromptRow(BaseModel):
    """One row to ask; its response is the author's reference."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: Any = None  # for the user's own purposes
    instruction: Annotated[_Some, _NO_TURN]
    response: Annotated[_Answer, _NO_STOP] = ""
    category: _Text = ""
    topic: _Text = ""
    code: list[_Some] = []
    expect: _Expect = _Expect()
    history: _History = []
    reasoning: _Answer = ""  # of the reference: not used


class ExampleRow(BaseModel):
    """One row to train on."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: Any = None
    instruction: Annotated[_Some, _NO_TURN]
    response: Annotated[_SomeAnswer, _NO_STOP]
    category: _Text = ""
    topic: _Text = ""
    code: list[_Some] = []
    history: _History = []
    reasoning: _Answer = ""


RowModel = TypeVar("RowModel", ExampleRow, PromptRow)


def read_rows(
    path: Path, model: type[RowModel], *, strict: bool, limits: Limits
) -> tuple[list[tuple[int, RowModel]], Notes]:
    """Return every row with its line, checked against `model`. `strict`: an unknown key is an error, not dropped.

    Raises DataError with the problems of the file, RecipeError when there is no such file, ArtifactError when it
    changes meanwhile.
    """
    check_file(path, limits.max_total_bytes)
    tolerated, recognised, dropped = Counter[str](), Recognised(), Counter[str]()
    rows: list[tuple[int, RowModel]] = []
    faults: list[tuple[int, RowError]] = []
    bad = 0
    with unchanged(path) as sha256:
        for line, found in open_rows(path, limits, tolerated, Options(answered=model is ExampleRow), recognised):
            try:
                rows.append((line, parse_row(found, model, dropped, strict=strict, turns_as_text=limits.turns_as_text)))
                tolerated["crlf"] += any(isinstance(text, str) and "\r\n" in text for text in found.values())
            except RowError as fault:
                bad += 1
                if bad <= limits.max_problems:
                    faults.append((line, fault))
        if bad:
            raise _all_problems(path, faults, bad, bad + len(rows))
        if not rows:
            raise DataError(f"{path}: 0 rows" + (f", {tolerated['blank']} blank lines" if tolerated["blank"] else ""))
    return rows, Notes(
        file=path.name,
        sha256=sha256,
        rows=len(rows),
        blank_lines=tolerated["blank"],
        byte_order_marks=tolerated["bom"],
        windows_line_ends=tolerated["crlf"],
        gzip_unnamed=bool(tolerated["gzip"]) and path.suffix.lower() != ".gz",
        dropped_keys=dict((dropped + recognised.dropped).most_common(20)),
        read_as="" if recognised.is_own() else recognised.describe(),
    )


def _all_problems(path: Path, faults: list[tuple[int, RowError]], bad: int, count: int) -> DataError:
    listed = f" (the first {len(faults)} are listed)" if bad > len(faults) else ""
    return DataError(
        f"{path}: {bad} of {count} rows are not usable{listed}",
        next((fault.hint for _, fault in faults if fault.hint), "correct these lines"),
        tuple(f"{path}:{line}: {fault}" for line, fault in faults),
    )


def parse_row(
    found: Any, model: type[RowModel], dropped: Counter[str], *, strict: bool, turns_as_text: bool = False
) -> RowModel:
    """Return a JSON value as `model`; count its unknown keys in `dropped`. Raises RowError, also one given as value."""
    if isinstance(found, RowError):
        raise found
    if not isinstance(found, dict):
        raise RowError(f"is {kind(found)}, not an object", ONE_LINE if isinstance(found, list) else None)
    if not found.keys() & {"instruction", "response", MESSAGES}:
        keys = ", ".join(printable(key) for key in list(found)[:5])
        required = ",".join(name for name, item in model.model_fields.items() if item.is_required())
        raise RowError(f"found key {keys or '(none)'}; expected {required}", OTHER_FORM)
    known = _keys(model)
    unknown = sorted(printable(key) for key in found.keys() - known)
    if unknown and strict:
        raise RowError(f"unknown key {', '.join(unknown)}; known: {', '.join(known)}")
    _check_keys(found, known)
    if _depth_exceeds(found, MAX_DEPTH):
        raise RowError(TOO_DEEP)
    several = MESSAGES in found
    try:
        context = TURNS_AS_TEXT if turns_as_text else None
        given = {key: value for key, value in found.items() if key != "history"}
        row = model.model_validate(flatten(given, answered=model is ExampleRow) if several else given, context=context)
    except ValidationError as error:
        items = error.errors(include_url=False)
        turns = any(item["type"] == "string_type" and isinstance(item["input"], list | dict) for item in items)
        explained = "; ".join(_explain(item, several=several) for item in items[:3])
        raise RowError(explained, OTHER_FORM if turns else None) from None
    _check_code(row)
    dropped.update(unknown)
    return row


def _keys(model: type[BaseModel]) -> list[str]:
    """Keys of a row in a file: `messages` stands for the history too."""
    return [MESSAGES if name == "history" else name for name in model.model_fields]


def _check_keys(found: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise RowError for an unknown key that must not be dropped: misspelt, or with a part of the question."""
    for key in found.keys() - set(known):
        name = key.strip().casefold()
        if name in known:
            raise RowError(f"key {printable(key)!r} is written {name!r}", "keys are in lower case: rename it")
        value = found[key]
        if name in QUESTION_KEYS and (value.strip() if isinstance(value, str) else value):
            raise RowError(f"{printable(key)} holds a part of the question, which would not be trained", IN_INSTRUCTION)


def _depth_exceeds(value: Any, most: int) -> bool:
    """Whether lists and objects are nested deeper than `most` levels; later readers may recurse."""
    level = [value]
    while level and most:
        groups = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        level = [child for group in groups for child in group]
        most -= 1
    return bool(level)


def _check_code(row: ExampleRow | PromptRow) -> None:
    if not row.code:
        return
    asked = len(fence_languages(row.instruction))
    both = asked + len(fence_languages(row.response))
    if len(row.code) != both and not (isinstance(row, PromptRow) and len(row.code) == asked):
        raise RowError(f"code has {len(row.code)} entries for {both} fenced blocks", "give one a block, or no code")


def _explain(item: Any, *, several: bool = False) -> str:
    """One of pydantic's errors as a problem of a row; `several`: the row has messages."""
    name = _place(item["loc"]) if several else ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"lacks {name}"
    if item["type"] == "extra_forbidden":
        return f"unknown key {printable(name)}"
    if item["type"] == "too_short":
        return f"{name} is empty"
    if item["type"] in WANTED:
        return f"{name} is {kind(item['input'])}, not {WANTED[item['type']]}"
    return f"{name} {item['msg'].removeprefix('Value error, ')}"


def _place(location: Sequence[Any]) -> str:
    """Name of a value of a row with messages."""
    if location[0] == "history" and len(location) > 2:
        return f"{MESSAGES}[{location[1]}].{location[-1]}"
    last = {"instruction": "the last question", "response": "the last answer", "reasoning": "the last reasoning"}
    return last.get(str(location[0]), ".".join(str(part) for part in location))
