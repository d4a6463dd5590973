"""The commands that serve and ask: ask, chat, eval through Ollama, publish, promote, rollback, models."""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tutor.cli_options import Command, emit, json_option, read, recipe_option, shown_on_stderr

if TYPE_CHECKING:
    from tutor.engines.answer import Engine
    from tutor.recipe import Recipe

MODELS = ("tutor", "base", "adapter")
ENGINES = ("llamacpp", "ollama")

host_option = click.option(
    "--host", envvar="OLLAMA_HOST", show_envvar=True, help="Where Ollama answers; 127.0.0.1:11434 where not said."
)
adapter_option = click.option("--adapter", is_flag=True, help="The base with the adapter on it, not the merged model.")


@dataclass(frozen=True)
class Who:
    """Who answers: which model, through which engine."""

    model: str
    quantization: str | None
    engine: str
    host: str | None


def who_answers(command: Command) -> Command:
    """--model, --quantization, --engine and --host, given to the command as one `who`."""
    model = click.option(
        "-m",
        "--model",
        type=click.Choice(MODELS),
        default="tutor",
        show_default=True,
        help="tutor and base answer through llama.cpp; adapter is base + adapter in transformers.",
    )
    quantization = click.option("--quantization", help="Which GGUF answers; the one that is served.")
    engine = click.option(
        "--engine",
        type=click.Choice(ENGINES),
        default="llamacpp",
        show_default=True,
        help="llamacpp starts a server of its own; ollama asks what tutor publish published.",
    )

    @functools.wraps(command)
    def collected(*args: Any, **options: Any) -> Any:
        parts = {name: options.pop(name) for name in ("model", "quantization", "engine", "host")}
        return command(*args, who=Who(**parts), **options)

    wrapped: Any = model(quantization(engine(host_option(collected))))
    return wrapped  # type: ignore[no-any-return]


@click.command("ask")
@click.argument("question", required=False)
@who_answers
@recipe_option
@json_option
@click.pass_obj
def ask_command(
    flags: dict[str, bool], question: str | None, who: Who, recipe_path: Path, build: Path, *, as_json: bool
) -> None:
    """Ask one QUESTION (or stdin) and print the answer."""
    from tutor.engines.answer import sampling
    from tutor.template import conversation, shown

    recipe = read(recipe_path)
    try:
        text = (question if question is not None else sys.stdin.read() if sys.stdin else "").strip()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"the question on stdin is not UTF-8 (byte {error.start})") from None
    if not text:
        raise click.UsageError("no question: give it as an argument or on stdin")
    started = False

    def write(piece: str) -> None:
        nonlocal started
        piece = piece if started else piece.lstrip()
        started = started or bool(piece)
        click.echo(piece, nl=False)

    with shown_on_stderr(flags), _engine(recipe, build, who) as engine:
        answer = engine.answer(
            conversation(text, recipe.system),
            sampling(recipe.generate, recipe.seed),
            None if as_json else write,
        )
    if as_json:
        click.echo(json.dumps({**asdict(answer), "text": shown(answer.text)}, ensure_ascii=False))
        return
    click.echo()
    if answer.finish == "length":
        click.echo(f"(cut at {answer.tokens} tokens)", err=True)


@click.command("chat")
@who_answers
@recipe_option
@click.pass_obj
def chat_command(flags: dict[str, bool], who: Who, recipe_path: Path, build: Path) -> None:
    """Talk with the model; /salir leaves, Ctrl-C stops an answer."""
    from tutor.chat import Terminal, converse
    from tutor.engines.answer import sampling

    recipe = read(recipe_path)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing and history
    terminal = Terminal(
        read=input,
        write=lambda piece: click.echo(piece, nl=False),
        note=lambda line: click.echo(line, err=True),
    )
    with shown_on_stderr({**flags, "quiet": True}), _engine(recipe, build, who) as engine:
        converse(
            engine,
            sampling(recipe.generate, recipe.seed),
            terminal,
            system=recipe.system,
            context=recipe.generate.context,
        )


