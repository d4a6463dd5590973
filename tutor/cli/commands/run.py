"""The commands that make or remove stage folders: run, one command a stage, data split, clean.

In: the options of a command, and the recipe that they name. Out: what the pipeline did, on stdout. Decides nothing
about stages: tutor/pipeline runs them, or finds them up to date.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tutor.cli.exit import print_error
from tutor.cli.options import indented, json_option, load_recipe, print_result, progress_on_stderr, recipe_option
from tutor.errors import GateError
from tutor.machine import distributed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tutor.recipe.settings import Recipe


@click.command("run")
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option(
    "--publish", is_flag=True, help="Then publish to Ollama where one answers (OLLAMA_HOST), and update the report."
)
@recipe_option
@json_option
@click.pass_obj
def run_command(
    flags: dict[str, bool], until: str | None, recipe_path: Path, build: Path, *, publish: bool, as_json: bool
) -> None:
    """Run every stage that is not up to date, and print a summary."""
    from tutor.artifacts.layout import BuildFolder
    from tutor.cli import summary
    from tutor.pipeline import registry, repair

    if until is not None and until not in registry.BY_NAME:
        raise click.BadParameter(f"{until!r}; known: {', '.join(registry.BY_NAME)}", param_hint="--until")
    if publish and until is not None:
        raise click.UsageError("--publish needs every stage: remove --until")
    recipe = load_recipe(recipe_path)
    with progress_on_stderr(flags):
        ran = repair.run_all(recipe, build, until=until)
    collected = {"ran": ran, **summary.collect(recipe, build)}
    opening = [] if ran else ["Nothing to do: every stage is up to date."]
    lines = [*opening, *summary.summary_lines(collected, str(recipe.path))]
    if not publish:
        print_result(collected, lines, as_json=as_json)
        return
    if not as_json:
        print_result(None, lines, as_json=False)  # before publishing, which may be refused
    with progress_on_stderr(flags):
        published, lines = _publish(recipe, build)
    collected = {"ran": ran, **summary.collect(recipe, build), "published": published}
    page = summary.report_lines(BuildFolder(build, recipe.name).stage("report"), collected["stages"]["report"])
    print_result(collected, [*lines, *page], as_json=as_json)


def _publish(recipe: "Recipe", build: Path) -> tuple[dict[str, Any], list[str]]:
    """Publish the model and update the report, where a server listens; return what was done, and that as lines."""
    from tutor.engines.ollama.probe import require_listener
    from tutor.engines.ollama.protocol import UnreachableError
    from tutor.pipeline import runner

    try:
        require_listener()
    except UnreachableError as error:
        return {"published": False, "why": error.message}, [f"Not published: {error.message}"]
    from tutor.serving import promote, publish

    result = promote.publish_and_promote(recipe, build, wait=0)
    runner.run_one("report", recipe, build)
    return result, publish.published_lines(result)


@click.command("ladder")
@recipe_option
@json_option
@click.pass_obj
def ladder_command(flags: dict[str, bool], recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """Benchmark the quantizations and choose one.

    The table: size; perplexity of the held-out answers, and its increase over F16's (loses); KL divergence from F16
    in nats a token, its mean and 99th percentile; share of tokens on which both agree (same); tokens/s of a prompt
    (reads) and of an answer (writes), and peak memory, in llama-server on this machine. ladder.svg is a chart of the
    table. With ollama.quantization = "auto" the smallest one within convert.budget is served.
    """
    from tutor.cli.model_lines import ladder_lines

    _run_stage("ladder", flags, recipe_path, build, as_json=as_json, to_lines=ladder_lines)


@click.command("parity")
@click.option(
    "--host", metavar="HOST", help="Compare the model on this Ollama server with the record of the parity stage."
)
@recipe_option
@json_option
@click.pass_context
def parity_command(context: click.Context, host: str | None, recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """Compare the model's answers in all engines, token by token. Exit 8 when an engine diverges."""
    from tutor.cli import summary
    from tutor.pipeline import runner
    from tutor.serving import publish
    from tutor.stages.parity.gate import parity_table

    recipe = load_recipe(recipe_path)
    with progress_on_stderr(context.obj):
        if host is None:
            with contextlib.suppress(GateError):  # printed below, after the table
                runner.run_one("parity", recipe, build)
            result = summary.collect(recipe, build)["stages"]["parity"]
        else:
            result = publish.compare_published(recipe, build, host=host)
    print_result(result, parity_table(result["hand_offs"]), as_json=as_json)
    if refused := result.get("refused"):
        context.exit(print_error(refused["message"], GateError.code, refused["hint"], as_json=False))


@click.command("clean")
@click.argument("stages", nargs=-1)
@recipe_option
@json_option
def clean_command(stages: tuple[str, ...], recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """Delete the outputs of STAGES (all when none is named), and nothing that tutor did not make."""
    from tutor.pipeline.cleaning import clean

    cleaned = clean(load_recipe(recipe_path), build, stages)
    value = {"removed": list(map(str, cleaned.removed)), "left": {str(path): why for path, why in cleaned.left.items()}}
    lines = [f"removed {path}" for path in cleaned.removed]
    print_result(value, [*lines, *(f"left {path}: {why}" for path, why in cleaned.left.items())], as_json=as_json)


def _stage_command(stage: str, command: str, about: str) -> click.Command:
    """Return a command of this name that runs one stage, without further options."""

    @click.command(command, help=about)
    @recipe_option
    @json_option
    @click.pass_obj
    def run_stage(flags: dict[str, bool], recipe_path: Path, build: Path, *, as_json: bool) -> None:
        _run_stage(stage, flags, recipe_path, build, as_json=as_json)

    return run_stage


data_split = _stage_command("data", "split", "Write the train and held-out split: the pipeline's first stage.")

STAGE_COMMANDS = (
    _stage_command("base", "base", "Fetch or make the base model, and check it."),
    _stage_command("train", "train", "Train the LoRA adapter (QLoRA) and measure its held-out loss."),
    _stage_command("merge", "merge", "Merge the adapter into the 16-bit base."),
    _stage_command("convert", "convert", "Convert to GGUF and quantize, with the pinned llama.cpp."),
    ladder_command,
    parity_command,
    _stage_command("modelfile", "modelfile", "Render the Modelfile for Ollama."),
    _stage_command("forgetting", "forgetting", "Score texts about other subjects with base and tutor."),
)
"""The commands that run one stage each, in pipeline order."""


def _run_stage(
    name: str,
    flags: dict[str, bool],
    recipe_path: Path,
    build: Path,
    *,
    as_json: bool,
    to_lines: "Callable[[Mapping[str, Any]], list[str]]" = indented,
) -> None:
    from tutor.artifacts.layout import BuildFolder
    from tutor.artifacts.manifest import require_stage
    from tutor.pipeline import runner

    recipe = load_recipe(recipe_path)
    with progress_on_stderr(flags):
        ran = runner.run_one(name, recipe, build)
    if not distributed.is_main_process():
        return
    folder = BuildFolder(build, recipe.name).stage(name)
    manifest = require_stage(folder, name)
    result = {"stage": name, "ran": ran, "folder": str(folder), "results": manifest.results}
    lines = [f"{name}: {folder}" if ran else f"{name}: up to date, {folder}", *to_lines(manifest.results)]
    print_result(result, lines, as_json=as_json)
