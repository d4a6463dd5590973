"""cli/main.py: help and its imports, the order of the commands, the version."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support.processes.command import environment

from tutor import errors
from tutor.cli.main import cli


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


HELP = """
import sys
before = set(sys.modules)
from tutor.cli.main import main
sys.argv = ["tutor", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
print(*sorted(set(sys.modules) - before), file=sys.stderr)
"""
"""Program that runs `tutor --help` and prints the names of the imported modules on stderr."""


TUTOR_MODULES = frozenset(
    (
        "tutor", "tutor.cli", "tutor.cli.commands", "tutor.cli.commands.data", "tutor.cli.commands.data_import",
        "tutor.cli.commands.doctor", "tutor.cli.commands.evaluate", "tutor.cli.commands.inspect",
        "tutor.cli.commands.matrix", "tutor.cli.commands.run", "tutor.cli.commands.serving",
        "tutor.cli.commands.stack", "tutor.cli.exit", "tutor.cli.main", "tutor.cli.options", "tutor.errors",
        "tutor.formats", "tutor.formats.terminal", "tutor.formats.visible", "tutor.machine",
        "tutor.machine.distributed", "tutor.serving", "tutor.serving.model_names",
    )
)  # fmt: skip
"""Modules of tutor that the help imports; each imports only the standard library, click and modules of this list."""


HEAVY = (
    "asyncio",
    "http",
    "importlib.metadata",
    "multiprocessing",
    "sqlite3",
    "ssl",
    "unittest",
    "urllib.request",
)
"""Modules of the standard library that take longer to import than the help takes to print."""


def test_help_imports_only_the_command_line_and_click():
    """scripts/bench_help.py measures the time."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True, env=environment())
    assert "Exit codes" in done.stdout
    imported = done.stderr.split()
    assert {name for name in imported if name.partition(".")[0] == "tutor"} == TUTOR_MODULES
    assert {name.partition(".")[0] for name in imported} - sys.stdlib_module_names == {"click", "tutor"}
    assert [name for name in imported if name in HEAVY] == []


BASE_INSTALL = """
import sys
for name in ("torch", "transformers", "tokenizers", "safetensors", "peft", "trl", "datasets", "numpy", "gguf"):
    sys.modules[name] = None  # importing it fails, as in an environment without the extra "train"
from tutor.cli.main import main
main()
"""


@pytest.mark.slow
def test_commands_without_a_model_run_without_torch(recipe_file, tmp_path):
    where = ("-r", recipe_file, "-b", tmp_path / "build")

    def base_install(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = (sys.executable, "-c", BASE_INSTALL, *arguments, *where)
        return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)

    for arguments in (
        ("data", "check"),
        ("data", "stats"),
        ("data", "split"),
        ("run", "--until", "data"),
        ("status",),
        ("why", "train"),
        ("summary",),
        ("clean",),
    ):
        done = base_install(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        assert done.stdout.strip()
    done = base_install("base")
    assert done.returncode == errors.HostError.code
    assert re.fullmatch(r"(?s).*Error: the package \w+ is not installed; make install\n", done.stderr)
    assert not (tmp_path / "build" / "small" / "base").exists()


@pytest.mark.parametrize(("path", "command"), [pytest.param(*item, id=" ".join(item[0])) for item in commands()])
def test_every_command_and_option_has_help(path, command):
    assert command.help
    assert not [option.name for option in command.params if isinstance(option, click.Option) and not option.help]


def test_commands_are_listed_in_pipeline_order():
    names = cli.list_commands(click.Context(cli))
    stages = [
        "data",
        "base",
        "train",
        "merge",
        "convert",
        "ladder",
        "parity",
        "modelfile",
        "forgetting",
        "eval",
        "report",
    ]
    assert [name for name in names if name in stages] == stages


def test_help_lists_the_exit_codes_of_the_errors(tutor):
    text = " ".join(tutor("--help").stdout.split())
    for kind, word in (
        (errors.RecipeError, "usage or recipe"),
        (errors.DataError, "bad data"),
        (errors.HostError, "this machine"),
        (errors.ArtifactError, "an artifact"),
        (errors.ServiceError, "a service"),
        (errors.LockError, "another run holds the lock"),
        (errors.GateError, "a gate refused"),
    ):
        assert f"{kind.code} {word}" in text


def test_version_is_that_of_the_package(tutor):
    assert tutor("--version").stdout == "tutor, version 0.1.0\n"
