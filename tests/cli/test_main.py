"""The command line: help, exit codes, one line an error, JSON, signals, pipes."""

import fcntl
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from support.command import ROOT, TINY, TUTOR, environment
from support.files import write_rows

from tutor import errors
from tutor.cli.main import cli, main


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


# Starting


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
"""`tutor --help`, and then the names of the modules that it imported."""

OURS = frozenset(
    (
        "tutor", "tutor.cli", "tutor.cli.commands", "tutor.cli.commands.data", "tutor.cli.commands.doctor",
        "tutor.cli.commands.evaluate", "tutor.cli.commands.inspect", "tutor.cli.commands.run",
        "tutor.cli.commands.serving", "tutor.cli.commands.stack", "tutor.cli.exit", "tutor.cli.main",
        "tutor.cli.options", "tutor.errors", "tutor.machine", "tutor.machine.distributed",
    )
)  # fmt: skip
"""What the command line is made of: each of them imports the standard library, click and the others here alone."""

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


def test_help_imports_the_command_line_and_click_alone():
    """The time that it takes is measured by scripts/bench_help.py."""
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True, env=environment())
    assert "Exit codes" in done.stdout
    imported = done.stderr.split()
    assert {name for name in imported if name.partition(".")[0] == "tutor"} == OURS
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
def test_what_needs_no_model_runs_without_torch(recipe_file, tmp_path):
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


def test_commands_stand_in_pipeline_order():
    names = cli.list_commands(click.Context(cli))
    stages = ["data", "base", "train", "merge", "convert", "ladder", "parity", "modelfile", "eval", "report"]
    assert [name for name in names if name in stages] == stages


def test_the_exit_codes_in_help_are_those_of_the_errors(tutor):
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


def test_the_version_is_the_packages(tutor):
    assert tutor("--version").stdout == "tutor, version 0.1.0\n"


# Errors


@pytest.mark.parametrize("arguments", [(), ("data",)])
def test_without_a_command_help_is_shown_and_it_is_no_success(tutor, arguments):
    done = tutor(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: tutor ")
    assert "Error" not in done.stderr


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Run `tutor` in this process, for tables of many cases: exit code, stdout, stderr."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.chdir(ROOT)
    for name in ("TUTOR_RECIPE", "TUTOR_BUILD", "TUTOR_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str | Path) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["tutor", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, handler)


def plain(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("nonsense",), 2, "No such command 'nonsense'"),
        (("status", "--nonsense"), 2, "No such option"),
        (("status", "extra"), 2, "unexpected extra argument"),
        (("run", "--until", "dta"), 2, "'dta'; known: data, base, train"),
        (("why", "dta"), 2, "'dta'; known: data, base, train"),
        (("clean", "dta"), 2, "no stage 'dta'; known: data, base, train"),
        (("ask", "-m", "gpt", "¿?"), 2, "'gpt' is not one of 'tutor', 'base', 'adapter'"),
        (
            ("status", "-r", "MISSING.toml"),
            2,
            "cannot read recipe MISSING.toml: No such file or directory; give --recipe",
        ),
        (("status", "-r", "data"), 2, "data is a folder, not a recipe"),
        (("status", "-r", "/dev/zero"), 2, "/dev/zero is a pipe or a device, not a recipe"),
        (("status", "-r", "a" * 300), 2, "File name too long"),
        (("status", "-b", "/"), 2, "/ is the root of the file system"),
        (("status", "-b", "a" * 300), 2, "File name too long"),
        (("status", "-b", "README.md/build"), 2, "Not a directory"),
        (("data", "check", "none.jsonl"), 2, "none.jsonl"),
        (("ask", "¿Qué es any?"), 5, "gguf is not there; run: tutor run --until convert"),
        (("train",), 5, "data is not there; run: tutor run --until data"),
    ],
)
def test_a_fault_of_the_user_is_one_line_and_the_code_of_its_kind(in_process, tmp_path, arguments, code, expected):
    where = () if {"-b", "check", "nonsense"} & {*arguments} else ("-b", tmp_path / "build")
    status, out, err = in_process(*arguments, *where)
    assert status == code
    assert out == ""
    assert expected in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


def test_a_wrong_recipe_is_named_with_key_and_neighbours(tutor, tmp_path):
    done = tutor("run", "-r", plain(tmp_path / "r.toml", "[train]\nrnak = 4\n"), "-b", tmp_path / "build")
    assert done.returncode == 2
    assert "unknown setting train.rnak; did you mean rank? known: accumulation" in done.stderr
    assert not (tmp_path / "build").exists()


