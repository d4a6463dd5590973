"""The command doctor: checks of this machine and the estimate of a recipe, as a table, lines or JSON.

In: the report of tutor/machine/doctor.py. Out: a coloured table at a terminal, plain lines elsewhere. Checks nothing
itself.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tutor.cli.exit import print_error
from tutor.cli.options import build_option, json_option, load_recipe, print_result, progress_on_stderr
from tutor.formats import terminal
from tutor.formats.visible import clean

if TYPE_CHECKING:
    from tutor.machine.doctor import HostReport

COLOURS = {"ok": "green", "warning": "yellow", "missing": "red"}
"""Terminal colour of each state of a check."""


@click.command("doctor")
@click.option(
    "-r",
    "--recipe",
    "recipe_path",
    type=click.Path(path_type=Path),
    envvar="TUTOR_RECIPE",
    show_envvar=True,
    help="Also estimate this recipe: memory by part, disk and time by stage.",
)
@build_option
@json_option
@click.pass_context
def doctor_command(context: click.Context, recipe_path: Path | None, build: Path, *, as_json: bool) -> None:
    """Check this machine, and whether a recipe fits it.

    A missing program stops only the commands that need it. Library versions with known faults are checked too. Exit 4
    when the recipe cannot run here.
    """
    from tutor.machine import doctor

    with progress_on_stderr(context.obj):
        report = doctor.examine(load_recipe(recipe_path) if recipe_path else None, build)
    if not as_json and terminal.is_terminal("stdout"):
        print_tables(report)
    else:
        print_result(report.as_dict(), list(report_lines(report)), as_json=as_json)
    if fault := report.fault:
        # The report is the result and already on stdout: with --json it stays the only document there.
        context.exit(print_error(fault.message, fault.code, fault.hint, as_json=False))


def report_lines(report: "HostReport") -> Iterator[str]:
    """Yield the report as plain text: one line a check, with the next step below it."""
    for check in report.checks:
        yield f"{check.state:<8} {check.what:<25} {check.found}"
        if check.hint:
            yield f"{'':<34} {check.hint}{_needed(check.state, check.needed_by)}"
    for title, rows in estimate_tables(report.recipe) if report.recipe else ():
        yield ""
        yield title
        yield from (f"  {name:<14} {value:>12}  {remark}".rstrip() for name, value, remark in rows)
    yield from [""] if report.conclusions else []
    yield from (f"{command:<10} {conclusion}" for command, conclusion in report.conclusions.items())


def print_tables(report: "HostReport") -> None:
    """Print the report as tables on the terminal."""
    from rich.markup import escape
    from rich.table import Table

    console = terminal.console("stdout")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in report.checks:
        hint = f"\n[dim]{escape(clean(check.hint + _needed(check.state, check.needed_by)))}[/]" if check.hint else ""
        colour = COLOURS[check.state]
        table.add_row(f"[{colour}]{check.state}[/]", check.what, escape(clean(check.found)) + hint)
    console.print(table)
    for title, rows in estimate_tables(report.recipe) if report.recipe else ():
        table = Table(box=None, show_header=False)
        table.add_column(min_width=14)
        table.add_column(justify="right")
        for name, value, remark in rows:
            table.add_row(name, value, f"[dim]{escape(clean(remark))}[/]")
        console.print(f"\n[bold]{escape(clean(title))}[/]", table if rows else "")
    if report.conclusions:
        console.print()
    for command, conclusion in report.conclusions.items():
        console.print(f"[bold]{command:<10}[/] {conclusion}")


def estimate_tables(recipe: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield the tables of a recipe's estimate: a title, and name, value and remark of each row."""
    if recipe["memory"] is None:
        yield f"{recipe['base']}: unknown before it is fetched, so its memory cannot be estimated", []
        return
    memory = recipe["memory"]
    rows = [(name, _gb(size), "") for name, size in memory["parts"].items()]
    verdict = "may not fit" if memory["tight"] else "" if memory["fits"] else "does not fit"
    have = [("total", _gb(memory["need"]), verdict), (memory["device"], _gb(memory["total"]), "")]
    kind = "GPU memory" if memory["gpu"] else "Memory"
    size = f"{recipe['parameters'] / 1e6:,.0f} million parameters, {memory['pass_tokens']} tokens a micro-batch"
    yield f"{kind} of training: {size}", [*rows, *have]
    total = sum(recipe["disk"].values())
    yield "Disk", [*((name, _gb(size), "") for name, size in recipe["disk"].items()), ("total", _gb(total), "")]
    yield (
        "Time, approximate",
        [(name, _time(value), _remark(name, recipe)) for name, value in recipe["seconds"].items()],
    )


def _remark(stage: str, recipe: Mapping[str, Any]) -> str:
    """The source of a stage's time."""
    if stage in recipe["measured"]:
        return "as measured in the last run"
    found = recipe["precision"]
    if stage != "train" or not found["matmul_gflops"]:
        return ""
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in found["matmul_gflops"].items())
    source = "measured now" if found["measured"] else "a guess: without PyTorch nothing is measured"
    return f"computing in {found['precision']}; matrix products: {rates} ({source})"


def _needed(state: str, needed_by: str) -> str:
    return f" (needed by {needed_by})" if state == "missing" else ""


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
