"""The commands of the Compose stack: run every service in order, or start, stop, follow and enter its containers.

In: the options of a command, and the recipe that they name. Out: what tutor/pipeline/compose.py did.
"""

from pathlib import Path

import click

from tutor.cli.options import json_option, load_recipe, print_result, progress_on_stderr, recipe_option


@click.group("stack")
def stack_group() -> None:
    """Run every stage in its container, and Ollama (Compose)."""


@stack_group.command("run")
@click.option("--gpu/--no-gpu", default=None, help="Require a GPU, or run without one; the recipe decides by default.")
@recipe_option
@json_option
@click.pass_obj
def stack_run(flags: dict[str, bool], recipe_path: Path, build: Path, *, gpu: bool | None, as_json: bool) -> None:
    """Run preflight, images, trainer, merger, converter, Ollama, publisher, evaluator and reporter."""
    from tutor.pipeline import compose

    with progress_on_stderr(flags):
        result = compose.run_all(load_recipe(recipe_path), build, gpu=gpu)
    print_result(result, compose.result_lines(result), as_json=as_json)


@stack_group.command("call")
@click.argument("name", type=click.Choice(["up", "down", "logs", "shell"]))
@recipe_option
@click.pass_context
def stack_call(context: click.Context, name: str, recipe_path: Path, build: Path) -> None:
    """Start or stop Ollama's container, follow its log, or open a shell in the trainer's image."""
    from tutor.pipeline import compose

    context.exit(compose.run_command(load_recipe(recipe_path), build, name))