def test_wrong_rows_are_listed_with_file_and_line(tutor, tmp_path):
    write_rows(
        tmp_path / "rows.jsonl", [{"instruction": "a", "response": "b"}, {"instruction": "c"}, {"response": "d"}]
    )
    done = tutor("data", "check", tmp_path / "rows.jsonl")
    assert done.returncode == 3
    assert [line.split(" ")[2] for line in done.stderr.splitlines()[1:]] == [
        f"{tmp_path}/rows.jsonl:2:",
        f"{tmp_path}/rows.jsonl:3:",
    ]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("status", "-r", "none.toml"), 2),
        (("why", "dta"), 2),
        (("data", "stats", "none.jsonl"), 2),
        (("data", "check", "README.md"), 3),
        (("train",), 5),
    ],
)
def test_with_json_an_error_is_an_object_on_stdout_too(in_process, tmp_path, arguments, code):
    where = () if arguments[0] == "data" else ("-b", tmp_path / "build")
    status, out, err = in_process(*arguments, "--json", *where)
    value = json.loads(out)
    assert sorted(value) == ["code", "error", "hint", "ok", "problems"]
    assert value["ok"] is False
    assert value["code"] == status == code
    assert value["error"] in err
    assert value["hint"] is None or value["hint"] in err


def test_a_name_that_is_not_utf8_or_holds_control_characters_cannot_reach_the_terminal(tutor, tmp_path):
    name = os.fsdecode(b"mal\xf1a\x1b[31m\nError: forged.toml")
    done = tutor("status", "--json", "-r", tmp_path / name)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr
    assert name in json.loads(done.stdout)["error"]


def test_a_bug_is_exit_1_in_one_line_and_debug_shows_the_traceback(tutor, tmp_path):
    (tmp_path / "markdown_it").mkdir()
    plain(tmp_path / "markdown_it" / "__init__.py", 'raise RuntimeError("broken\\ninstallation")')
    broken = {"PYTHONPATH": str(tmp_path), "HF_TOKEN": "hf_canaryCanaryCanaryCanary"}
    done = tutor("data", "stats", "-r", TINY, env=broken)
    assert done.returncode == 1
    assert re.fullmatch(
        r"Error: a bug of tutor's: RuntimeError: broken\\ninstallation \(__init__\.py:1\); .*--debug.*\n", done.stderr
    )
    loud = tutor("--debug", "data", "stats", "-r", TINY, env=broken)
    assert loud.returncode == 1
    assert "Traceback (most recent call last)" in loud.stderr
    assert "canary" not in done.stderr + loud.stderr


def test_debug_shows_the_traceback_of_an_error_and_keeps_its_code(tutor):
    for arguments, env in ((("--debug",), {}), ((), {"TUTOR_DEBUG": "1"})):
        done = tutor(*arguments, "status", "-r", "none.toml", env=env)
        assert done.returncode == 2
        assert "Traceback (most recent call last)" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("Error: cannot read recipe none.toml")
    assert "Traceback" not in tutor("status", "-r", "none.toml", env={"TUTOR_DEBUG": "0"}).stderr


# Where settings come from


def test_a_flag_wins_over_its_variable_and_that_over_the_default(tutor, recipe_file, tmp_path):
    def folder(*arguments: str | Path, **env: str) -> str:
        (first, *_) = json.loads(tutor("status", "--json", *arguments, env=env, cwd=tmp_path).stdout)
        return str(first["folder"])

    (tmp_path / "data").mkdir()
    other = shutil.copy(recipe_file, tmp_path / "other.toml")
    shutil.copy(recipe_file, tmp_path / "data" / "tutor.toml")
    for rows in tmp_path.glob("*.jsonl"):
        shutil.copy(rows, tmp_path / "data")
    assert folder() == "build/tutor/data"
    variables = {"TUTOR_RECIPE": str(other), "TUTOR_BUILD": "elsewhere"}
    assert folder(**variables) == "elsewhere/other/data"
    assert folder("-r", recipe_file, "-b", "flag", **variables) == "flag/small/data"


@pytest.mark.slow
def test_paths_may_have_blanks_accents_and_bytes_that_are_not_utf8(tutor, recipe_file, tmp_path):
    for name in ("con espacios y ñandúes €", os.fsdecode(b"mal\xf1a")):
        place = tmp_path / name
        place.mkdir()
        for file in (recipe_file, *tmp_path.glob("*.jsonl")):
            shutil.copy(file, place)
        assert tutor("data", "split", "-r", place / "small.toml", "-b", place / "build").returncode == 0
        done = tutor("status", "--json", "-r", "small.toml", cwd=place)
        assert json.loads(done.stdout)[0]["condition"] == "up to date"


# Streams


@pytest.mark.slow
def test_results_are_the_only_thing_on_stdout_and_json_is_one_document(tutor, recipe_file, tmp_path):
    where = ("--json", "-r", recipe_file, "-b", tmp_path / "build")
    split = tutor("data", "split", *where)
    assert json.loads(split.stdout)["results"]["train"] + json.loads(split.stdout)["results"]["held_out"] == 12
    assert "data: done" in split.stderr
    quiet = tutor("-q", "data", "split", *where)
    assert json.loads(quiet.stdout)["ran"] is False
    assert quiet.stderr == ""
    assert json.loads(tutor("data", "check", *where).stdout)[0]["rows"] == 12
    assert json.loads(tutor("data", "stats", *where).stdout)["rows"] == 12
    assert json.loads(tutor("why", "train", *where).stdout)["condition"] == "missing"
    assert json.loads(tutor("run", "--until", "data", *where).stdout)["ran"] == []
    assert json.loads(tutor("clean", *where).stdout)["removed"] == [str(tmp_path / "build" / "small" / "data")]


