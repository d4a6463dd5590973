"""Names of the parts of a row in the formats that are read, and the options of a reading.

In: a name as it is written in a file. Out: the part of a row that it names. Knows no values (shapes.py).
"""

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tutor.errors import RecipeError

QUESTIONS = ("instruction", "question", "query", "prompt", "problem", "pregunta", "instrucción", "instruccion")
"""Names of a question."""
ANSWERS = ("response", "output", "answer", "completion", "solution", "respuesta")
"""Names of an answer."""
EXTRAS = ("input", "context", "contexto")
"""Names of a second part of the question; `input` alone is the question."""
TURNS = ("messages", "conversations", "conversation")
"""Names of a list of messages."""
SYSTEMS = ("system", "system_prompt")
"""Names of a system text."""
THOUGHTS = ("reasoning", "reasoning_content", "thinking")
"""Names of the reasoning before an answer."""
LABELS = {
    "category": "category", "categoría": "category", "categoria": "category", "topic": "topic", "tema": "topic",
    "id": "id", "code": "code",
}  # fmt: skip
"""Key of our own rows by name."""
NESTED = frozenset((*TURNS, "history", "code", "expect", "tools"))
"""Names whose values are lists or objects: a table holds them as JSON texts."""
PARTS = ("question", "input", "answer", "system", "reasoning", "history", "messages", "category", "topic", "id")
"""Parts of a row that --map can name."""
KNOWN = frozenset((*QUESTIONS, *ANSWERS, *EXTRAS, *TURNS, *SYSTEMS, *THOUGHTS, *LABELS, *NESTED))
"""Every name that is read."""

TUTOR = "tutor's own rows (instruction, response)"
"""Description of rows that need no conversion."""
FORMATS = {
    "tutor": (("instruction",), ("response",)),
    "alpaca": (("instruction",), ("output", "response")),
    "prompt-completion": (("prompt",), ("completion", "response")),
    "question-answer": (("question", "query", "problem", "pregunta"), ("answer", "response", "solution", "respuesta")),
}
"""Names of question and answer by name of a format."""
STYLES = {"sharegpt": "ShareGPT", "openai": "OpenAI messages"}
"""Description by name of a format of messages."""


def folded(name: str) -> str:
    """Return a key or column name as the tables of this module write it."""
    return name.strip().casefold()


@dataclass(frozen=True)
class Options:
    """What a reading was given beside the file; empty: recognised."""

    columns: Mapping[str, str] = field(default_factory=dict)  # part of a row -> key or column (--map)
    format: str = ""  # a key of FORMATS or STYLES
    sheet: str = ""  # of a spreadsheet
    answered: bool = True  # a row needs an answer; False: a question to ask is a row too
    loss: str = "all"  # answers that the recipe trains: all, or the last


@dataclass
class Recognised:
    """What was recognised in one file, counted while it is read."""

    container: str = ""  # for example "CSV with semicolons"
    numbered: str = "rows"  # unit of the numbers: lines or rows
    formats: Counter[str] = field(default_factory=Counter)  # description of a format -> rows
    dropped: Counter[str] = field(default_factory=Counter)  # key that is not trained -> rows

    def describe(self) -> str:
        """Return container and formats in one line."""
        names = [f"{count} rows as {name}" for name, count in self.formats.most_common()]
        return "; ".join([self.container, *([", ".join(names)] if names else [])])

    def is_own(self) -> bool:
        """Whether every row was one of tutor's own, in JSON."""
        return set(self.formats) <= {TUTOR} and self.container in ("JSON", "JSON Lines")


def read_map(texts: tuple[str, ...]) -> dict[str, str]:
    """Return part -> column of the values of --map, `question=Pregunta,answer=Respuesta`. Raises RecipeError."""
    columns: dict[str, str] = {}
    for pair in (item for row in csv.reader(texts, skipinitialspace=True) for item in row):
        part, equals, column = pair.partition("=")
        part = folded(part)
        if not equals or not column.strip() or part not in PARTS:
            raise RecipeError(
                f"--map {pair!r} is not PART=COLUMN", f"PART is one of {', '.join(PARTS)}; quote a name with a comma"
            )
        if part in columns:
            raise RecipeError(f"--map names {part} twice", "name one column for it")
        columns[part] = column.strip()
    if columns and "messages" not in columns and not {"question", "answer"} <= columns.keys():
        raise RecipeError("--map names no whole row", "name question and answer, or messages")
    return columns
