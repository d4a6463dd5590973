"""The commands that query a model, and those that publish one: ask, chat, publish, promote, rollback, models.

In: the options of a command, a question, an Ollama server. Out: answers, and what changed on the server, on stdout.
The work is done in tutor/serving.
"""

import contextlib
import functools
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tutor.cli.options import (
    Command,
    Seconds,
    TextCommand,
    adapter_option,
    host_option,
    json_option,
    load_recipe,
    print_result,
    progress_on_stderr,
    recipe_option,
)
from tutor.formats import terminal
from tutor.serving.model_names import MODELS, ModelChoice

if TYPE_CHECKING:
    from tutor.engines.protocol import Engine
    from tutor.recipe.settings import Recipe

force_option = click.option(
    "--force",
    is_flag=True,
    help="Serve the build although a gate refused it, or its inputs were edited since; both are recorded.",
)

CHAT_ENGINES = ("llamacpp", "ollama")
"""Values of --engine for ask and chat; transformers runs only `--model adapter`."""


def model_options(command: Command) -> Command:
    """Add --model, --quantization, --engine and --host, which the command gets as one ModelChoice, `choice`."""
    model = click.option(
        "-m",
        "--model",
        type=click.Choice(MODELS),
        default="tutor",
        show_default=True,
        help="tutor and base run in llama.cpp, base with its own chat template and sampling, base-as-tutor with the "
        "tutor's; adapter is the base with the adapter in transformers.",
    )
    quantization = click.option("--quantization", help="Quantization of the GGUF; by default the served one.")
    engine = click.option(
        "--engine",
        type=click.Choice(CHAT_ENGINES),
        default="llamacpp",
        show_default=True,
        help="llamacpp starts a llama-server; ollama uses the published model.",
    )

    @functools.wraps(command)
    def collected(*args: Any, **options: Any) -> Any:
        parts = {name: options.pop(name) for name in ("model", "quantization", "engine", "host")}
        return command(*args, choice=ModelChoice(**parts), **options)

    wrapped: Any = model(quantization(engine(host_option(collected))))
    return wrapped  # type: ignore[no-any-return]


@click.command("ask", cls=TextCommand)
@click.argument("question", required=False)
@model_options
@recipe_option
@json_option
@click.pass_obj
def ask_command(
    flags: dict[str, bool],
    question: str | None,
    choice: ModelChoice,
    recipe_path: Path,
    build: Path,
    *,
    as_json: bool,
) -> None:
    """Ask one QUESTION (or the text on stdin) and print the answer.

    A thought before the answer goes to stderr. A QUESTION that looks like an option goes behind --.
    """
    from tutor.artifacts.layout import BuildFolder
    from tutor.prompt.messages import conversation, display_text
    from tutor.serving.chat import ShownAnswer, Terminal
    from tutor.serving.models import chat_asking

    recipe = load_recipe(recipe_path)
    try:
        text = (question if question is not None else sys.stdin.read() if sys.stdin else "").strip()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the question on stdin is not UTF-8 (byte {error.start})") from None
    if not text:
        raise click.UsageError("no question: give it as an argument or on stdin")
    folder = BuildFolder(build, recipe.name)
    way = chat_asking(recipe, folder, choice)
    thought = terminal.ThoughtStream()
    place = Terminal(input, terminal.AnswerStream().write, terminal.write_note, thought.write, thought.close)
    shown = ShownAnswer(way.prompt, replace(place, think=_ignore) if flags["quiet"] else place)
    with progress_on_stderr(flags), _answering_engine(recipe, build, choice) as engine:
        answer = engine.answer(
            conversation(text, way.system),
            way.generation,
            None if as_json else shown.add,
        )
    if as_json:
        terminal.write_json({**asdict(answer), "text": display_text(answer.text)})
        return
    shown.close()
    if answer.finish == "length":
        within = " within its thought" if answer.thought and not answer.text.strip() else ""
        terminal.write_note(f"(cut at {answer.tokens} tokens{within})")


@click.command("chat")
@model_options
@recipe_option
@click.pass_obj
def chat_command(flags: dict[str, bool], choice: ModelChoice, recipe_path: Path, build: Path) -> None:
    """Chat with the model; /salir ends the chat, Ctrl-C stops an answer."""
    from tutor.artifacts.layout import BuildFolder
    from tutor.serving.chat import Terminal, converse
    from tutor.serving.models import chat_asking, gpu_notice

    recipe = load_recipe(recipe_path)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing and history
    folder = BuildFolder(build, recipe.name)
    way = chat_asking(recipe, folder, choice)
    thought = terminal.ThoughtStream()
    place = Terminal(input, terminal.AnswerStream().write, terminal.write_note, thought.write, thought.close)
    with progress_on_stderr({**flags, "quiet": True}), _answering_engine(recipe, build, choice) as engine:
        if notice := gpu_notice(published(recipe, choice)):
            terminal.write_note(notice)
        converse(
            engine,
            way.generation,
            place,
            system=way.system,
            context=recipe.generate.context,
            prompt=way.prompt,
        )