@pytest.mark.slow
def test_damage_is_exit_5_and_still_one_json_document(tutor, recipe_file, tmp_path):
    where = ("-r", recipe_file, "-b", tmp_path / "build")
    tutor("data", "split", *where)
    train = tmp_path / "build" / "small" / "data" / "train.jsonl"
    train.write_bytes(train.read_bytes()[:-1] + b" ")
    assert tutor("status", *where).returncode == 0
    done = tutor("status", "--verify", "--json", *where)
    assert done.returncode == 5
    problem = f"{train} has another content than when it was made"
    assert json.loads(done.stdout)[0]["problems"] == [problem]
    assert done.stderr == f"Error: {problem}; tutor run makes it again\n"
    assert tutor("why", "data", *where).stdout == "data is up to date\n"


@pytest.mark.parametrize("arguments", [("data", "stats", "--json"), ("--help",), ("status", "-r", "none", "--json")])
def test_a_reader_that_goes_away_is_no_fault(start, arguments):
    process = start(TUTOR, *arguments)
    process.stdout.close()
    assert process.wait(30) in (0, 141)
    assert "Traceback" not in process.stderr.read()
    assert "BrokenPipe" not in process.stderr.read()


def test_head_gets_its_lines(tmp_path):
    pipe = f"set -o pipefail; {TUTOR} data stats --json -r {TINY} | head -1"
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode in (0, 141)
    assert (done.stdout, done.stderr) == ("{\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1"},
        {"TERM": "dumb", "NO_COLOR": "1", "LANG": ""},
    ],
)
def test_output_is_utf8_without_control_sequences_whatever_the_locale_says(tutor, tmp_path, env):
    write_rows(tmp_path / "rows.jsonl", [{"instruction": "a", "response": "b", "category": "diseño €"}])
    done = tutor("data", "stats", tmp_path / "rows.jsonl", env=env)
    assert done.returncode == 0, done.stderr
    assert "    diseño €: 1\n" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "0 ok · 1 a bug · 2" in tutor("--help", env=env).stdout


def test_a_question_on_stdin_must_be_utf8():
    done = subprocess.run(
        [TUTOR, "ask"], input=b"\xbfQu\xe9?", capture_output=True, env=environment(), cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert b"the question on stdin is not UTF-8 (byte 0)" in done.stderr


def test_a_closed_stdin_and_stdout_are_no_bug(tmp_path):
    for closed, code in (("<&-", 2), (">&-", 0)):
        command = f"{TUTOR} {'ask' if code else 'data stats'} -r {TINY} {closed}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment(), check=False)
        assert done.returncode == code, done.stderr
        assert "bug" not in done.stderr


# Signals, and two at once


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_waiting_is_its_shell_code(start, number, code):
    process = start(TUTOR, "ask", "-r", TINY, stdin=subprocess.PIPE)
    process.stdin.write("¿Qué")
    process.stdin.flush()
    wait_for(lambda: unread(process.stdin) == 0)
    process.send_signal(number)
    assert process.wait(30) == code
    assert "Traceback" not in process.stderr.read()


def unread(pipe: Any) -> int:
    """How many bytes the other end has not read yet."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def running(start: Any, tmp_path: Path) -> Any:
    """A `tutor data split` that is at work for seconds, in the middle of writing."""
    (tmp_path / "long").mkdir()
    answer = "```ts\nlet x = 1;\n```\n" * 20
    rows = [{"instruction": f"¿Qué es {number}?", "response": answer} for number in range(20_000)]
    write_rows(tmp_path / "long" / "tutor.jsonl", rows)
    write_rows(tmp_path / "long" / "eval.jsonl", [{"instruction": "¿Y?"}])
    recipe = plain(tmp_path / "long" / "long.toml", '[base]\nsource = "tiny"\n')
    process = start(TUTOR, "data", "split", "-r", recipe, "-b", tmp_path / "build")
    wait_for((tmp_path / "build" / "long" / "data.partial").exists)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_the_middle_of_a_stage_leaves_nothing_half_made(running, tutor, tmp_path, number, code):
    running.send_signal(number)
    assert running.wait(30) == code
    assert sorted(path.name for path in (tmp_path / "build" / "long").iterdir() if path.is_dir()) == []
    assert "Traceback" not in running.stderr.read()


def test_a_second_run_does_not_wait_and_a_killed_one_blocks_nobody(running, tutor, tmp_path):
    where = ("-r", tmp_path / "long" / "long.toml", "-b", tmp_path / "build")
    running.send_signal(signal.SIGSTOP)  # it holds the lock for good: a second run that waits for it never ends
    done = tutor("run", "--json", *where)
    assert running.poll() is None
    assert done.returncode == 7
    error = json.loads(done.stdout)["error"]
    holder = f"in use by process {running.pid} on {platform.node()} since "
    assert re.search(re.escape(holder) + r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", error)
    assert json.loads(tutor("status", "--json", *where).stdout)[0]["condition"] == "missing"
    running.kill()
    running.wait()
    assert tutor("clean", *where).stdout == f"removed {tmp_path}/build/long/data.partial\n"
