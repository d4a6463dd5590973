"""Names of models in Ollama, by its own rules (types/model/name.go): [HOST/][NAMESPACE/]MODEL[:TAG].

In: a name. Out: its parts, or the form in which two names of one model are equal. Sends nothing, and reads no digest.
"""

import re

PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
"""Pattern of a model and of a tag."""
NAME = re.compile(
    r"(?:(?:(?P<host>[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349})/)?(?P<namespace>[A-Za-z0-9_][A-Za-z0-9_-]{0,79})/)?"
    rf"(?P<model>{PART})(?::(?P<tag>{PART}))?"
)
"""Pattern of a name that Ollama accepts."""
FORMS = "[HOST/][NAMESPACE/]MODEL of letters, digits, '_', '-' and '.' (not in a namespace), each at most 80 long"
"""Form of a name without a tag, for errors."""
MODEL_CHARACTERS = 75
"""Maximum characters of a recipe's model: with -lora added they are the 80 that Ollama accepts."""
SPECIAL_MODEL = "deepseek-r1"
"""Name of a model whose answers Ollama changes: it removes old <think> blocks from the history."""
SPECIAL_TAGS = re.compile(r"(?:^|-)(?:cloud|local)$")
"""Pattern of tags that Ollama takes for a choice of the place where a model runs."""


def is_base_name(text: str) -> bool:
    """Whether tutor can publish under a name: it has no tag, leaves room for -lora, and is not special."""
    name = NAME.fullmatch(text)
    if name is None or name["tag"]:
        return False
    return len(name["model"]) <= MODEL_CHARACTERS and name["model"].lower() != SPECIAL_MODEL


def split_tag(text: str) -> tuple[str, str]:
    """The name without its tag, and the tag, "" when it has none; the colon of a host's port separates no tag."""
    name, colon, tag = text.rpartition(":")
    return (name, tag) if colon and "/" not in tag else (text, "")


def canonical(text: str) -> tuple[str, str]:
    """A name without its tag and the tag, complete and in lower case, as Ollama compares names."""
    name, tag = split_tag(text.lower())
    parts = name.split("/")
    full = [*("registry.ollama.ai", "library")[: max(0, 3 - len(parts))], *parts]
    return "/".join(full), tag or "latest"
