"""A Modelfile as Ollama's own parser reads it (parser/parser.go).

In: the text of a Modelfile. Out: `ParsedModelfile`, or ArtifactError where Ollama refuses the text. Opens no file.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tutor.errors import ArtifactError
from tutor.stages.modelfile.spec import (
    DEPRECATED,
    TYPE_NAMES,
    TYPES,
    Kind,
    Parameter,
    has_type,
    is_printable,
    why_unknown,
)

INSTRUCTION = re.compile(
    r"(?:[ \t\r\n]|#[^\r\n]*)*+"  # comments are allowed here only
    r"(?:(?P<end>\Z)|(?P<dropped>.)??(?:"  # Ollama skips a first rune that is not printable
    r"(?P<name>(?i:from|license|template|system|adapter|draft|renderer|parser|requires))"
    r"|(?i:parameter)[ \t](?P<parameter>\w*)"
    r"|(?i:message)[ \t](?P<role>system|user|assistant)"
    r")[ \t])",
    re.ASCII | re.DOTALL,
)
"""Pattern of the next instruction's name, or of the end of the file."""
LINE_END = re.compile(r"[\r\n]|\Z")
VALUE_PATTERNS: Mapping[Kind, re.Pattern[str]] = {
    int: re.compile(r"[+-]?0{0,99}[0-9]{1,19}"),
    float: re.compile(r"[+-]?(?:D(?:\.D?)?|\.D)(?:[eE][+-]?D)?".replace("D", "(?:[0-9](?:_?[0-9])*)")),
    bool: re.compile("1|t|T|TRUE|true|True|0|f|F|FALSE|false|False"),
}
"""Patterns of a parameter's value that Go parses as its type."""


@dataclass(frozen=True)
class ParsedModelfile:
    """A Modelfile as `ollama create` reads it: the last one of several TEMPLATE, SYSTEM or PARAMETER lines counts."""

    models: tuple[str, ...]  # every FROM
    adapters: tuple[str, ...]
    template: str
    system: str
    parameters: dict[str, Parameter]
    license: tuple[str, ...]
    messages: tuple[tuple[str, str], ...]
    others: tuple[str, ...]  # instructions that tutor never writes: renderer, parser, requires, draft, deprecated ones


def parse(text: str) -> ParsedModelfile:
    """Parse a Modelfile as Ollama does, but numbers in decimal only. Raises ArtifactError where Ollama refuses."""
    grouped: dict[str, list[str]] = {}
    for name, value in _instructions(text.removeprefix("\ufeff")):
        grouped.setdefault(name, []).append(value)
    if "model" not in grouped:
        raise ArtifactError("Modelfile: no FROM line")
    ours = {"model", "adapter", "template", "system", "license", "message"}
    others = {"renderer", "parser", "requires", "draft"} | DEPRECATED
    return ParsedModelfile(
        models=tuple(grouped["model"]),
        adapters=tuple(grouped.get("adapter", ())),
        template=grouped.get("template", [""])[-1],
        system=grouped.get("system", [""])[-1],
        parameters={name: _typed(name, values) for name, values in grouped.items() if name not in ours | others},
        license=tuple(grouped.get("license", ())),
        messages=tuple((role, text) for role, _, text in (m.partition(": ") for m in grouped.get("message", ()))),
        others=tuple(name for name in grouped if name in others),
    )


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction's name and value. Ollama's names: FROM is `model`, a PARAMETER has the parameter's name."""
    position = 0
    while (found := INSTRUCTION.match(text, position)) and not is_printable(found["dropped"] or "\0"):
        if found["end"] is not None:
            return
        value, position = _value(text, found.end())
        if found["role"]:
            yield "message", f"{found['role']}: {value}"
        elif found["parameter"] is not None:
            yield found["parameter"], value
        else:
            yield found["name"].lower().replace("from", "model"), value
    raise ArtifactError(f"Modelfile: no instruction at {text[position:].strip()!r:.80}")


def _value(text: str, start: int) -> tuple[str, int]:
    """The value at `start` and the position of its end: the first line end at which its quotes are closed."""
    for end in LINE_END.finditer(text, start):
        value = "".join(filter(is_printable, text[start : end.start()])).strip()
        quotes = next(quotes for quotes in ('"""', '"', "") if value.startswith(quotes))
        if not quotes:
            return value, end.start()
        if len(value) >= 2 * len(quotes) and value.endswith(quotes):
            return value[len(quotes) : -len(quotes)], end.start()
    raise ArtifactError(f"Modelfile: unexpected EOF, no closing quotes for {text[start:].strip()!r:.80}")


def _typed(name: str, values: list[str]) -> Parameter:
    """A parameter's value from its lines: all of them for a list, else the last one."""
    kind = TYPES.get(name)
    if kind is None:
        raise ArtifactError(f"Modelfile: parameter {name!r} is {why_unknown(name)}")
    if kind == list[str]:
        return values
    typed: Parameter = []
    for value in values:
        typed = []
        if VALUE_PATTERNS[kind].fullmatch(value):
            typed = value[0] in "1tT" if kind is bool else kind(value)
        if not has_type(kind, typed):
            raise ArtifactError(f"Modelfile: parameter {name} is {value!r}; it must be {TYPE_NAMES[kind]}")
    return typed
