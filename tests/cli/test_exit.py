"""cli/exit.py and tutor/errors.py: exit codes, one line an error, JSON, streams, signals."""

import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from support.files import write_rows, write_text
from support.processes.command import TINY, TUTOR, environment, in_process
from support.processes.waiting import wait_for, waits_for_more

# Errors


@pytest.mark.parametrize("arguments", [(), ("data",)])
def test_group_without_a_command_prints_help_and_exits_2(tutor, arguments):
    done = tutor(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: tutor ")
    assert "Error" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("nonsense",), 2, "No such command 'nonsense'"),
        (("status", "--nonsense"), 2, "No such option"),
        (("status", "extra"), 2, "unexpected extra argument"),
        (("run", "--until", "dta"), 2, "'dta'; known: data, base, train"),
        (("why", "dta"), 2, "'dta'; known: data, base, train"),
        (("clean", "dta"), 2, "no stage 'dta'; known: data, base, train"),
        (("ask", "-m", "gpt", "¿?"), 2, "'gpt' is not one of 'tutor', 'base', 'base-as-tutor', 'adapter'"),
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
def test_user_error_is_one_line_and_its_exit_code(tmp_path, arguments, code, expected):
    where = () if {"-b", "check", "nonsense"} & {*arguments} else ("-b", tmp_path / "build")
    done = in_process(*arguments, *where)
    assert done.returncode == code
    assert done.stdout == ""
    assert expected in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
    assert ".;" not in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("TUTOR_DEBUG", "maybe", "'maybe' is not a valid boolean"),
        ("TUTOR_RECIPE", "none.toml", "cannot read recipe none.toml"),
        ("TUTOR_RECIPE", "a\nb", "cannot read recipe a\\nb"),
        ("TUTOR_BUILD", "README.md/build", "Not a directory"),
        ("TUTOR_BUILD", "/", "/ is the root of the file system"),
    ],
)
def test_wrong_variable_of_tutor_is_one_line_and_exit_2(variable, value, expected):
    done = in_process("status", env={variable: value})
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1


def test_unknown_setting_names_the_key_and_similar_ones(tutor, tmp_path):
    done = tutor("run", "-r", write_text(tmp_path / "r.toml", "[train]\nrnak = 4\n"), "-b", tmp_path / "build")
    assert done.returncode == 2
    assert "unknown setting train.rnak; did you mean rank? known: accumulation" in done.stderr
    assert not (tmp_path / "build").exists()


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
def test_error_with_json_is_also_an_object_on_stdout(tmp_path, arguments, code):
    where = () if arguments[0] == "data" else ("-b", tmp_path / "build")
    done = in_process(*arguments, "--json", *where)
    value = json.loads(done.stdout)
    assert sorted(value) == ["code", "error", "hint", "ok", "problems", "stage"]
    assert value["ok"] is False
    assert value["code"] == done.returncode == code
    assert value["error"] in done.stderr
    assert value["hint"] is None or value["hint"] in done.stderr


def test_error_with_json_names_the_stage_that_was_running(tmp_path, recipe_file):
    write_text(tmp_path / "tutor.jsonl", "{}\n")
    where = ("-r", recipe_file, "-b", tmp_path / "build", "--json")
    for command, code, stage in ((("data", "split"), 3, "data"), (("train",), 5, None)):
        value = json.loads(in_process(*command, *where).stdout)
        assert (value["ok"], value["code"], value["stage"]) == (False, code, stage)


def test_bug_with_json_is_also_an_object_on_stdout(tutor, tmp_path):
    write_text(tmp_path / "markdown_it.py", 'raise RuntimeError("broken")')
    done = tutor("data", "stats", "--json", "-r", TINY, env={"PYTHONPATH": str(tmp_path)})
    value = json.loads(done.stdout)
    assert (value["ok"], value["code"], value["stage"]) == (False, 1, None)
    assert value["error"].startswith("bug in tutor: RuntimeError: broken (markdown_it.py:1)")


def test_error_with_control_characters_is_printed_escaped(tutor, tmp_path):
    name = os.fsdecode(b"mal\xf1a\x1b[31m\nError: forged.toml")
    done = tutor("status", "--json", "-r", tmp_path / name)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr
    assert name in json.loads(done.stdout)["error"]


def test_bug_is_one_line_and_debug_shows_the_traceback(tutor, tmp_path):
    (tmp_path / "markdown_it").mkdir()
    write_text(tmp_path / "markdown_it" / "__init__.py", 'raise RuntimeError("broken\\ninstallation")')
    broken = {"PYTHONPATH": str(tmp_path), "HF_TOKEN": "hf_canaryCanaryCanaryCanary"}
    done = tutor("data", "stats", "-r", TINY, env=broken)
    assert done.returncode == 1
    assert re.fullmatch(
        r"Error: bug in tutor: RuntimeError: broken\\ninstallation \(__init__\.py:1\); .*--debug.*\n", done.stderr
    )
    loud = tutor("--debug", "data", "stats", "-r", TINY, env=broken)
    assert loud.returncode == 1
    assert "Traceback (most recent call last)" in loud.stderr
    assert "canary" not in done.stderr + loud.stderr


