"""The commands about rows: data check, lint, stats; `data import` is in data_import.py.

In: files of rows, or the recipe that names them. Out: counts and findings on stdout. The checks themselves are in
tutor/stages/data; `data split` runs a stage and is in run.py.
"""

import contextlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tutor.cli.commands.data_import import import_command
from tutor.cli.commands.run import data_split
from tutor.cli.exit import print_error
from tutor.cli.options import indented, json_option, load_recipe, print_result, recipe_option
from tutor.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tutor.formats.rows.examples import Example
    from tutor.recipe.settings import Recipe
    from tutor.stages.data.base_tokens import BaseTokens
    from tutor.stages.data.lint.linter import LintReport

files_argument = click.argument("files", nargs=-1, type=click.Path(path_type=Path))


@click.command("check")
@files_argument
@click.option(
    "--strict",
    is_flag=True,
    help="Treat unknown keys, questions shared with the prompts, and answers that would be cut as errors.",
)
@click.option(
    "--code/--no-code",
    default=None,
    help="Compile every fenced block; no block is run. Default: compile where the compiler is installed.",
)
@recipe_option
@json_option
def check_command(
    files: tuple[Path, ...], recipe_path: Path, build: Path, *, strict: bool, code: bool | None, as_json: bool
) -> None:
    """Check every row of FILES (or the recipe's), and its code.

    Every fault is printed with its file and line. Once the base stage has run, control tokens of the base in a text
    are faults, and an answer that generate.max_new_tokens would cut is named.
    """
    from tutor.graders.typescript.install import INSTALL, is_installed
    from tutor.stages.data.code_check import check_code

    recipe = load_recipe(recipe_path) if not files or recipe_path.exists() else None
    check_tokens = _token_check(recipe, build, strict=strict) if recipe else None
    compiled = is_installed() if code is None else code
    checked = []
    for path, rows, notes in (
        _read_recipe_files(recipe, strict=strict) if recipe and not files else _read_files(files, strict=strict)
    ):
        found = [*notes, *check_tokens(path, rows)] if check_tokens else notes
        item: dict[str, Any] = {"file": str(path), "rows": len(rows), "notes": found}
        checked.append({**item, "code": check_code(path, rows)} if compiled else item)
    if code is None and not compiled:
        checked[-1]["notes"] = [*checked[-1]["notes"], f"code was not compiled: no compiler; {INSTALL}"]
    lines = [f"{item['file']}: {item['rows']} rows ok{_code_line(item.get('code'))}" for item in checked]
    lines += [f"  note: {note}" for item in checked for note in item["notes"]]
    print_result(checked, lines, as_json=as_json)


def _read_files(files: tuple[Path, ...], *, strict: bool) -> list[tuple[Path, Any, list[str]]]:
    from tutor.stages.data import reading

    found = []
    for path in files:
        examples, notes = reading.read_examples(path, strict=strict)
        found.append((path, examples, notes.warnings()))
    return found


def _read_recipe_files(recipe: "Recipe", *, strict: bool) -> list[tuple[Path, Any, list[str]]]:
    from tutor.formats.rows.recipe_files import data_files
    from tutor.stages.data import reading, splitting

    inputs = data_files(recipe)
    limits = reading.row_limits(recipe)
    examples, notes = reading.read_examples(inputs["train"], strict=strict, limits=limits)
    noted = [*notes.warnings(), *_language_notes(recipe, examples)]
    if "eval" not in inputs:
        return [(inputs["train"], examples, noted)]
    prompts, prompt_notes = reading.read_prompts(inputs["eval"], strict=strict, limits=limits)
    _, leaks = splitting.without_leaks(examples, prompts)
    if leaks and strict:
        raise DataError(f"{inputs['train']}: {len(leaks)} rows repeat a question of {inputs['eval']}")
    shared = [f"{len(leaks)} rows are also prompts, and are left out of training"] if leaks else []
    return [
        (inputs["train"], examples, [*noted, *shared]),
        (inputs["eval"], prompts, prompt_notes.warnings()),
    ]


def _language_notes(recipe: "Recipe", examples: "Sequence[Example]") -> list[str]:
    """Return a note where the questions are not in the language of the recipe, which is then not demanded."""
    from tutor.graders.verdict import are_in_language
    from tutor.recipe.values import ANY_LANGUAGE, LANGUAGES

    language = recipe.data.language
    if language == ANY_LANGUAGE or are_in_language([{"instruction": each.instruction} for each in examples], language):
        return []
    return [f"the questions are not {LANGUAGES[language]}, the language of data.language = {language!r}: correct one"]


def _code_line(code: dict[str, Any] | None) -> str:
    if code is None:
        return ""
    counts = f"{code['compiled']} blocks compile, {code['failed_as_stated']} fail as stated"
    return f"; {counts} ({code['seconds']} s)"


