"""The command `report`."""

import webbrowser
from pathlib import Path

import click

from tutor.cli.options import emit, json_option, read, recipe_option, shown_on_stderr


@click.command("report")
@click.option("--open", "opened", is_flag=True, help="Show the page in the browser.")
@recipe_option
@json_option
@click.pass_obj
def report_command(flags: dict[str, bool], recipe_path: Path, build: Path, *, opened: bool, as_json: bool) -> None:
    """Write one page of all that was found out, and a model card; what has not run is said in it."""
    from tutor.artifacts.manifest import require_stage
    from tutor.pipeline import registry as chain
    from tutor.pipeline import runner as pipeline

    recipe = read(recipe_path)
    with shown_on_stderr(flags):
        ran = pipeline.run_one("report", recipe, build)
    folder = build / recipe.name / chain.BY_NAME["report"].folder
    results = require_stage(folder, "report").results
    page, card = (folder / results[name] for name in ("page", "card"))
    lacks = [f"  not in it, for it has not run: {', '.join(results['missing'])}"] if results["missing"] else []
    lines = [str(page), f"  {results['bytes'] / 1e3:.0f} kB, {results['prompts']} prompts; model card: {card}", *lacks]
    emit({**results, "ran": ran, "page": str(page), "card": str(card)}, lines, as_json=as_json)
    if opened and not webbrowser.open(page.resolve().as_uri()):
        click.echo("no browser could be started; open the file above", err=True)
