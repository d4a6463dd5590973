"""One spec -> the Modelfile and the JSON of Ollama's POST /api/create. Talks to no server.

In: a GGUF file, the Go template and stops of the prompt contract, the recipe. Out: `Modelfile` (for people and
`ollama create -f`) and `create.json`, which says the same. Ollama's parser drops, swallows and guesses without a
word, and its API checks no parameter: so all is checked here first, and every rendered file is parsed back.
"""

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from tutor.errors import ArtifactError, RecipeError
from tutor.formats.models.served_quantization import served_quantization
from tutor.prompt import CUE, GO_TEMPLATE, STOPS
from tutor.recipe.settings import MODEL_NAME, Recipe

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
"""Ollama's parameters (api/types.go, Options)."""
WORDS: Mapping[Kind, str] = {int: "an integer", float: "a number", bool: "true or false", list[str]: "non-empty texts"}
DEPRECATED = {"penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "mirostat"}
DEPRECATED |= {"mirostat_tau", "mirostat_eta"}
REMOVED = {"tfs_z", "numa", "num_gqa", "embedding_only", "rope_frequency_base", "rope_frequency_scale"}
FLOAT32_LIMIT = 2.0**128 - 2.0**103  # from here on a number rounds to no float32, and Go refuses it

NAME = re.compile(
    r"(?:(?:[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}/)?[A-Za-z0-9_][A-Za-z0-9_-]{0,79}/)?"  # host, namespace
    rf"(?P<model>{MODEL_NAME.pattern})(?::(?P<tag>{MODEL_NAME.pattern}))?"
)
RESPONSE = re.compile(r"\{\{\s*\.Response\s*\}\}")
BOS_TEXTS = ("<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<|startoftext|>", "<|im_start|>", "<bos>", "<s>")
"""llama-server's tokenizer reads such text as a token, and adds its own BOS besides."""
INSTRUCTION = re.compile(
    r"(?:[ \t\r\n]|#[^\r\n]*)*+"  # a comment may stand here, and nowhere else
    r"(?:(?P<end>\Z)|(?P<dropped>.)??(?:"  # Ollama does not look at a first rune that does not print
    r"(?P<name>(?i:from|license|template|system|adapter|draft|renderer|parser|requires))"
    r"|(?i:parameter)[ \t](?P<parameter>\w*)"
    r"|(?i:message)[ \t](?P<role>system|user|assistant)"
    r")[ \t])",
    re.ASCII | re.DOTALL,
)
LINE_END = re.compile(r"[\r\n]|\Z")
FORMS: Mapping[Kind, re.Pattern[str]] = {
    int: re.compile(r"[+-]?0{0,99}[0-9]{1,19}"),
    float: re.compile(r"[+-]?(?:D(?:\.D?)?|\.D)(?:[eE][+-]?D)?".replace("D", "(?:[0-9](?:_?[0-9])*)")),
    bool: re.compile("1|t|T|TRUE|true|True|0|f|F|FALSE|false|False"),
}


@dataclass(frozen=True)
class ModelSpec:
    """A model as Ollama gets it; `check` says whether it can."""

    name: str
    gguf: Path
    template: str  # Go
    parameters: Mapping[str, Parameter]
    system: str = ""
    adapter: Path | None = None  # a GGUF LoRA
    license: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()  # role, text


@dataclass(frozen=True)
class ParsedModelfile:
    """A Modelfile as `ollama create` understands it: of a repeated TEMPLATE, SYSTEM or PARAMETER the last counts."""

    models: tuple[str, ...]  # every FROM
    adapters: tuple[str, ...]
    template: str
    system: str
    parameters: dict[str, Parameter]
    license: tuple[str, ...]
    messages: tuple[tuple[str, str], ...]
    others: tuple[str, ...]  # renderer, parser, requires, draft, deprecated parameters: what we never write


def check(spec: ModelSpec) -> None:
    """Raise RecipeError for what Ollama would refuse or alter, ArtifactError for a file that is not there."""
    name = NAME.fullmatch(spec.name)
    if not name or name["model"] == "deepseek-r1" or re.search(r"(^|-)(cloud|local)$", name["tag"] or ""):
        hint = "letters, digits, '_', '-' and '.', at most 80; deepseek-r1 and the tags cloud and local are special"
        raise RecipeError(f"model name is {spec.name!r}", hint)
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
        # Ollama's defaults: a context by the card's memory, and no end of the answer (num_predict 0 says the same).
        number = spec.parameters.get(key)
        if not isinstance(number, int) or number <= 0:
            raise RecipeError(f"parameter {key} is {number}", "give it a positive number")
    _check_file("gguf", spec.gguf)
    if spec.adapter:
        _check_file("adapter", spec.adapter)


def representable(text: str) -> bool:
    """Whether text between triple quotes in a Modelfile comes back as it was.

    Ollama drops what Go's strconv.IsPrint refuses (NBSP, joiners, controls), and ends at a line's last three quotes.
    """
    return _flaw(text) is None


def _flaw(text: str) -> str | None:
    for position, char in enumerate(text):
        if not _is_kept(char):
            around = text[max(position - 20, 0) : position + 20]
            name = unicodedata.name(char, "unnamed")
            return f"has U+{ord(char):04X} ({name}) in {around!r}, which Ollama would drop"
    if early := re.search(r'"""[ \t]*[\r\n]', text):
        return f"ends line {text.count(chr(10), 0, early.start()) + 1} in three quotes, where Ollama ends the text"
    return None


def _is_kept(char: str) -> bool:
    return char in " \t\r\n" or unicodedata.category(char)[0] in "LMNPS"


def _check_text(field: str, text: str) -> None:
    if flaw := _flaw(text):
        raise RecipeError(f"{field} {flaw}", "rewrite it: a Modelfile has no escapes")
    for bos in BOS_TEXTS if field != "license" else ():
        if bos in text:
            raise RecipeError(f"{field} has the BOS text {bos}", "leave it out: the tokenizer adds its own")


def _check_template(template: str) -> None:
    _check_text("template", template)
    prompt, *after = RESPONSE.split(template)
    if ".Prompt" not in prompt or len(after) != 1 or not prompt.endswith(CUE):
        hint = f"it must have .Prompt, then one {{{{ .Response }}}} right behind the cue {CUE!r}"
        raise RecipeError(f"template is {template!r}", hint)


def _check_parameter(name: str, value: Parameter) -> None:
    kind = TYPES.get(name)
    if kind is None:
        raise RecipeError(f"parameter {name} is {value!r}: {_why_unknown(name)}")
    if not _fits(kind, value):
        raise RecipeError(f"parameter {name} is {value!r}", f"it must be {WORDS[kind]}")
    for entry in value if isinstance(value, list) else ():
        _check_text(f"parameter {name}", entry)


def _fits(kind: Kind, value: Parameter) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is int:
        return isinstance(value, int) and -(2**63) <= value < 2**63
    if kind is float:
        return isinstance(value, int | float) and abs(value) < FLOAT32_LIMIT
    return isinstance(value, list) and value != [] and all(isinstance(entry, str) and entry for entry in value)


def _why_unknown(name: str) -> str:
    if name in DEPRECATED:
        return "deprecated, Ollama ignores it"
    if name in REMOVED:
        return "removed from Ollama"
    close = difflib.get_close_matches(name.lower(), TYPES, n=1)
    return "unknown to Ollama; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(TYPES)}")


