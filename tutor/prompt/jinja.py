"""Render a tokenizer's chat template, byte for byte as transformers' `apply_chat_template` does.

In: the text of a template, messages, variables. Out: the text, or `TemplateError`. Imports no transformers, because
`tutor chat` renders too. A template comes from a stranger: it runs in Jinja's sandbox and reads no file and no clock.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tutor.prompt.messages import Message

FAULTS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Exceptions that the code of a template can raise."""
NO_TOOLS: Mapping[str, None] = {"tools": None, "documents": None}
"""Variables that transformers passes as None where a conversation has neither."""
REASONING = "reasoning_content"
"""Key of a message under which templates read a thought."""


class TemplateError(ValueError):
    """A template that is no Jinja, or refuses a conversation; the text is its reason."""


class _Generation(Extension):
    """The tag that marks an answer for training; it renders its content."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without attributes that begin with an underscore, as transformers has it."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name}")
        super().__setitem__(name, value)


def render_template(template: str, messages: Sequence[Message], *, day: date | None = None, **variables: Any) -> str:
    """Return what a template writes for messages and variables (add_generation_prompt, bos_token, ...).

    `strftime_now` gives `day`; without one, it is undefined. Raises TemplateError.
    """
    given = {name: value for name, value in variables.items() if value is not None or name in NO_TOOLS}
    if day is not None:
        given["strftime_now"] = day.strftime
    try:
        return _compile(template).render(messages=[_as_read(message) for message in messages], **given)
    except FAULTS as error:
        raise TemplateError(_reason(error)) from None


def template_names(template: str) -> frozenset[str]:
    """Return the names of all variables and functions that a template reads. Raises TemplateError."""
    return frozenset(node.name for node in _tree(template).find_all(nodes.Name) if node.ctx == "load")


def calls_clock(template: str) -> bool:
    """Return whether a template calls `strftime_now`. Raises TemplateError."""
    called = (call.node for call in _tree(template).find_all(nodes.Call))
    return any(isinstance(name, nodes.Name) and name.name == "strftime_now" for name in called)


def literal(value: str | bool) -> str:  # noqa: FBT001
    """Return a value as Jinja writes it; the escapes of JSON are Jinja's and llama.cpp's too."""
    return json.dumps(value, ensure_ascii=False)


def _as_read(message: Message) -> dict[str, str]:
    """A message as templates read it: our `reasoning` has another name there."""
    return {REASONING if name == "reasoning" else name: value for name, value in message.items()}


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def _tree(template: str) -> nodes.Template:
    try:
        return _environment().parse(template)
    except FAULTS as error:
        raise TemplateError(_reason(error)) from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "namespace": _namespace}
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - the signature that templates call
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _namespace(*args: Mapping[str, Any], **values: Any) -> _Namespace:
    return _Namespace(*args, **values)


def _reason(error: Exception) -> str:
    """The first line of an error, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"
