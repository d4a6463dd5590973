"""The commands, in pipeline order. Each reads its options, calls one function and prints what it gives.

Everything heavy is imported inside the commands: `tutor --help` must not wait for torch.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from tutor.cli import exit as boundary
from tutor.cli.commands import data as cli_data
from tutor.cli.commands import doctor as cli_doctor
from tutor.cli.commands import evaluate as cli_eval
from tutor.cli.commands import inspect as cli_verify
from tutor.cli.commands import report as cli_report
from tutor.cli.commands import serving as cli_serving
from tutor.cli.commands import stack as cli_stack
from tutor.cli.options import emit, json_option, read, recipe_option, shown_on_stderr, tree
from tutor.errors import ArtifactError, GateError, RecipeError
from tutor.machine import distributed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tutor.recipe.settings import Recipe

EXIT_CODES = """\b
Exit codes: 0 ok · 1 a bug · 2 usage or recipe · 3 bad data · 4 this machine
(GPU, memory, disk, programs) · 5 an artifact is damaged or does not match ·
6 a service · 7 another run holds the lock · 8 a gate said no · 130 Ctrl-C ·
143 SIGTERM."""


class InOrder(click.Group):
    """A group that lists its commands as they are written: in pipeline order."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands' names."""
        del ctx
        return list(self.commands)


@click.group(
    cls=InOrder, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="tutor")
@click.option("--debug", is_flag=True, envvar="TUTOR_DEBUG", help="Show the traceback of an error.")
@click.option("-q", "--quiet", is_flag=True, help="Only warnings on stderr.")
@click.pass_context
def cli(context: click.Context, *, debug: bool, quiet: bool) -> None:
    """From a JSONL file of questions and answers to `ollama run tutor`, stage by stage.

    `tutor run` does what is not up to date, in order. A flag wins over its environment variable, and that over the
    default; settings of the model itself stand only in the recipe.
    """
    context.obj = {"debug": debug, "quiet": quiet}
    if distributed.world_size() > 1 and context.invoked_subcommand != "train":
        raise RecipeError(
            f"only tutor train runs in several processes, and this is tutor {context.invoked_subcommand}",
            "start it without a launcher; tutor train goes between tutor run --until base and tutor run",
        )


cli.add_command(cli_doctor.doctor_command)


@cli.group()
def data() -> None:
    """The rows: check them and their code, lint, count, split them."""


for command in cli_data.COMMANDS:
    data.add_command(command)


