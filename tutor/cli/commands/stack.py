"""The commands of the Compose stack: all of it in order, and one's hands on the containers."""

from pathlib import Path

import click

from tutor.cli.options import emit, json_option, read, recipe_option, shown_on_stderr


@click.group("stack")
def stack_group() -> None:
    """The Compose stack: every stage in its container, and Ollama."""


@stack_group.command("run")
@click.option("--gpu/--no-gpu", default=None, help="Require the GPU, or leave it out; by the recipe where not said.")
@recipe_option
@json_option
@click.pass_obj
def stack_run(flags: dict[str, bool], recipe_path: Path, build: Path, *, gpu: bool | None, as_json: bool) -> None:
    """Preflight, images, trainer, merger, converter, Ollama, publisher, evaluator, reporter."""
    from tutor.pipeline import compose as stack

    with shown_on_stderr(flags):
        result = stack.run_all(read(recipe_path), build, gpu=gpu)
    emit(result, stack.lines(result), as_json=as_json)


@stack_group.command("call")
@click.argument("name", type=click.Choice(["up", "down", "logs", "shell"]))
@recipe_option
@click.pass_context
def stack_call(context: click.Context, name: str, recipe_path: Path, build: Path) -> None:
    """Start or stop Ollama's container, follow its log, or open a shell in the trainer's image."""
    from tutor.pipeline import compose as stack

    context.exit(stack.call(read(recipe_path), build, name))