def _ignore(piece: str) -> None:
    del piece


def _answering_engine(
    recipe: "Recipe", build: Path, choice: ModelChoice
) -> "contextlib.AbstractContextManager[Engine]":
    """Return the engine that answers."""
    from tutor.serving.models import open_engine

    return open_engine(recipe, build, published(recipe, choice))


def published(recipe: "Recipe", choice: ModelChoice) -> ModelChoice:
    """Return the choice; in Ollama the model has the name that publishing gave it."""
    from tutor.errors import RecipeError
    from tutor.serving.builds import served_name

    if choice.engine != "ollama":
        return choice
    if choice.model.startswith("base") or choice.quantization:
        raise RecipeError("Ollama has only the published model: no base, and one quantization", "try --engine llamacpp")
    return replace(choice, model=served_name(recipe, adapter=choice.model == "adapter"))


@click.command("publish")
@host_option
@adapter_option
@click.option(
    "--wait", type=Seconds(), default=5.0, show_default=True, help="Maximum seconds to wait for the server to start."
)
@click.option("--if-there", is_flag=True, help="Exit 0 when no server answers.")
@click.option(
    "--unchecked",
    is_flag=True,
    help="Publish although engines were not compared, for lack of memory; record, summary and model card say so.",
)
@force_option
@recipe_option
@json_option
@click.pass_obj
def publish_command(  # noqa: PLR0913 - a command's options
    flags: dict[str, bool],
    host: str | None,
    wait: float,
    recipe_path: Path,
    build: Path,
    *,
    adapter: bool,
    if_there: bool,
    unchecked: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Publish the model to Ollama and serve it unless it is worse.

    The published build is first compared with the trained model; a build that passes is served as latest. On another
    version of the server it is checked again, without an upload. Exit 5 when the rows, the recipe or another input
    were edited since the model was made: what is published is then of the older ones, and stays. Exit 8 when engines
    on the way to the published model differ, or were not compared.
    """
    from tutor.engines.ollama.health import absence
    from tutor.serving import promote, publish

    recipe = load_recipe(recipe_path)
    with progress_on_stderr(flags):
        if if_there and (absent := absence(host, wait)):
            print_result({"published": False, "why": absent}, [f"Not published: {absent}"], as_json=as_json)
            return
        result = promote.publish_and_promote(
            recipe, build, host=host, adapter=adapter, wait=wait, force=force, unchecked=unchecked
        )
    print_result(result, publish.published_lines(result), as_json=as_json)


@click.command("promote")
@click.argument("published_build", metavar="[BUILD]", required=False)
@host_option
@adapter_option
@force_option
@recipe_option
@json_option
@click.pass_obj
def promote_command(  # noqa: PLR0913 - a command's options
    flags: dict[str, bool],
    published_build: str | None,
    host: str | None,
    recipe_path: Path,
    build: Path,
    *,
    adapter: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Serve a published BUILD as latest unless it is worse.

    Without BUILD it is the newest one. Exit 8 when it is worse than the build in service.
    """
    from tutor.serving import promote, publish

    with progress_on_stderr(flags):
        result = promote.promote(
            load_recipe(recipe_path), build, published_build, host=host, adapter=adapter, force=force
        )
    line = f"{result['model']}:latest is {result['build']} at {result['host']}"
    print_result(result, [line, *publish.promotion_lines(result["promotion"])], as_json=as_json)


@click.command("rollback")
@host_option
@adapter_option
@recipe_option
@json_option
def rollback_command(host: str | None, recipe_path: Path, build: Path, *, adapter: bool, as_json: bool) -> None:
    """Serve the build that was latest before."""
    del build
    from tutor.serving import publish

    result = publish.rollback(load_recipe(recipe_path), host=host, adapter=adapter)
    print_result(result, [f"{result['model']}:latest is {result['build']} again at {result['host']}"], as_json=as_json)


@click.command("models")
@host_option
@recipe_option
@json_option
def models_command(host: str | None, recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """List the published builds, the newest first."""
    del build
    from tutor.serving import publish

    rows = publish.published_builds(load_recipe(recipe_path), host=host)
    print_result(rows, publish.build_lines(rows), as_json=as_json)


COMMANDS = (
    ask_command,
    chat_command,
    publish_command,
    promote_command,
    rollback_command,
    models_command,
)