@click.command("lint")
@files_argument
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="File of held-out prompts that FILES must not repeat. Default without FILES: the recipe's.",
)
@click.option("--strict", is_flag=True, help="Exit 3 when there is a finding.")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the findings as an HTML page.")
@recipe_option
@json_option
@click.pass_context
def lint_command(  # noqa: PLR0913 - a command's options
    context: click.Context,
    files: tuple[Path, ...],
    against: Path | None,
    html: Path | None,
    recipe_path: Path,
    build: Path,
    *,
    strict: bool,
    as_json: bool,
) -> None:
    """Report doubtful rows of FILES (or the recipe's).

    Duplicates and near-duplicates, contradictions, leaks into the prompts, balance, language, length, special tokens,
    unclosed fences, placeholders; every finding with its line. Lengths are in tokens of the base once the base stage
    has run. No code is compiled.
    """
    from tutor.cli.output_file import check_output, write_output
    from tutor.formats.rows.recipe_files import data_files, named_files
    from tutor.recipe.settings import DataSettings, TrainSettings
    from tutor.stages.data.lint.linter import lint
    from tutor.stages.data.lint.page import lint_page
    from tutor.stages.data.reading import row_limits

    recipe = load_recipe(recipe_path) if not files or recipe_path.exists() else None
    inputs = data_files(recipe) if recipe and not files else {}
    base = _base_tokens(recipe, build) if recipe else None
    if html:
        read = [*files, *([against] if against else []), *([base.file] if base else []), recipe_path]
        check_output(html, [*read, *(named_files(recipe) if recipe else [])])
    report = lint(
        files or (inputs["train"],),
        against or inputs.get("eval"),
        max_length=(recipe.train if recipe else TrainSettings()).max_length,
        language=(recipe.data if recipe else DataSettings()).language,
        base=base,
        limits=row_limits(recipe) if recipe else None,
    )
    if html:
        write_output(html, lint_page(report))
    print_result(report.as_dict(), _lint_lines(report), as_json=as_json)
    if strict and (total := sum(report.counts.values())):
        # The report is the result and already on stdout: with --json it stays the only document there.
        context.exit(print_error(f"{total} findings", DataError.code, "they are listed on stdout", as_json=False))


def _base_tokens(recipe: "Recipe", build: Path) -> "BaseTokens | None":
    """Return the base's tokenizer.json, or None before the base stage or without the package that reads it."""
    from tutor.artifacts.layout import BuildFolder
    from tutor.formats.models.model_folder import read_facts
    from tutor.formats.models.prompt_format import read_format
    from tutor.stages.data.base_tokens import BaseTokens

    if importlib.util.find_spec("tokenizers"):
        with contextlib.suppress(ArtifactError):
            base = BuildFolder(build, recipe.name).stage("base")
            path = read_facts(base)[1] / "tokenizer.json"
            return BaseTokens(path, read_format(recipe, base), recipe.system) if path.is_file() else None
    return None


def _token_check(recipe: "Recipe", build: Path, *, strict: bool) -> "Callable[[Path, list[Any]], list[str]] | None":
    """Return a check of rows in tokens of the base that returns notes, or None before the base stage."""
    from tutor.engines.answer_limit import check_answers
    from tutor.stages.data import base_tokens

    base = _base_tokens(recipe, build)
    if base is None:
        return None
    tokenizer = base_tokens.read_tokenizer(base.file)
    find = base_tokens.control_token_finder(tokenizer)

    def check(path: Path, rows: list[Any]) -> list[str]:
        base_tokens.refuse_control_tokens(path, rows, find)
        longest = base_tokens.longest_answer(tokenizer, base, rows, recipe.data.loss)
        cut = check_answers(recipe, longest, path) if longest else None
        if cut and strict:
            raise DataError(cut)
        return [cut] if cut else []

    return check


def _lint_lines(report: "LintReport") -> list[str]:
    from tutor.recipe.values import LANGUAGES

    lines = [
        f"{each.file}{f':{each.line}' if each.line else ''}: {each.kind}: {each.message}" for each in report.findings
    ]
    lengths, language, nearest = (report.figures[name] for name in ("lengths", "language", "nearest"))
    rows = ", ".join(f"{name}: {size['rows']} rows" for name, size in report.files.items())
    limit = "" if lengths["limit"] is None else f" of {lengths['limit']}"
    middle = f"median {lengths['median']}, p95 {lengths['p95']}, longest {lengths['max']}"
    lines += [
        rows,
        f"  length in {lengths['unit']}: {middle}{limit}",
    ]
    if language:
        named = LANGUAGES[language["language"]]
        lines.append(f"  in {named}: {language['in_language']} of {language['judged']} with prose")
    if nearest:
        highest = nearest["highest"] if nearest["highest"] is not None else f"below {nearest['looked_for_from']}"
        lines.append(f"  highest similarity to one of {nearest['prompts']} prompts: {highest}")
    counts = ", ".join(f"{count} {kind}" for kind, count in report.counts.items())
    return [*lines, f"  findings: {counts or 'none'}"]


@click.command("stats")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@recipe_option
@json_option
def stats_command(file: Path | None, recipe_path: Path, build: Path, *, as_json: bool) -> None:
    """Count FILE (or the recipe's training rows) by category and topic, with lengths."""
    del build
    from tutor.formats.rows.recipe_files import data_files
    from tutor.stages.data import reading, stage

    path = file or data_files(load_recipe(recipe_path))["train"]
    counts = stage.row_statistics(reading.read_examples(path)[0])
    print_result(counts, indented(counts), as_json=as_json)


@click.group("data")
def data_group() -> None:
    """Import, check, lint, count and split the rows."""


for command in (import_command, check_command, lint_command, stats_command, data_split):
    data_group.add_command(command)
