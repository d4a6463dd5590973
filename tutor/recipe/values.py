"""Types of a recipe's values that need more than a range: paths, amounts, names of layers and quantizations, texts.

In: one value as TOML has it. Out: the value that a `Recipe` holds, or a ValueError that says what is known instead.
Does not read the files that a recipe names.
"""

import difflib
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from tutor.recipe.quantizations import AUTO, KINDS, NOT_MADE, canonical

MEMORY = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) ?(MB|MiB|GB|GiB)")
"""An amount of memory: a number and its unit."""
UNITS = {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}
"""Bytes of each unit of an amount of memory."""

LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a decoder block, which an adapter can be trained on."""
ALL_LINEAR = "all-linear"
"""Value of `train.target_modules` for all of LINEAR_LAYERS, as PEFT calls it."""

LANGUAGES = {
    "af": "Afrikaans", "ar": "Arabic", "az": "Azerbaijani", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali",
    "bs": "Bosnian", "ca": "Catalan", "cs": "Czech", "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "eo": "Esperanto", "es": "Spanish", "et": "Estonian", "eu": "Basque", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "ga": "Irish", "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian",
    "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese",
    "ka": "Georgian", "kk": "Kazakh", "ko": "Korean", "la": "Latin", "lg": "Ganda", "lt": "Lithuanian", "lv": "Latvian",
    "mi": "Maori", "mk": "Macedonian", "mn": "Mongolian", "mr": "Marathi", "ms": "Malay", "nb": "Bokmal", "nl": "Dutch",
    "nn": "Nynorsk", "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sk": "Slovak", "sl": "Slovene", "sn": "Shona", "so": "Somali", "sq": "Albanian", "sr": "Serbian", "st": "Sotho",
    "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tn": "Tswana",
    "tr": "Turkish", "ts": "Tsonga", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "xh": "Xhosa", "yo": "Yoruba",
    "zh": "Chinese", "zu": "Zulu",
}  # fmt: skip
"""Names by ISO 639-1 code of the languages that lingua detects; a test compares them with the package's."""
ANY_LANGUAGE = "any"
"""Value of data.language for answers in any language."""

HUB = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})")
"""Source of a repository on the model hub."""
PACKAGE = re.compile(r"package:(?P<module>\w+)/(?P<file>[\w.-]+\.gguf)")
"""Source of a GGUF in a Python package."""
KNOWN = "known: hub:OWNER/NAME@40-HEX-REVISION, path:FOLDER, package:MODULE/FILE.gguf, tiny"
"""Kinds of sources, for an unknown one."""

MARKED_TOKEN = re.compile(r"<[|｜][\w▁.:/-]{1,64}[|｜]>|</?think>")
"""Texts that tokenizers of the Llama, Qwen, DeepSeek and SmolLM families read as one token: roles, ends, thoughts."""
PLAIN_TOKEN = re.compile(
    r"<(?:/s|(?<!\w<)s|unk|pad|mask|bos|eos|start_of_turn|end_of_turn|</?SYS>)>"
    r"|\[(?:/?INST|BOS|EOS|PAD|CLS|SEP|MASK)\]"
)
"""Control tokens of the Llama, Mistral and Gemma families whose texts HTML and code may contain, too."""


def _path_text(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    if len(value) > 4096:
        raise ValueError(f"has {len(value)} characters; a path has at most 4096")
    return value


def _amount(value: str) -> str:
    if not MEMORY.fullmatch(value):
        raise ValueError("give a number and MB, MiB, GB or GiB, as in '6GiB'")
    return value


def parse_bytes(text: str) -> int:
    """Return the bytes of an amount of memory, as "6GiB" or "500 MB"."""
    unit = text.lstrip("0123456789. ")
    return int(float(text.removesuffix(unit)) * UNITS[unit])


def _linear_layer(name: str) -> str:
    if name in ("lm_head", "embed_tokens"):
        raise ValueError(f"{name} cannot be adapted: a GGUF adapter and a tied embedding have no place for it")
    if name == ALL_LINEAR:
        raise ValueError(f"{ALL_LINEAR} stands alone: it means every linear layer")
    if name not in LINEAR_LAYERS:
        close = difflib.get_close_matches(name.rpartition(".")[2], LINEAR_LAYERS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"is no linear layer of the base; {hint}known: {', '.join(LINEAR_LAYERS)}, or {ALL_LINEAR}")
    return name


def _all_layers(value: Any) -> Any:
    return list(LINEAR_LAYERS) if value in (ALL_LINEAR, [ALL_LINEAR]) else value


def _unique(names: list[str]) -> list[str]:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"names {twice} twice")
    return names


def _quantization(name: str) -> str:
    called = canonical(name)
    if called in NOT_MADE:
        raise ValueError(NOT_MADE[called])
    if called not in KINDS:
        close = difflib.get_close_matches(called, KINDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"is no quantization of llama.cpp; {hint}known: {', '.join(KINDS)}")
    return called


def _served(name: str) -> str:
    return AUTO if name.lower() == AUTO else canonical(name)


def _base_source(value: str) -> str:
    kind, _, rest = value.partition(":")
    folder = kind == "path" and rest.strip()
    if not (value == "tiny" or folder or HUB.fullmatch(value) or PACKAGE.fullmatch(value)):
        raise ValueError(KNOWN)
    return value


def _language(value: str) -> str:
    if value not in LANGUAGES and value != ANY_LANGUAGE:
        raise ValueError(f"is no language that the detector knows; known: {ANY_LANGUAGE}, {', '.join(LANGUAGES)}")
    return value


def _system_text(value: str) -> str:
    if found := MARKED_TOKEN.search(value) or PLAIN_TOKEN.search(value):
        raise ValueError(f"holds {found[0]}, which a tokenizer reads as a control token: leave it out")
    return value


Language = Annotated[str, AfterValidator(_language)]
"""A code of LANGUAGES, or ANY_LANGUAGE."""
RelativePath = Annotated[str, AfterValidator(_path_text)]
"""A path, relative to the recipe's own folder; `~` is the home folder."""
OptionalPath = Annotated[str, AfterValidator(lambda value: value and _path_text(value))]
"""A RelativePath, or "" for no file."""
MemoryAmount = Annotated[str, AfterValidator(_amount)]
"""An amount of memory, as in `6GiB`."""
LinearLayers = Annotated[
    list[Annotated[str, AfterValidator(_linear_layer)]],
    Field(min_length=1),
    BeforeValidator(_all_layers),
    AfterValidator(_unique),
]
"""Names of linear layers; ALL_LINEAR, alone or as the only one of a list, gives all of them."""
Kind = Annotated[str, AfterValidator(_quantization)]
"""A quantization that llama.cpp makes, by llama.cpp's name."""
ServedKind = Annotated[str, AfterValidator(_served)]
"""A quantization by llama.cpp's name, or AUTO."""
BaseSource = Annotated[str, AfterValidator(_base_source)]
"""A source of the base model, of a known kind."""
SystemText = Annotated[str, AfterValidator(_system_text)]
"""A system text without the texts of control tokens."""