def test_debug_shows_a_traceback_and_keeps_the_exit_code(tutor):
    for arguments, env in ((("--debug",), {}), ((), {"TUTOR_DEBUG": "1"})):
        done = tutor(*arguments, "status", "-r", "none.toml", env=env)
        assert done.returncode == 2
        assert "Traceback (most recent call last)" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("Error: cannot read recipe none.toml")
    assert "Traceback" not in tutor("status", "-r", "none.toml", env={"TUTOR_DEBUG": "0"}).stderr


@pytest.mark.parametrize("flag", [(), ("--debug",)])
def test_secret_is_in_no_output_of_an_error(tutor, tmp_path, flag):
    token = "hf_" + "Q" * 30
    done = tutor(*flag, "status", "--json", "-r", f"{token}.toml")
    assert done.returncode == 2
    assert ("Traceback" in done.stderr) == bool(flag)
    assert "[redacted].toml" in done.stderr
    assert "[redacted].toml" in json.loads(done.stdout)["error"]
    library = f'import sys\nsys.stderr.write("{token} \\x9b2J\\n")\nraise RuntimeError("Authorization: Bearer abc")'
    write_text(tmp_path / "markdown_it.py", library)
    bug = tutor(*flag, "data", "stats", "-r", TINY, env={"PYTHONPATH": str(tmp_path), "OLLAMA_API_KEY": "sk-secret-1"})
    assert bug.returncode == 1
    assert bug.stderr.startswith("[redacted] \\x9b2J\n")
    assert "Authorization: Bearer [redacted]" in bug.stderr
    for text in (done.stdout, done.stderr, bug.stdout, bug.stderr):
        assert "QQQ" not in text
        assert "abc" not in text


# Streams


@pytest.mark.parametrize("arguments", [("data", "stats", "--json"), ("--help",), ("status", "-r", "none", "--json")])
def test_closed_reader_causes_no_traceback(start, arguments):
    process = start(TUTOR, *arguments)
    process.stdout.close()
    assert process.wait(30) in (0, 141)
    assert "Traceback" not in process.stderr.read()
    assert "BrokenPipe" not in process.stderr.read()


def test_head_receives_its_lines(tmp_path):
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
def test_output_in_any_locale_is_plain_utf8(tutor, tmp_path, env):
    write_rows(tmp_path / "rows.jsonl", [{"instruction": "a", "response": "b", "category": "diseño €"}])
    done = tutor("data", "stats", tmp_path / "rows.jsonl", env=env)
    assert done.returncode == 0, done.stderr
    assert "    diseño €: 1\n" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "0 ok · 1 a bug · 2" in tutor("--help", env=env).stdout


@pytest.mark.parametrize(
    ("command", "code"), [("ask <&-", 2), ("data stats >&-", 0), ("data split 2>&-", 0), ("why dta >&- 2>&-", 2)]
)
def test_closed_stream_is_not_reported_as_a_bug(tmp_path, command, code):
    where = "" if command.startswith("data stats") else f"-b {tmp_path}"
    line = f"{TUTOR} {command} -r {TINY} {where}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == code, done.stderr
    assert "bug" not in done.stderr


# Signals


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGQUIT, 131)],
)
def test_signal_while_waiting_gives_the_shell_exit_code(start, number, code):
    process = start(TUTOR, "ask", "-r", TINY, stdin=subprocess.PIPE)
    process.stdin.write("¿Qué")
    process.stdin.flush()
    wait_for(lambda: waits_for_more(process))
    process.send_signal(number)
    assert process.wait(30) == code
    assert "Traceback" not in process.stderr.read()


def test_nohup_keeps_a_command_alive_without_its_terminal(start):
    process = start("nohup", TUTOR, "ask", "-r", TINY, stdin=subprocess.PIPE)
    process.stdin.write("¿Qué")
    process.stdin.flush()
    wait_for(lambda: waits_for_more(process))
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 5
    assert "gguf is not there" in errors


CLEANUP = """
import os, pathlib, signal, sys, time
import click
from tutor.cli.exit import run_and_exit
@click.command()
def command():
    try:
        pathlib.Path("started").touch()
        time.sleep(60)
    finally:
        click.echo("ending", err=True)
        os.kill(os.getpid(), signal.SIGHUP)
        pathlib.Path("cleaned").touch()
run_and_exit(command, "command")
"""
"""A command whose cleanup prints, and during which SIGHUP comes again."""


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (
            "RuntimeError('CUDA out of memory. Tried to allocate 2 GiB.\\nMore')",
            4,
            "out of memory: CUDA out of memory.",
        ),
        (
            "RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes')",
            4,
            "out of memory: Def",
        ),
        ("MemoryError()", 4, "out of memory: Python's; end other programs"),
        ("RuntimeError('shape mismatch')", 1, "bug in tutor: RuntimeError: shape mismatch"),
    ],
)
def test_memory_that_runs_out_anywhere_is_exit_4(error, code, expected):
    lines = ["import click", "from tutor.cli.exit import run_and_exit", "@click.command()", "def command():"]
    program = "\n".join([*lines, f"    raise {error}", "run_and_exit(command, 'command')"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(f"Error: {expected}")
    assert done.stderr.count("\n") == 1


def test_closed_terminal_ends_through_every_cleanup(tmp_path):
    """The terminal's end closes: every write to it fails, and SIGHUP comes from the kernel."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, "-c", CLEANUP])
    wait_for((tmp_path / "started").exists)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
    assert (tmp_path / "cleaned").exists()
