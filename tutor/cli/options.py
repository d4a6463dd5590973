"""Shared parts of the commands: options, reading the recipe, progress on stderr, the result on stdout.

In: what click parsed. Out: options as decorators, the recipe, the result as JSON or as lines. Holds no command.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tutor.formats import terminal

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])


def _build_folder(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    """Return the value of --build. Raises BadParameter for a path that cannot or should not be written to."""
    del context, parameter
    try:
        with contextlib.suppress(FileNotFoundError):
            value.stat()
    except OSError as error:
        raise click.BadParameter(f"{value}: {error.strerror}") from None
    if value.resolve() == Path(value.resolve().anchor):
        raise click.BadParameter(f"{value} is the root of the file system")
    return value


def build_option(command: Command) -> Command:
    """Add --build, the folder that holds all outputs."""
    return click.option(
        "-b",
        "--build",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path("build"),
        show_default=True,
        envvar="TUTOR_BUILD",
        show_envvar=True,
        callback=_build_folder,
        help="Folder for all outputs; each recipe has a subfolder with its name.",
    )(command)


def recipe_option(command: Command) -> Command:
    """Add --recipe, the file with the settings, and --build."""
    recipe = click.option(
        "-r",
        "--recipe",
        "recipe_path",
        type=click.Path(path_type=Path),
        default=Path("data/tutor.toml"),
        show_default=True,
        envvar="TUTOR_RECIPE",
        show_envvar=True,
        help="The TOML file with every setting of a run.",
    )
    return recipe(build_option(command))


host_option = click.option(
    "--host", envvar="OLLAMA_HOST", show_envvar=True, help="Address of Ollama; 127.0.0.1:11434 by default."
)
adapter_option = click.option("--adapter", is_flag=True, help="Use the base with the adapter, not the merged model.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


class Seconds(click.FloatRange):
    """A number of seconds from 0 to one day. NaN is refused: a wait until it is over would never end."""

    name = "seconds"

    def __init__(self) -> None:
        """Set the bounds."""
        super().__init__(min=0, max=86_400)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Raises BadParameter."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value} is no number of seconds.", param, ctx)
        return number


class TextCommand(click.Command):
    """A command whose argument is a text, which may begin with a dash: `-5 % 3` is no option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, with the texts behind `--`, where click takes no word for an option."""
        options = [item for item in self.get_params(ctx) if isinstance(item, click.Option)]
        takes_value = {name: not item.is_flag for item in options for name in item.opts}
        words = iter(args)
        known: list[str] = []
        texts: list[str] = []
        for word in words:
            name = word.partition("=")[0] if word.startswith("--") else word[:2]
            if word == "--":
                texts += words
            elif not word.startswith("-") or word == "-":
                known.append(word)
            elif takes_value.get(name) or (name in takes_value and not _is_phrase(word)):
                known.append(word)
                if word == name and takes_value[name]:
                    known += itertools.islice(words, 1)
            else:  # an unknown option is left to click, which names similar ones
                (texts if _is_phrase(word) else known).append(word)
        return super().parse_args(ctx, [*known, "--", *texts] if texts else known)


def _is_phrase(word: str) -> bool:
    """Whether a word that begins with a dash is no option: a digit comes first, or it holds a blank and no value."""
    return word[1:2].isdigit() or (any(map(str.isspace, word)) and not re.match(r"--[\w-]+=", word))


def load_recipe(path: Path) -> "Recipe":
    """Read the recipe of a command. Raises RecipeError."""
    from tutor.recipe.reading import read_recipe

    return read_recipe(path)


def progress_on_stderr(flags: dict[str, bool]) -> contextlib.AbstractContextManager[None]:
    """Show progress on stderr inside the context, from the first process alone.

    The libraries' own progress is switched off first: they read their settings when they are imported.
    """
    from tutor.cli.progress import log_discarded, log_on_stderr, quiet_libraries
    from tutor.machine.distributed import is_main_process
    from tutor.machine.host import limit_threads

    quiet_libraries()
    limit_threads()
    if not is_main_process():
        return log_discarded()
    return log_on_stderr(quiet=flags["quiet"])


def print_result(value: Any, lines: list[str], *, as_json: bool) -> None:
    """Print the result on stdout: the value as JSON for programs, or the lines for people."""
    if as_json:
        terminal.write_json(value, indent=1)
    else:
        for line in lines:
            terminal.write_result(line)


def indented(value: Any, indent: str = "  ") -> list[str]:
    """Return nested counts as indented lines."""
    lines = []
    for name, item in value.items():
        if isinstance(item, dict):
            lines += [f"{indent}{name}:", *indented(item, indent + "  ")]
        elif isinstance(item, list):
            lines += [f"{indent}{name}: {len(item)}", *(f"{indent}  {entry}" for entry in item)]
        else:
            lines.append(f"{indent}{name}: {item}")
    return lines
