"""Write a base's chat template so that every engine renders the same prompt from it, whatever the engine passes.

In: a template, values of the variables that engines set differently, a text for the end of the prompt. Out: the
template that is trained, merged and served. Ollama passes `enable_thinking`, llama.cpp passes today's date to every
template and BOS and EOS of the GGUF, transformers passes none of them.
"""

import re
from collections.abc import Mapping
from datetime import date

from tutor.prompt.jinja import TemplateError, calls_clock, literal, template_names

COMMENT = (
    "{#- The base's own chat template. Variables that engines set differently have fixed values here, so that every "
    "engine renders it as the model was trained. This comment is long on purpose: Ollama puts a template of its own in "
    "the place of one that differs from it in less than 100 characters. #}"
)
"""First line of a fixed template. Levenshtein distance 100 is Ollama's limit (server/model.go)."""
DAY = date(2024, 7, 26)
"""Date that a prompt names on every day, because it was trained so; Llama 3's own default."""
DATES = {"date_string": "%d %b %Y", "datetime": "%b %d %Y"}
"""Variables that llama.cpp sets to today's date, with its formats (common/chat.cpp)."""
SWITCHES = ("enable_thinking", "thinking")
"""Variables with which templates switch thoughts on and off; Ollama sets the first."""
KEPT = {"preserve_thinking": False, "clear_thinking": True, "truncate_history_thinking": True, "drop_thinking": True}
"""Variables with which templates leave out earlier thoughts, as they do by default; llama.cpp sets the opposite."""
_CLOCK = re.compile(r"strftime_now\(\s*(?:'([^'\\]*)'|\"([^\"\\]*)\")\s*\)")
"""A call of the clock with a constant format."""


def fixed_values(template: str, *, bos: str, eos: str, thoughts: bool) -> dict[str, str | bool]:
    """Return the values of the variables that a template reads and engines set differently."""
    values: dict[str, str | bool] = {"bos_token": bos, "eos_token": eos}
    values |= {name: DAY.strftime(style) for name, style in DATES.items()}
    values |= {**dict.fromkeys(SWITCHES, thoughts), **KEPT}
    names = template_names(template)
    return {name: value for name, value in values.items() if name in names}


def fix_template(template: str, values: Mapping[str, str | bool], end: str = "") -> str:
    """Return a template with fixed values, whose prompts end with `end`. Raises TemplateError for a computed date."""
    dated = _CLOCK.sub(lambda found: literal(DAY.strftime(found[1] or found[2] or "")), template)
    if calls_clock(dated):
        raise TemplateError("it computes the format of today's date, which no served prompt can have fixed")
    lines = "".join("{%%- set %s = %s %%}" % (name, literal(value)) for name, value in values.items())  # noqa: UP031
    # A newline at the end of a template is not rendered, and one behind a block is not either.
    dated = dated.replace("\r\n", "\n").removesuffix("\n")
    last = "{{ %s if add_generation_prompt else '' }}" % literal(end) if end else ""  # noqa: UP031
    return f"{COMMENT}{lines}\n{dated}{last}"
