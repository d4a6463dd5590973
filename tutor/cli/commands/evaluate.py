"""The commands that evaluate: eval, compare. Each reads its options, calls one function and prints what it gives."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tutor.cli.options import (
    Command,
    adapter_option,
    emit,
    host_option,
    json_option,
    read,
    recipe_option,
    shown_on_stderr,
)

ENGINES = ("llamacpp", "ollama", "hf")
NAMES = "tutor, base, adapter, Q8_0, base-F16, hf:tutor, ollama:NAME"


def asking(engine_help: str) -> Callable[[Command], Command]:
    """--engine, --parallel and --host, given to the command as one `how`."""
    engine = click.option(
        "--engine", type=click.Choice(ENGINES), default="llamacpp", show_default=True, help=engine_help
    )
    parallel = click.option(
        "--parallel",
        type=click.IntRange(1, 64),
        default=1,
        show_default=True,
        help="Prompts at a time: llama-servers of one slot each, so that the answers stay the same; Ollama's requests.",
    )

    def wrap(command: Command) -> Command:
        @functools.wraps(command)
        def collected(*args: Any, **options: Any) -> Any:
            how = {name: options.pop(name) for name in ("engine", "parallel", "host")}
            return command(*args, how=how, **options)

        wrapped: Any = engine(parallel(host_option(collected)))
        return wrapped  # type: ignore[no-any-return]

    return wrap


@click.command("eval")
@click.option(
    "-m", "--model", "names", metavar="NAME[,NAME]", help=f"Whom to ask: {NAMES}. The first is the yardstick."
)
@asking("Without --model: llamacpp compares base and tutor; ollama asks the published tutor.")
@adapter_option
@recipe_option
@json_option
@click.pass_obj
def eval_command(  # noqa: PLR0913 - a command's options
    flags: dict[str, bool],
    names: str | None,
    how: dict[str, Any],
    recipe_path: Path,
    build: Path,
    *,
    adapter: bool,
    as_json: bool,
) -> None:
    """Answer the held-out prompts and judge: by default with the base and the tutor."""
    from tutor.cli import summary
    from tutor.pipeline import runner as pipeline
    from tutor.serving import compare as evaluating
    from tutor.serving.models import named

    recipe = read(recipe_path)
    with shown_on_stderr(flags):
        engine, host, parallel = how["engine"], how["host"], how["parallel"]
        if names is None and engine == "ollama":
            result = evaluating.published(recipe, build, host=host, adapter=adapter, parallel=parallel)
        elif names is None and engine == "llamacpp":
            pipeline.run_one("evaluate", recipe, build)
            result = summary.collect(recipe, build)["stages"]["evaluate"]
        else:
            whom = [named(name.strip(), engine, host) for name in (names or "base,tutor").split(",")]
            result = evaluating.evaluate(recipe, build, whom, parallel=parallel)
    emit(result, summary.verdict_lines(result), as_json=as_json)


@click.command("compare")
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@asking("Who answers where A or B is a model's name; ollama: both are models that Ollama has.")
@recipe_option
@json_option
@click.pass_obj
def compare_command(  # noqa: PLR0913 - a command's options
    flags: dict[str, bool],
    before: str,
    after: str,
    how: dict[str, Any],
    recipe_path: Path,
    build: Path,
    *,
    as_json: bool,
) -> None:
    """What changed from A to B, prompt by prompt: each a build folder, its answers, or a model to ask."""
    from tutor.cli import summary
    from tutor.serving import compare as evaluating

    recipe = read(recipe_path)
    with shown_on_stderr(flags):
        result = evaluating.compare(recipe, build, before, after, **how)
    emit(result, summary.compared_lines(result), as_json=as_json)


COMMANDS = (eval_command, compare_command)
