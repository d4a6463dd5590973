"""The command `data import`: files of other formats as one file of tutor's own rows.

In: files, and the name of the file to write. Out: the file, counts, and each row that was left out. Formats are read
in tutor/formats/importing.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from tutor.cli.options import json_option, print_result, progress_on_stderr

if TYPE_CHECKING:
    from tutor.formats.importing.importer import FileResult, Import

LISTED = 20
"""Maximum number of left-out rows that are printed; the file beside the output has all."""
FORMATS = ("tutor", "alpaca", "sharegpt", "openai", "prompt-completion", "question-answer")
"""Values of --format."""


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="File to write.")
@click.option("--force", is_flag=True, help="Overwrite the output and its list of left-out rows.")
@click.option(
    "--map",
    "columns",
    multiple=True,
    metavar="PART=COLUMN,...",
    help="Keys or columns of the parts of a row, in place of recognition: question=Pregunta,answer=Respuesta. Parts: "
    "question, input, answer, system, reasoning, history, messages, category, topic, id.",
)
@click.option("--format", "format_name", type=click.Choice(FORMATS), help="Read every row as this format.")
@click.option("--sheet", default="", help="Sheet of an Excel file; by default the only one with rows.")
@click.option(
    "--loss",
    type=click.Choice(("all", "last")),
    default="all",
    show_default=True,
    help="The recipe's data.loss, with which marks of trained messages are compared.",
)
@click.option("--strict", is_flag=True, help="Fail where a row is left out; nothing is written then.")
@json_option
def import_command(  # noqa: PLR0913 - a command's options
    files: tuple[Path, ...],
    output: Path,
    columns: tuple[str, ...],
    format_name: str | None,
    sheet: str,
    loss: str,
    *,
    force: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Write the rows of FILES in tutor's own format.

    FILES: JSON Lines, JSON, CSV, TSV (also .gz), Parquet, Excel (.xlsx), or a folder of datasets' save_to_disk; rows as
    Alpaca, ShareGPT, OpenAI messages, prompt and completion, question and answer, or tutor's own. The format of each
    row is recognised. Rows that are not taken are listed with their line and the reason, and saved with both in
    OUTPUT.left-out.jsonl. Exit code 3 when no row can be taken.
    """
    from tutor.cli.output_file import check_rows_output
    from tutor.errors import DataError
    from tutor.formats.importing.importer import import_files, left_out_path
    from tutor.formats.importing.names import Options, read_map

    options = Options(read_map(columns), format_name or "", sheet, loss=loss)
    for path in (output, left_out_path(output)):
        check_rows_output(path, files, force=force)
    with progress_on_stderr({"quiet": False}):
        try:
            result = import_files(files, output, options, strict=strict)
        except DataError as error:
            if as_json:
                raise
            problems = error.problems[:LISTED]
            more = len(error.problems) - len(problems)
            hint = f"{more} more rows are not listed: see --json" if more and not error.hint else error.hint
            raise DataError(error.message, hint, problems) from None
    print_result(result.as_dict(), _lines(result, output, left_out_path(output)), as_json=as_json)


def _lines(result: "Import", output: Path, beside: Path) -> list[str]:
    lines = [line for each in result.files for line in _file_lines(each)]
    lines += [f"  {each.file}:{each.line}: {each.why}" for each in result.left_out[:LISTED]]
    if len(result.left_out) > LISTED:
        lines.append(f"  ... and {len(result.left_out) - LISTED} more")
    lines.append(f"{output}: {result.taken} rows")
    if result.left_out:
        lines.append(f"{beside}: the rows that were left out, with the reasons")
    if result.system:
        import json

        text = json.dumps(result.system, ensure_ascii=False)
        lines.append("all rows have one system text, which is left out of them; put it into the recipe:")
        lines.append(f"system = {text}")
    return lines


def _file_lines(result: "FileResult") -> list[str]:
    left_out = f", {result.left_out} left out" if result.left_out else ""
    lines = [f"{result.file}: {result.recognised.describe()}: {result.taken} taken{left_out}"]
    dropped = result.recognised.dropped
    if dropped:
        shown = ", ".join(f"{key} ({count} rows)" for key, count in dropped.most_common(10))
        lines.append(f"  note: keys that are not trained: {shown}" + (", ..." if len(dropped) > 10 else ""))
    if blank := result.tolerated["blank"]:
        lines.append(f"  note: {blank} blank {result.recognised.numbered} skipped")
    return lines
