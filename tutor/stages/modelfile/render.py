"""A spec as the text of a Modelfile, from the repository's `Modelfile.j2`.

In: a `ModelSpec`, the folder of the Modelfile. Out: its text, parsed back and equal to the spec. Writes no file.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from tutor.errors import ArtifactError, RecipeError
from tutor.stages.modelfile.parse import ParsedModelfile, parse
from tutor.stages.modelfile.spec import TYPES, ModelSpec, Parameter, check_spec


def render(spec: ModelSpec, folder: Path, template_file: Path | None = None) -> str:
    """Render the Modelfile of `folder` from Modelfile.j2 or `template_file`, and compare its parsed text with the spec.

    Raises the errors of `check_spec`, RecipeError for a template that cannot be filled in, ArtifactError where the
    parsed text differs from the spec.
    """
    check_spec(spec)
    file = template_file or _template_file()
    environment = SandboxedEnvironment(
        *("[%", "%]", "[[", "]]", "[#", "#]"),  # braces belong to the Go template
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    environment.filters["quoted"] = _quoted
    try:
        text = environment.from_string(file.read_text("utf-8")).render(
            gguf=location(spec.gguf, folder),
            adapter=spec.adapter and location(spec.adapter, folder),
            template=spec.template,
            system=spec.system,
            parameters=[(name, each) for name, value in spec.parameters.items() for each in _written(name, value)],
            messages=spec.messages,
            license=spec.license,
        )
    except (OSError, UnicodeDecodeError, jinja2.TemplateError, TypeError) as error:
        what = f"{file}: {str(error).partition(chr(10))[0]}"
        raise RecipeError(what, "compare it with the Modelfile.j2 of this version") from error
    _check_rendered(parse(text), spec, folder)
    return text


def location(path: Path, folder: Path) -> str:
    """Return a file's path for FROM in `folder`'s Modelfile: relative inside the folder's parent, else absolute."""
    file, here = _absolute(path), _absolute(folder)
    if not file.is_relative_to(here.parent):
        return str(file)
    relative = os.path.relpath(file, here)
    return relative if relative.startswith("../") else f"./{relative}"


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


def _written(name: str, value: Parameter) -> list[str]:
    """A parameter's value for each of its lines. Go reads Python's shortest form of a float, exponent included."""
    if isinstance(value, list):
        return [_quoted(entry) for entry in value]
    return [repr(float(value)) if TYPES[name] is float else str(value).lower()]


def _check_rendered(written: ParsedModelfile, spec: ModelSpec, folder: Path) -> None:
    """Raise ArtifactError for the first instruction that differs from the spec."""

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
