"""The `tutor` command: the top-level group with its options, and its commands in pipeline order.

In: sys.argv and the environment. Out: the exit code of the command. Holds no command itself (tutor/cli/commands), and
imports no package that is slow to import: `tutor --help` must not wait for torch.
"""

from typing import NoReturn

import click

from tutor.cli.commands import data, doctor, evaluate, inspect, matrix, run, serving, stack
from tutor.cli.exit import run_and_exit
from tutor.errors import RecipeError
from tutor.machine import distributed

EXIT_CODES = """\b
Exit codes: 0 ok · 1 a bug · 2 usage or recipe · 3 bad data · 4 this machine
(GPU, memory, disk, programs) · 5 an artifact is damaged or does not match ·
6 a service · 7 another run holds the lock · 8 a gate refused · 129 closed
terminal · 130 Ctrl-C · 131 Ctrl-\\ · 143 SIGTERM."""

COMMANDS = (
    doctor.doctor_command,
    data.data_group,
    *run.STAGE_COMMANDS,
    run.run_command,
    inspect.summary_command,
    inspect.status_command,
    inspect.why_command,
    run.clean_command,
    *evaluate.COMMANDS,
    inspect.report_command,
    *serving.COMMANDS,
    inspect.verify_command,
    matrix.matrix_command,
    stack.stack_group,
)


class OrderedGroup(click.Group):
    """A group that lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        del ctx
        return list(self.commands)


@click.group(
    cls=OrderedGroup,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="tutor")
@click.option("--debug", is_flag=True, envvar="TUTOR_DEBUG", help="Show the traceback of an error.")
@click.option("-q", "--quiet", is_flag=True, help="Print only warnings on stderr.")
@click.pass_context
def cli(context: click.Context, *, debug: bool, quiet: bool) -> None:
    """From a JSONL file of questions and answers to `ollama run tutor`, stage by stage.

    `tutor run` runs every stage that is not up to date, in order. A flag overrides its environment
    variable, which overrides the default. The settings of the model are only in the recipe.
    """
    context.obj = {"debug": debug, "quiet": quiet}
    if distributed.world_size() > 1 and context.invoked_subcommand != "train":
        raise RecipeError(
            f"only tutor train runs in several processes, and this is tutor {context.invoked_subcommand}",
            "start it without a launcher; tutor train goes between tutor run --until base and tutor run",
        )


for command in COMMANDS:
    cli.add_command(command)


def main() -> NoReturn:
    """Run the console script `tutor`."""
    run_and_exit(cli, "tutor")
