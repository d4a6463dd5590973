"""The command that asks a GGUF, or what Ollama serves, where it comes from: verify."""

from pathlib import Path

import click

from tutor.cli import exit as boundary
from tutor.cli.options import emit, host_option, json_option, read, recipe_option
from tutor.errors import ArtifactError


@click.command("verify")
@click.argument("what", metavar="FILE_OR_MODEL")
@host_option
@recipe_option
@json_option
@click.pass_context
def verify_command(
    context: click.Context, what: str, host: str | None, recipe_path: Path, build: Path, *, as_json: bool
) -> None:
    """Compute again what a GGUF file, or a model in Ollama, says of its origin.

    A row each for the file's own sha256, its tensors against the weights that it was made of, the hashes of rows,
    recipe, adapter, merged weights and base, and the software. ok: the same. wrong: not the same. other: other
    software here than there, which may well be. unknown: not to be reached from here, and why. Exit 5 when a row is
    wrong.
    """
    from tutor.serving import verify

    recipe = read(recipe_path)
    if verify.is_file(what):
        rows = verify.verify_file(Path(what), recipe, build)
    else:
        rows = verify.verify_model(what, host, recipe, build)
    emit(verify.as_json(rows), verify.lines(rows), as_json=as_json)
    if bad := verify.wrong(rows):
        message = f"{what} is not of this recipe and build: {', '.join(row.what for row in bad)}"
        # The rows are the result and already on stdout: with --json they stay the only document there.
        context.exit(boundary.fail(message, ArtifactError.code, "give its own --recipe and --build", as_json=False))


COMMANDS = (verify_command,)
