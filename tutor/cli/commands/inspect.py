"""The commands that show what is in a build folder: summary, status, why, report, verify.

In: the options of a command, and the recipe that they name. Out: tables or JSON on stdout. `report` writes its page,
which is a stage; the others change nothing.
"""

from pathlib import Path

import click

from tutor.cli.exit import print_error
from tutor.cli.options import host_option, json_option, load_recipe, print_result, progress_on_stderr, recipe_option
from tutor.errors import ArtifactError, GateError
from tutor.formats import terminal


@click.command("summary")
@recipe_option
@json_option
def summary_command(recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """Print losses, files, speed and answers of the last run."""
    from tutor.cli import summary

    recipe = load_recipe(recipe_path)
    collected = summary.collect(recipe, build)
    lines = summary.summary_lines(collected, str(recipe.path)) or ["No results yet; run: tutor run"]
    print_result(collected, lines, as_json=as_json)


@click.command("status")
@click.option("--verify", is_flag=True, help="Hash every output instead of trusting its size.")
@recipe_option
@json_option
@click.pass_context
def status_command(context: click.Context, recipe_path: Path, build: Path, *, verify: bool, as_json: bool) -> None:
    """Show the state of every stage.

    A stage is up to date, stale, missing, damaged, or refused (its gate failed). Exit 5 when one is damaged.
    """
    from tutor.pipeline import runner

    states = runner.inspect(load_recipe(recipe_path), build, content=verify)
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
    print_result(rows, lines, as_json=as_json)
    if damaged := [problem for state in states for problem in state.problems]:
        # The rows are the result and already on stdout: with --json they stay the only document there.
        context.exit(print_error(damaged[0], ArtifactError.code, "tutor run makes it again", as_json=False))


@click.command("why")
@click.argument("stage")
@recipe_option
@json_option
def why_command(stage: str, recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """Explain why STAGE is not up to date."""
    from tutor.pipeline import registry, runner

    if stage not in registry.BY_NAME:
        raise click.BadParameter(f"{stage!r}; known: {', '.join(registry.BY_NAME)}", param_hint="STAGE")
    states = {state.stage.name: state for state in runner.inspect(load_recipe(recipe_path), build)}
    reasons = runner.stale_reasons(states[stage])
    lines = reasons or [f"{stage} is up to date"]
    print_result({"stage": stage, "condition": states[stage].condition, "reasons": reasons}, lines, as_json=as_json)


@click.command("report")
@click.option("--open", "opened", is_flag=True, help="Show the page in the browser.")
@recipe_option
@json_option
@click.pass_obj
def report_command(flags: dict[str, bool], recipe_path: Path, build: Path, *, opened: bool, as_json: bool) -> None:
    """Write all results as one page, and a model card. The page lists the stages that have not run."""
    from tutor.artifacts.layout import BuildFolder
    from tutor.artifacts.manifest import require_stage
    from tutor.cli.summary import report_lines
    from tutor.pipeline import runner

    recipe = load_recipe(recipe_path)
    with progress_on_stderr(flags):
        ran = runner.run_one("report", recipe, build)
    folder = BuildFolder(build, recipe.name).stage("report")
    results = require_stage(folder, "report").results
    page, card = (folder / results[name] for name in ("page", "card"))
    value = {**results, "ran": ran, "page": str(page), "card": str(card)}
    print_result(value, report_lines(folder, results), as_json=as_json)
    if not opened:
        return
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        terminal.write_note("no browser could be started; open the file above")


@click.command("verify")
@click.argument("what", metavar="FILE_OR_MODEL")
@host_option
@recipe_option
@json_option
@click.pass_context
def verify_command(
    context: click.Context, what: str, host: str | None, recipe_path: Path, build: Path, *, as_json: bool
) -> None:
    """Recompute the recorded origin of a GGUF or an Ollama model.

    One row each for the file's own sha256, its tensors compared with the weights that it was made of, the hashes of
    rows, recipe, adapter, merged weights and base, and the software. ok: equal. wrong: not equal. other: software
    versions differ (allowed). unknown: cannot be recomputed here; the reason follows. Exit 5 when a row is wrong; 8
    when neither the sha256 nor the tensors of a file could be compared, so that nothing shows its origin.
    """
    from tutor.serving import verify

    recipe = load_recipe(recipe_path)
    if verify.is_file(what):
        rows = verify.verify_file(Path(what), recipe, build)
    else:
        rows = verify.verify_model(what, host, recipe, build)
    print_result(verify.rows_as_json(rows), verify.row_lines(rows), as_json=as_json)
    if bad := verify.wrong_rows(rows):
        message = f"{what} was not made from this recipe and build: {', '.join(row.what for row in bad)}"
        # The rows are the result and already on stdout: with --json they stay the only document there.
        hint = "give the --recipe and --build that it was made with"
        context.exit(print_error(message, ArtifactError.code, hint, as_json=False))
    if not verify.is_shown(rows):
        message = f"nothing shows that {what} was made from this recipe and build: its bytes were compared with nothing"
        hint = "give the --build that it was made in, with its gguf/ or merged/"
        context.exit(print_error(message, GateError.code, hint, as_json=False))
