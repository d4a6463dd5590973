"""support/fuzzing: the guard finds each kind of fault, and a seed gives one input."""

import json
import sys
import time
from pathlib import Path
from random import Random

import pytest
from support.fuzzing import guard, mutations
from support.fuzzing.guard import Call, broken_rules, run

from tutor.errors import DataError

pytestmark = pytest.mark.slow


def raises_no_tutor_error(path: Path) -> None:
    json.loads(path.read_bytes())


def prints_a_traceback(path: Path) -> None:
    sys.stderr.write("Traceback (most recent call last)\n")
    raise DataError(f"{path} is wrong")


def prints_a_control_character(path: Path) -> None:
    sys.stdout.write(path.read_text("utf-8"))


def changes_its_input(path: Path) -> None:
    path.write_text("other", "utf-8")


def takes_memory(path: Path) -> None:
    del path
    assert b"x" * (guard.PEAK_BYTES + (4 << 20))


def refuses(path: Path) -> None:
    raise DataError(f"{path} is wrong")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "file").write_text("\x1b]0;x\x07", "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        (raises_no_tutor_error, "exit code 1"),
        (prints_a_traceback, "a traceback"),
        (prints_a_control_character, "a control character"),
        (changes_its_input, "changed file"),
        (takes_memory, " MiB of memory"),
    ],
)
def test_guard_finds_the_broken_rule(folder, function, rule):
    found = broken_rules(run("file", folder=folder, entry=Call(function)))
    assert any(rule in line for line in found)


def test_guard_accepts_one_error_line(folder):
    outcome = run("file", folder=folder, entry=Call(refuses))
    assert broken_rules(outcome) == []
    assert (outcome.code, outcome.stderr) == (3, "Error: file is wrong\n")


def never_ends(path: Path) -> None:
    while path:
        time.monotonic()


def test_guard_ends_a_run_that_never_ends(folder, monkeypatch):
    monkeypatch.setattr(guard, "CPU_SECONDS", 1)
    outcome = run("file", folder=folder, entry=guard.Call(never_ends))
    assert outcome.code < 0
    assert f"exit code {outcome.code}" in broken_rules(outcome)


def test_mutations_of_one_seed_are_equal_and_of_many_differ():
    value = {"a": ["b", 1, {"c": None}], "d": "text"}
    for mutate, seed in (
        (mutations.json_of, value),
        (mutations.bytes_of, b"some bytes"),
        (mutations.lines_of, ["a = 1"]),
    ):
        made = [mutate(seed, Random(number)) for number in range(50)]
        assert made == [mutate(seed, Random(number)) for number in range(50)]
        assert len(set(made)) > 20
    assert value == {"a": ["b", 1, {"c": None}], "d": "text"}