def _check_file(field: str, path: Path) -> None:
    # Ollama takes a path that does not exist for a model's name, and tries to pull it.
    if not path.is_file():
        raise ArtifactError(f"{field} {path} is not there", "run: tutor convert")
    if path.suffix != ".gguf":
        raise ArtifactError(f"{field} {path} is not called *.gguf", "rename it: Ollama goes by the name")
    if not representable(str(path)) or re.search(r"[\t\r\n]", str(path)):
        raise RecipeError(f"{field} {str(path)!r} cannot stand in a Modelfile", "rename the file or its folder")


def render(spec: ModelSpec, folder: Path, template_file: Path | None = None) -> str:
    """The text of `folder`'s Modelfile, from Modelfile.j2 or `template_file`, parsed back and equal to the spec.

    Raises what `check` does, RecipeError for a file that does not fill, ArtifactError where the text differs.
    """
    check(spec)
    file = template_file or _template_file()
    environment = SandboxedEnvironment(
        *("[%", "%]", "[[", "]]", "[#", "#]"),  # Go has the braces
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    environment.filters["quoted"] = _quoted
    try:
        text = environment.from_string(file.read_text("utf-8")).render(
            gguf=_location(spec.gguf, folder),
            adapter=spec.adapter and _location(spec.adapter, folder),
            template=spec.template,
            system=spec.system,
            parameters=[(name, line) for name, value in spec.parameters.items() for line in _lines(name, value)],
            messages=spec.messages,
            license=spec.license,
        )
    except (OSError, UnicodeDecodeError, jinja2.TemplateError, TypeError) as error:
        what = f"{file}: {str(error).partition(chr(10))[0]}"
        raise RecipeError(what, "compare it with the Modelfile.j2 of this version") from error
    _compare(parse(text), spec, folder)
    return text


def _template_file() -> Path:
    """Modelfile.j2 of an installed package, else of the checkout."""
    package = Path(__file__).resolve().parents[2]
    installed = package / "Modelfile.j2"
    return installed if installed.is_file() else package.parent / installed.name


def _quoted(text: str) -> str:
    # Always three quotes: with one or none, Ollama's rule depends on how each line starts and ends.
    return f'"""{text}"""'


def _absolute(path: Path) -> Path:
    # Lexical, as Ollama does it: Path.resolve would follow links.
    return Path(os.path.normpath(path.absolute()))


def _location(path: Path, folder: Path) -> str:
    """A file as FROM in `folder` names it: relative inside the folder's parent, else absolute."""
    file, here = _absolute(path), _absolute(folder)
    if not file.is_relative_to(here.parent):
        return str(file)
    relative = os.path.relpath(file, here)
    return relative if relative.startswith("../") else f"./{relative}"


def _lines(name: str, value: Parameter) -> list[str]:
    """A parameter's value on each of its lines. Go reads Python's shortest form of a float, exponent included."""
    if isinstance(value, list):
        return [_quoted(entry) for entry in value]
    return [repr(float(value)) if TYPES[name] is float else str(value).lower()]


def _compare(written: ParsedModelfile, spec: ModelSpec, folder: Path) -> None:
    def absolute(files: Sequence[str | Path | None]) -> list[Path]:
        return [_absolute(folder / file) for file in files if file]

    gguf, adapter = spec.gguf.absolute(), spec.adapter.absolute() if spec.adapter else None
    pairs: dict[str, tuple[object, object]] = {
        "FROM": (absolute(written.models), absolute([gguf])),
        "ADAPTER": (absolute(written.adapters), absolute([adapter])),
        "TEMPLATE": (written.template, spec.template),
        "SYSTEM": (written.system, spec.system),
        "PARAMETER": (written.parameters, dict(spec.parameters)),
        "LICENSE": (written.license, spec.license),
        "MESSAGE": (written.messages, spec.messages),
        "others": (written.others, ()),
    }
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            what = f"{name} of the rendered Modelfile is {found!r:.200} instead of {wanted!r:.200}"
            raise ArtifactError(what, "Modelfile.j2 only orders the recipe's values; quote text by its filter `quoted`")


def parse(text: str) -> ParsedModelfile:
    """A Modelfile as Ollama's own parser reads it, numbers in decimal only. Raises ArtifactError where it refuses."""
    grouped: dict[str, list[str]] = {}
    for name, value in _commands(text.removeprefix("\ufeff")):
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


def _commands(text: str) -> Iterator[tuple[str, str]]:
    """Each instruction and its value, named as by Ollama (parser/parser.go): FROM `model`, PARAMETER by its own."""
    position = 0
    while (found := INSTRUCTION.match(text, position)) and not _is_kept(found["dropped"] or "\0"):
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
    """The value from `start`, and its end: the first line end before which its quotes are closed."""
    for end in LINE_END.finditer(text, start):
        value = "".join(filter(_is_kept, text[start : end.start()])).strip()
        quotes = next(quotes for quotes in ('"""', '"', "") if value.startswith(quotes))
        if not quotes:
            return value, end.start()
        if len(value) >= 2 * len(quotes) and value.endswith(quotes):
            return value[len(quotes) : -len(quotes)], end.start()
    raise ArtifactError(f"Modelfile: unexpected EOF, no closing quotes for {text[start:].strip()!r:.80}")


def _typed(name: str, values: list[str]) -> Parameter:
    """A parameter's value from its lines: all of a list, else the last."""
    kind = TYPES.get(name)
    if kind is None:
        raise ArtifactError(f"Modelfile: parameter {name!r} is {_why_unknown(name)}")
    if kind == list[str]:
        return values
    read: Parameter = []
    for value in values:
        read = []
        if FORMS[kind].fullmatch(value):
            read = value[0] in "1tT" if kind is bool else kind(value)
        if not _fits(kind, read):
            raise ArtifactError(f"Modelfile: parameter {name} is {value!r}; it must be {WORDS[kind]}")
    return read


def request(spec: ModelSpec, digests: Mapping[Path, str], *, stream: bool = True) -> dict[str, Any]:
    """The body of POST /api/create; `digests` holds "sha256:..." of each file, which the server has as a blob."""
    check(spec)
    return {"model": spec.name, **_body(spec, digests), "stream": stream}


def _body(spec: ModelSpec, files: Mapping[Path, str]) -> dict[str, Any]:
    body = {
        "files": {spec.gguf.name: files[spec.gguf]},
        "adapters": {spec.adapter.name: files[spec.adapter]} if spec.adapter else {},
        "template": spec.template,
        "system": spec.system,
        "parameters": dict(spec.parameters),
        "messages": [{"role": role, "content": text} for role, text in spec.messages],
        "license": list(spec.license),
    }
    return {name: value for name, value in body.items() if value}


def parameters(generate: Mapping[str, int | float], seed: int, stops: Sequence[str]) -> dict[str, Parameter]:
    """The recipe's [generate], by its own names, under Ollama's names and in the Modelfile's order."""
    return {
        "num_ctx": generate["context"],
        "num_predict": generate["max_new_tokens"],
        "temperature": generate["temperature"],
        "top_p": generate["top_p"],
        "top_k": 40,  # Ollama's default, made explicit: the specification names none, transformers would take 50
        "repeat_penalty": generate["repetition_penalty"],
        # transformers penalises the whole sequence, Ollama 64 tokens by default. Not -1, documented as all: it goes
        # on to llama-server as it is, which answers 400 to a negative number.
        "repeat_last_n": generate["context"],
        "seed": seed,
        "stop": list(stops),
    }


def run(recipe: Recipe, inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write `out`/Modelfile and `out`/create.json; what they say, in short. Raises what `render` does."""
    # create.json is the request, with each file's path from `out` where its digest will stand.
    served = served_quantization(recipe.ollama.quantization, inputs["ladder"])
    gguf = inputs["convert"] / f"tutor-{served}.gguf"
    settings = parameters(recipe.generate.model_dump(), recipe.seed, STOPS)
    spec = ModelSpec(recipe.ollama.model, gguf, GO_TEMPLATE, settings, system=recipe.system)
    place = _location(gguf, out)
    create = {"name": spec.name, **_body(spec, {gguf: place})}
    (out / "Modelfile").write_bytes(render(spec, out).encode())
    (out / "create.json").write_text(json.dumps(create, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return {"model": spec.name, "gguf": place, "system": spec.system, "parameters": settings}