@contextlib.contextmanager
def _engine(recipe: "Recipe", build: Path, who: Who) -> "Iterator[Engine]":
    """The engine that answers, stopped when done. Raises ArtifactError naming the stage that is missing."""
    from tutor import artifacts, pipeline
    from tutor.errors import RecipeError

    folder = build / recipe.name
    if who.engine == "ollama":
        from tutor import publishing
        from tutor.engines import ollama

        if who.model == "base" or who.quantization:
            raise RecipeError("Ollama has what was published: no base, and one quantization", "try --engine llamacpp")
        with ollama.serve(publishing.served_name(recipe, adapter=who.model == "adapter"), who.host) as engine:
            yield engine
        return
    if who.model == "adapter":
        from tutor.engines import hf
        from tutor.modelfolder import read_facts

        trained = artifacts.require(folder / pipeline.BY_NAME["train"].folder, "train")
        _, base = read_facts(folder / pipeline.BY_NAME["base"].folder)
        yield hf.load(
            base,
            folder / pipeline.BY_NAME["train"].folder,
            quantization=trained.results["quantization"],  # the recipe may leave it open
            precision=recipe.train.precision,
        )
        return
    from tutor.engines import llamacpp
    from tutor.served import served_quantization

    made = folder / pipeline.BY_NAME["convert"].folder
    artifacts.require(made, "convert")
    ladder = folder / pipeline.BY_NAME["ladder"].folder
    kind = who.quantization or served_quantization(recipe.ollama.quantization, ladder)
    gguf = made / f"{who.model}-{kind}.gguf"
    if not gguf.is_file():
        found = ", ".join(sorted(path.stem.partition("-")[2] for path in made.glob(f"{who.model}-*.gguf")))
        raise RecipeError(f"{gguf} is not there", f"made for {who.model}: {found}")
    with llamacpp.serve(
        gguf, context=recipe.generate.context, threads=len(os.sched_getaffinity(0)), log=folder / "server.log"
    ) as server:
        yield server


@click.command("eval")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="llamacpp",
    show_default=True,
    help="llamacpp compares base and tutor; ollama asks the published tutor, and how far both engines agree.",
)
@host_option
@adapter_option
@recipe_option
@json_option
@click.pass_obj
def eval_command(  # noqa: PLR0913 - a command's options
    flags: dict[str, bool],
    engine: str,
    host: str | None,
    recipe_path: Path,
    build: Path,
    *,
    adapter: bool,
    as_json: bool,
) -> None:
    """Answer the held-out prompts with the base and the tutor, and judge."""
    from tutor import pipeline, publishing, summary

    recipe = read(recipe_path)
    with shown_on_stderr(flags):
        if engine == "ollama":
            model = publishing.served_name(recipe, adapter=adapter)
            result = publishing.evaluate(recipe, build, host=host, model=model)
        else:
            pipeline.run_one("evaluate", recipe, build)
            result = summary.collect(recipe, build)["stages"]["evaluate"]
    emit(result, summary.verdict_lines(result), as_json=as_json)


@click.command("publish")
@host_option
@adapter_option
@click.option("--wait", default=5.0, show_default=True, help="Seconds that a server may need to start.")
@click.option("--if-there", is_flag=True, help="No server is no error: say so and end.")
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
    as_json: bool,
) -> None:
    """Put the model into Ollama, prove that it is prompted as trained, and serve it as latest."""
    from tutor import publishing
    from tutor.engines.ollama_wire import UnreachableError

    try:
        with shown_on_stderr(flags):
            result = publishing.publish(read(recipe_path), build, host=host, adapter=adapter, wait=wait)
    except UnreachableError as error:
        if not if_there:
            raise
        emit({"published": False, "why": error.message}, [f"Not published: {error.message}"], as_json=as_json)
        return
    emit(result, publishing.published_lines(result), as_json=as_json)


@click.command("promote")
@click.argument("published_build", metavar="[BUILD]", required=False)
@host_option
@adapter_option
@recipe_option
@json_option
def promote_command(
    published_build: str | None, host: str | None, recipe_path: Path, build: Path, *, adapter: bool, as_json: bool
) -> None:
    """Serve a published BUILD (the newest one where none is named) as latest."""
    del build
    from tutor import publishing

    result = publishing.promote(read(recipe_path), host=host, build=published_build, adapter=adapter)
    emit(result, [f"{result['model']}:latest is {result['build']} at {result['host']}"], as_json=as_json)


@click.command("rollback")
@host_option
@adapter_option
@recipe_option
@json_option
def rollback_command(host: str | None, recipe_path: Path, build: Path, *, adapter: bool, as_json: bool) -> None:
    """Serve again what was latest before."""
    del build
    from tutor import publishing

    result = publishing.rollback(read(recipe_path), host=host, adapter=adapter)
    emit(result, [f"{result['model']}:latest is {result['build']} again at {result['host']}"], as_json=as_json)


@click.command("models")
@host_option
@recipe_option
@json_option
def models_command(host: str | None, recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """What is published, the newest build first."""
    del build
    from tutor import publishing

    rows = publishing.models(read(recipe_path), host=host)
    emit(rows, publishing.model_lines(rows), as_json=as_json)


COMMANDS = (
    ask_command,
    chat_command,
    eval_command,
    publish_command,
    promote_command,
    rollback_command,
    models_command,
)
