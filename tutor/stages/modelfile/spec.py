"""The specification of a model for Ollama, and the check that Ollama can represent the model.

In: a `ModelSpec`. Out: nothing, or the error that names the field and its value. Ollama's parser drops or guesses
without a message and its API checks no parameter, so everything is checked here first. Renders and sends nothing.
"""

import difflib
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tutor.errors import ArtifactError, RecipeError
from tutor.prompt.tutor_format import CUE
from tutor.recipe.ollama_names import FORMS, NAME, SPECIAL_MODEL, SPECIAL_TAGS

Parameter = int | float | bool | str | list[str]
Kind = type[int] | type[float] | type[bool] | type[list[str]]

TYPES: Mapping[str, Kind] = {
    **dict.fromkeys(("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict"), int),
    **dict.fromkeys(("num_keep", "seed", "num_predict", "top_k", "repeat_last_n"), int),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "temperature"), float),
    **dict.fromkeys(("repeat_penalty", "presence_penalty", "frequency_penalty"), float),
    "use_mmap": bool,
    "stop": list[str],
}
"""Ollama's parameters and their types (api/types.go, Options)."""
TYPE_NAMES: Mapping[Kind, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list[str]: "non-empty texts",
}
"""Names of the parameter types in error messages."""
DEPRECATED = {"penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "mirostat"}
DEPRECATED |= {"mirostat_tau", "mirostat_eta"}
"""Parameters that Ollama accepts and ignores."""
REMOVED = {"tfs_z", "numa", "num_gqa", "embedding_only", "rope_frequency_base", "rope_frequency_scale"}
"""Parameters of older versions of Ollama, which current versions refuse."""
FLOAT32_LIMIT = 2.0**128 - 2.0**103
"""Smallest number that rounds to no finite float32: Go refuses it."""

RESPONSE_PATTERN = re.compile(r"\{\{\s*\.Response\s*\}\}")
"""Pattern of the place of the answer in a Go template."""
BOS_TEXTS = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<|startoftext|>", "<|im_start|>", "<bos>", "<s>")
"""Texts that llama-server's tokenizer reads as a BOS token, in addition to the BOS that the tokenizer adds."""


@dataclass(frozen=True)
class ModelSpec:
    """The values of a model that are sent to Ollama; `check_spec` checks them."""

    name: str
    gguf: Path
    template: str  # Go; "": none, and Ollama renders the chat template in the GGUF
    parameters: Mapping[str, Parameter]
    system: str = ""
    adapter: Path | None = None  # a GGUF LoRA
    license: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()  # role, text


def check_spec(spec: ModelSpec) -> None:
    """Raise RecipeError for what Ollama would refuse or alter, ArtifactError for a missing file."""
    name = NAME.fullmatch(spec.name)
    if not name or name["model"].lower() == SPECIAL_MODEL or SPECIAL_TAGS.search(name["tag"] or ""):
        hint = f"{FORMS}; deepseek-r1 and the tags cloud and local are special"
        raise RecipeError(f"model name is {spec.name!r}", hint)
    if spec.template:
        _check_template(spec.template)
    _check_text("system", spec.system)
    for role, text in spec.messages:
        if role not in ("system", "user", "assistant"):
            raise RecipeError(f"role of a message is {role!r}", "it must be system, user or assistant")
        _check_text(f"message from {role}", text)
    for text in spec.license:
        _check_text("license", text)
    for key, value in spec.parameters.items():
        _check_parameter(key, value)
    for key in ("num_ctx", "num_predict"):
        # Ollama's defaults: a context that depends on the GPU's memory, and an unlimited answer (also for 0).
        number = spec.parameters.get(key)
        if not isinstance(number, int) or number <= 0:
            raise RecipeError(f"parameter {key} is {number}", "give it a positive number")
    _check_file("gguf", spec.gguf)
    if spec.adapter:
        _check_file("adapter", spec.adapter)


def representable(text: str) -> bool:
    """Return whether Ollama reads text between triple quotes in a Modelfile unchanged.

    Ollama drops what Go's strconv.IsPrint refuses (NBSP, joiners, controls), and ends the text at three quotes that
    end a line.
    """
    return _flaw(text) is None


def is_printable(char: str) -> bool:
    """Return whether Ollama's parser keeps a character: Go's strconv.IsPrint, and white space."""
    return char in " \t\r\n" or unicodedata.category(char)[0] in "LMNPS"


def has_type(kind: Kind, value: Parameter) -> bool:
    """Return whether a value is of a parameter's type and inside the range that Go accepts."""
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is int:
        return isinstance(value, int) and -(2**63) <= value < 2**63
    if kind is float:
        return isinstance(value, int | float) and abs(value) < FLOAT32_LIMIT
    return isinstance(value, list) and value != [] and all(isinstance(entry, str) and entry for entry in value)


def why_unknown(name: str) -> str:
    """Return why a parameter is not in TYPES: deprecated, removed, or misspelt."""
    if name in DEPRECATED:
        return "deprecated, Ollama ignores it"
    if name in REMOVED:
        return "removed from Ollama"
    close = difflib.get_close_matches(name.lower(), TYPES, n=1)
    return "unknown to Ollama; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(TYPES)}")


def _flaw(text: str) -> str | None:
    """The first place of a text that Ollama would alter, as the predicate of an error message."""
    for position, char in enumerate(text):
        if not is_printable(char):
            around = text[max(position - 20, 0) : position + 20]
            name = unicodedata.name(char, "unnamed")
            return f"has U+{ord(char):04X} ({name}) in {around!r}, which Ollama would drop"
    if early := re.search(r'"""[ \t]*[\r\n]', text):
        return f"ends line {text.count(chr(10), 0, early.start()) + 1} in three quotes, where Ollama ends the text"
    return None


def _check_text(field: str, text: str) -> None:
    if flaw := _flaw(text):
        raise RecipeError(f"{field} {flaw}", "rewrite it: a Modelfile has no escapes")
    for bos in BOS_TEXTS if field != "license" else ():
        if bos in text:
            raise RecipeError(f"{field} has the BOS text {bos}", "leave it out: the tokenizer adds its own")


def _check_template(template: str) -> None:
    _check_text("template", template)
    prompt, *after = RESPONSE_PATTERN.split(template)
    if ".Prompt" not in prompt or len(after) != 1 or not prompt.endswith(CUE):
        hint = f"it must have .Prompt, then one {{{{ .Response }}}} right behind the cue {CUE!r}"
        raise RecipeError(f"template is {template!r}", hint)


def _check_parameter(name: str, value: Parameter) -> None:
    kind = TYPES.get(name)
    if kind is None:
        raise RecipeError(f"parameter {name} is {value!r}: {why_unknown(name)}")
    if not has_type(kind, value):
        raise RecipeError(f"parameter {name} is {value!r}", f"it must be {TYPE_NAMES[kind]}")
    for entry in value if isinstance(value, list) else ():
        _check_text(f"parameter {name}", entry)


def _check_file(field: str, path: Path) -> None:
    # Ollama reads a path that does not exist as a model's name, and tries to pull that model.
    if not path.is_file():
        raise ArtifactError(f"{field} {path} is not there", "run: tutor convert")
    if path.suffix != ".gguf":
        raise ArtifactError(f"{field} {path} is not called *.gguf", "rename it: Ollama reads the type from the name")
    if not representable(str(path)) or re.search(r"[\t\r\n]", str(path)):
        raise RecipeError(f"{field} {str(path)!r} cannot be written in a Modelfile", "rename the file or its folder")