@data.command("split")
@recipe_option
@json_option
@click.pass_obj
def data_split(flags: dict[str, bool], recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """Write the train and held-out split: the pipeline's first stage."""
    _stage("data", flags, recipe_path, build, as_json=as_json)


def _stage_command(name: str, command: str, about: str) -> None:
    @cli.command(command, help=about)
    @recipe_option
    @json_option
    @click.pass_obj
    def _(flags: dict[str, bool], recipe_path: Path, build: Path, *, as_json: bool) -> None:
        _stage(name, flags, recipe_path, build, as_json=as_json)


_stage_command("base", "base", "Fetch or make the base model, and check it.")
_stage_command("train", "train", "Train the LoRA adapter (QLoRA), and score it on the held-out rows.")
_stage_command("merge", "merge", "Merge the adapter into the 16-bit base.")
_stage_command("convert", "convert", "Convert to GGUF and quantize, with the pinned llama.cpp.")


@cli.command("ladder")
@recipe_option
@json_option
@click.pass_obj
def ladder_command(flags: dict[str, bool], recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """Measure what each quantization loses on the held-out rows, its size, speed and memory; choose one.

    The table: size; perplexity of the held-out answers, and how much more that is than F16's (loses); KL divergence
    from F16 in nats a token, its mean and 99th percentile; how often both prefer the same token; tokens/s of
    reading a prompt and of writing an answer, and peak memory, in llama-server on this machine. ladder.svg is the
    same as a picture. The smallest inside convert.budget is served where ollama.quantization is "auto".
    """
    from tutor.cli.summary import ladder_lines

    _stage("ladder", flags, recipe_path, build, as_json=as_json, shown=ladder_lines)


@cli.command("parity")
@click.option("--host", metavar="HOST", help="Compare what this Ollama serves, with what the stage has recorded.")
@recipe_option
@json_option
@click.pass_context
def parity_command(context: click.Context, host: str | None, recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """Compare every engine that the model passes, token by token. Exit 8 when one diverges."""
    from tutor.cli import summary
    from tutor.pipeline import runner as pipeline
    from tutor.serving import publish as publishing
    from tutor.stages.parity.gate import lines

    recipe = read(recipe_path)
    with shown_on_stderr(context.obj):
        if host is None:
            with contextlib.suppress(GateError):  # said below, behind the table
                pipeline.run_one("parity", recipe, build)
            result = summary.collect(recipe, build)["stages"]["parity"]
        else:
            result = publishing.parity(recipe, build, host=host)
    emit(result, lines(result["hand_overs"]), as_json=as_json)
    if refused := result.get("refused"):
        context.exit(boundary.fail(refused["message"], GateError.code, refused["hint"], as_json=False))


_stage_command("modelfile", "modelfile", "Render the Modelfile for Ollama.")


@cli.command("run")
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@recipe_option
@json_option
@click.pass_obj
def run_command(flags: dict[str, bool], until: str | None, recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """Run every stage that is not up to date, in order, and sum up."""
    from tutor.pipeline import registry as chain
    from tutor.pipeline import runner as pipeline

    if until is not None and until not in chain.BY_NAME:
        raise click.BadParameter(f"{until!r}; known: {', '.join(chain.BY_NAME)}", param_hint="--until")
    recipe = read(recipe_path)
    with shown_on_stderr(flags):
        ran = pipeline.run_all(recipe, build, until=until)
    summary = {"ran": ran, **_summary(recipe, build)}
    opening = [] if ran else ["Nothing to do: every stage is up to date."]
    emit(summary, [*opening, *_summary_lines(recipe, build)], as_json=as_json)


@cli.command("summary")
@recipe_option
@json_option
def summary_command(recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """What the last run made: losses, files, speed, and answers side by side."""
    recipe = read(recipe_path)
    lines = _summary_lines(recipe, build) or ["Nothing to sum up yet; run: tutor run"]
    emit(_summary(recipe, build), lines, as_json=as_json)


@cli.command("status")
@click.option("--verify", is_flag=True, help="Hash every output instead of trusting its size.")
@recipe_option
@json_option
@click.pass_context
def status_command(context: click.Context, recipe_path: Path, build: Path, *, verify: bool, as_json: bool) -> None:
    """Every stage: up to date, stale, missing or damaged. Exit 5 when something is damaged."""
    from tutor.pipeline import runner as pipeline

    states = pipeline.inspect(read(recipe_path), build, content=verify)
    rows = [
        {
            "stage": state.stage.name,
            "condition": state.condition,
            "folder": str(state.folder),
            "seconds": state.manifest.seconds if state.manifest else None,
            "made": state.manifest.started if state.manifest else None,
            "problems": state.problems,
        }
        for state in states
    ]
    lines = [f"{row['stage']:<10} {row['condition']:<11} {row['folder']}" for row in rows]
    emit(rows, lines, as_json=as_json)
    if damaged := [problem for state in states for problem in state.problems]:
        # The rows are the result and already on stdout: with --json they stay the only document there.
        context.exit(boundary.fail(damaged[0], ArtifactError.code, "tutor run makes it again", as_json=False))


@cli.command("why")
@click.argument("stage")
@recipe_option
@json_option
def why_command(stage: str, recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """Why STAGE is not up to date: what changed since it was made."""
    from tutor.pipeline import registry as chain
    from tutor.pipeline import runner as pipeline

    if stage not in chain.BY_NAME:
        raise click.BadParameter(f"{stage!r}; known: {', '.join(chain.BY_NAME)}", param_hint="STAGE")
    states = {state.stage.name: state for state in pipeline.inspect(read(recipe_path), build)}
    reasons = pipeline.differences(states[stage])
    lines = reasons or [f"{stage} is up to date"]
    emit({"stage": stage, "condition": states[stage].condition, "reasons": reasons}, lines, as_json=as_json)


@cli.command("clean")
@click.argument("stages", nargs=-1)
@recipe_option
@json_option
def clean_command(stages: tuple[str, ...], recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """Remove what STAGES made (all of them when none is named)."""
    from tutor.pipeline import runner as pipeline

    removed = [str(path) for path in pipeline.clean(read(recipe_path), build, stages)]
    emit({"removed": removed}, [f"removed {path}" for path in removed], as_json=as_json)


def _stage(
    name: str,
    flags: dict[str, bool],
    recipe_path: Path,
    build: Path,
    *,
    as_json: bool,
    shown: "Callable[[Mapping[str, Any]], list[str]]" = tree,
) -> None:
    from tutor.artifacts.manifest import require_stage
    from tutor.pipeline import registry as chain
    from tutor.pipeline import runner as pipeline

    recipe = read(recipe_path)
    with shown_on_stderr(flags):
        ran = pipeline.run_one(name, recipe, build)
    if not distributed.is_main_process():
        return
    folder = build / recipe.name / chain.BY_NAME[name].folder
    manifest = require_stage(folder, name)
    result = {"stage": name, "ran": ran, "folder": str(folder), "results": manifest.results}
    lines = [f"{name}: {folder}" if ran else f"{name}: up to date, {folder}", *shown(manifest.results)]
    emit(result, lines, as_json=as_json)


def _summary(recipe: "Recipe", build: Path) -> dict[str, Any]:
    from tutor.cli import summary

    return summary.collect(recipe, build)


def _summary_lines(recipe: "Recipe", build: Path) -> list[str]:
    from tutor.cli import summary

    return summary.lines(summary.collect(recipe, build), str(recipe.path))


for command in (
    *cli_eval.COMMANDS,
    cli_report.report_command,
    *cli_serving.COMMANDS,
    *cli_verify.COMMANDS,
    cli_stack.stack_group,
):
    cli.add_command(command)


def main() -> NoReturn:
    """The console script."""
    boundary.main(cli, "tutor")
