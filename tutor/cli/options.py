"""What the commands share: their options, reading the recipe, printing the result."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])


def _build_folder(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    """--build, refused where nothing can or should be written."""
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
    """--build: where everything is made."""
    return click.option(
        "-b",
        "--build",
        type=click.Path(path_type=Path, file_okay=False),
        default=Path("build"),
        show_default=True,
        envvar="TUTOR_BUILD",
        show_envvar=True,
        callback=_build_folder,
        help="Where stages write, in a folder named after the recipe.",
    )(command)


def recipe_option(command: Command) -> Command:
    """--recipe and --build: where the settings are, and where everything is made."""
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
    "--host", envvar="OLLAMA_HOST", show_envvar=True, help="Where Ollama answers; 127.0.0.1:11434 where not said."
)
adapter_option = click.option("--adapter", is_flag=True, help="The base with the adapter on it, not the merged model.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


def read(path: Path) -> "Recipe":
    """The recipe of a command. Raises RecipeError."""
    from tutor.recipe.settings import read_recipe

    return read_recipe(path)


def shown_on_stderr(flags: dict[str, bool]) -> contextlib.AbstractContextManager[None]:
    """Progress while a stage runs; the libraries' own is off, from before they are imported."""
    from tutor.cli.progress import quiet_libraries, shown, silenced
    from tutor.machine.distributed import is_main_process

    quiet_libraries()
    if not is_main_process():
        return silenced()
    return shown(quiet=flags["quiet"])


def emit(value: Any, lines: list[str], *, as_json: bool) -> None:
    """The result on stdout: as JSON for programs, as lines for people."""
    if as_json:
        click.echo(json.dumps(value, ensure_ascii=False, indent=1))
    else:
        for line in lines:
            click.echo(line)


def tree(value: Any, indent: str = "  ") -> list[str]:
    """Nested counts as indented lines."""
    lines = []
    for name, item in value.items():
        if isinstance(item, dict):
            lines += [f"{indent}{name}:", *tree(item, indent + "  ")]
        elif isinstance(item, list):
            lines += [f"{indent}{name}: {len(item)}", *(f"{indent}  {entry}" for entry in item)]
        else:
            lines.append(f"{indent}{name}: {item}")
    return lines
