"""The matrix command: whether every family with every kind of prompt comes through the whole chain unchanged.

In: families, prompts, an Ollama server. Out: a table on stdout; exit 8 where a cell diverges. The work is done in
tutor/serving/matrix.py.
"""

from pathlib import Path

import click

from tutor.cli.exit import print_error
from tutor.cli.options import build_option, host_option, json_option, print_result, progress_on_stderr
from tutor.errors import GateError

FOLDER = "matrix"
"""Folder of the matrix below the build folder."""


@click.command("matrix")
@click.argument("families", nargs=-1, metavar="[FAMILY]...")
@click.option("--prompt", "prompts", multiple=True, type=click.Choice(("tutor", "base")), help="Only this prompt.")
@host_option
@build_option
@json_option
@click.pass_context
def matrix_command(
    context: click.Context,
    families: tuple[str, ...],
    prompts: tuple[str, ...],
    host: str | None,
    build: Path,
    *,
    as_json: bool,
) -> None:
    """Run the whole chain on a tiny model of every FAMILY with every prompt.

    A row a cell: the KL divergence of each hand-off in nats a token, seconds of all stages. Where an Ollama server
    answers, each model is published there, compared, and deleted again. Exit 8 where a cell diverges.
    """
    from tutor.artifacts.disk import write_json
    from tutor.engines.ollama.health import absence
    from tutor.serving import matrix
    from tutor.stages.base.tiny_families import FAMILIES

    if unknown := [name for name in families if name not in FAMILIES]:
        raise click.BadParameter(f"{unknown[0]!r}; known: {', '.join(FAMILIES)}", param_hint="FAMILY")
    chosen, folder = families or tuple(FAMILIES), build / FOLDER
    wanted = matrix.cells(chosen, prompts or matrix.PROMPTS)
    with progress_on_stderr(context.obj):
        absent = absence(host, 0)
        matrix.write_rows(folder)
        matrix.make_models(folder, chosen)
        outcomes = [matrix.run_cell(cell, folder, host, served=absent is None) for cell in wanted]
    value = {"versions": matrix.versions(outcomes, absent), "cells": [each.record() for each in outcomes]}
    lines = matrix.table(value)
    write_json(folder / "matrix.json", value)
    (folder / "matrix.txt").write_text("\n".join(lines) + "\n", "utf-8")
    print_result(value, lines, as_json=as_json)
    if problems := [each for each in outcomes if each.problem]:
        message = f"{len(problems)} of {len(outcomes)} cells failed, the first: {problems[0].problem}"
        hint = f"its recipe: {folder / problems[0].cell.name}.toml"
        context.exit(print_error(message, GateError.code, hint, as_json=False))
