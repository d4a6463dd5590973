"""The commands that evaluate models: eval, compare, baselines.

In: names of models, folders with answers. Out: rates and differences on stdout. The work is done in
tutor/serving/evaluation.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tutor.cli.options import (
    Command,
    adapter_option,
    host_option,
    json_option,
    load_recipe,
    print_result,
    progress_on_stderr,
    recipe_option,
)
from tutor.serving.model_names import ENGINES, KNOWN_NAMES


def engine_options(engine_help: str) -> Callable[[Command], Command]:
    """Add --engine, --parallel and --host, which the command gets as one dictionary, `engine_settings`."""
    engine = click.option(
        "--engine", type=click.Choice(ENGINES), default="llamacpp", show_default=True, help=engine_help
    )
    parallel = click.option(
        "--parallel",
        type=click.IntRange(1, 64),
        default=1,
        show_default=True,
        help="Number of prompts at a time: llama-servers of one slot each (equal answers), or requests to Ollama.",
    )

    def wrap(command: Command) -> Command:
        @functools.wraps(command)
        def collected(*args: Any, **options: Any) -> Any:
            settings = {name: options.pop(name) for name in ("engine", "parallel", "host")}
            return command(*args, engine_settings=settings, **options)

        wrapped: Any = engine(parallel(host_option(collected)))
        return wrapped  # type: ignore[no-any-return]

    return wrap


@click.command("eval")
@click.option(
    "-m",
    "--model",
    "names",
    metavar="NAME[,NAME]",
    help=f"Models to evaluate: {KNOWN_NAMES}. The first is the baseline.",
)
@engine_options("Without --model: llamacpp compares base and tutor; ollama the published tutor and its base there.")
@adapter_option
@recipe_option
@json_option
@click.pass_obj
def eval_command(  # noqa: PLR0913 - a command's options
    flags: dict[str, bool],
    names: str | None,
    engine_settings: dict[str, Any],
    recipe_path: Path,
    build: Path,
    *,
    adapter: bool,
    as_json: bool,
) -> None:
    """Answer the held-out prompts and grade the answers.

    By default the base and the tutor are evaluated.
    """
    from tutor.cli import summary, verdict_tables
    from tutor.pipeline import runner
    from tutor.serving.evaluation import compare, published
    from tutor.serving.model_names import parse_model

    recipe = load_recipe(recipe_path)
    with progress_on_stderr(flags):
        engine, host, parallel = (engine_settings[name] for name in ("engine", "host", "parallel"))
        if names is None and engine == "ollama":
            result = published.evaluate_published(recipe, build, host=host, adapter=adapter, parallel=parallel)
        elif names is None and engine == "llamacpp":
            runner.run_one("evaluate", recipe, build)
            result = summary.collect(recipe, build)["stages"]["evaluate"]
        else:
            choices = [parse_model(name.strip(), engine, host) for name in (names or "base,tutor").split(",")]
            result = compare.evaluate_models(recipe, build, choices, parallel=parallel)
    print_result(result, verdict_tables.verdict_lines(result), as_json=as_json)


@click.command("compare")
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@engine_options("Engine of a model that A or B names; ollama: both are models in Ollama.")
@recipe_option
@json_option
@click.pass_obj
def compare_command(  # noqa: PLR0913 - a command's options
    flags: dict[str, bool],
    before: str,
    after: str,
    engine_settings: dict[str, Any],
    recipe_path: Path,
    build: Path,
    *,
    as_json: bool,
) -> None:
    """Compare A with B, prompt by prompt. Each is a build folder, a file of answers, or a model to run."""
    from tutor.cli import verdict_tables
    from tutor.serving.evaluation import compare

    recipe = load_recipe(recipe_path)
    with progress_on_stderr(flags):
        result = compare.compare_models(recipe, build, before, after, **engine_settings)
    print_result(result, verdict_tables.comparison_lines(result), as_json=as_json)


@click.command("baselines")
@click.option("--system", metavar="TEXT", help="System text to try. Default: the recipe's, else the form of the rows.")
@recipe_option
@json_option
@click.pass_obj
def baselines_command(
    flags: dict[str, bool], system: str | None, recipe_path: Path, build: Path, *, as_json: bool
) -> None:
    """Compare the tutor with ways that need no training.

    The held-out prompts are asked to the base alone, with a system text, with 1, 3 and 5 examples of the rows, with
    the most similar rows, and to the tutor. Ends with the best way, the cheapest that is not shown to be worse, and
    whether fine-tuning pays.
    """
    from tutor.serving.evaluation.baselines import run_baselines
    from tutor.stages.report.baselines import baseline_lines

    recipe = load_recipe(recipe_path)
    with progress_on_stderr(flags):
        result = run_baselines(recipe, build, system)
    print_result(result, baseline_lines(result), as_json=as_json)


COMMANDS = (eval_command, compare_command, baselines_command)
