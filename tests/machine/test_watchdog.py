"""Work that hangs is found by its time, and ends the process though the main thread is stuck in native code."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.processes.command import ROOT, environment

from tutor.errors import HostError
from tutor.machine import watchdog
from tutor.machine.watchdog import FACTOR, FLOOR, TICK, Watchdog


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The monotonic clock: `now` in seconds, set by the test."""
    fake = SimpleNamespace(now=0.0)
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: fake.now))
    return fake


def watched(clock: SimpleNamespace, *seconds: float) -> Watchdog:
    """Return a watchdog that has seen pieces of these lengths, and sees another one begin."""
    found = Watchdog(lambda waited, median: HostError(f"hangs: {waited:.0f} s, usually {median:.0f} s"))
    for length in seconds:
        found.begin()
        clock.now += length
        found.end()
    found.begin()
    return found


@pytest.mark.parametrize(
    ("pieces", "limit"), [((1, 1, 1), FLOOR), ((100, 90, 4000), FACTOR * 100), ((0,), FLOOR)], ids=str
)
def test_piece_hangs_after_a_multiple_of_the_median(
    clock: SimpleNamespace, pieces: tuple[float, ...], limit: float
) -> None:
    found = watched(clock, *pieces)
    for _ in range(int(limit / TICK) - 1):
        found.tick(TICK)
    with pytest.raises(HostError, match=f"hangs: {limit:.0f} s"):
        found.tick(TICK)


def test_first_piece_and_time_between_pieces_have_no_limit(clock: SimpleNamespace) -> None:
    first = watched(clock)
    first.tick(10 * FLOOR)
    first.end()
    first.tick(10 * FLOOR)


def test_suspended_machine_counts_one_tick(clock: SimpleNamespace) -> None:
    found = watched(clock, 1, 1)
    clock.now += 100 * FLOOR
    found.tick(TICK)
    found.end()
    found.begin()
    found.tick(FLOOR - TICK)


HANGING = """
import ctypes, sys, time
import click
from tutor.cli.exit import run_and_exit
from tutor.errors import HostError
from tutor.machine import watchdog
watchdog.FLOOR = watchdog.FACTOR = watchdog.TICK = 0.05
@click.command()
@click.option("--json", is_flag=True)
def train(json):
    with watchdog.Watchdog(lambda seconds, median: HostError("step 2 hangs", "see nvidia-smi")) as watching:
        watching.begin()
        watching.end()
        watching.begin()
        ctypes.PyDLL(None).pthread_sigmask(0, ctypes.create_string_buffer(bytes([255]) * 128), None)
        ctypes.CDLL(None).sleep(60)
run_and_exit(train, "train")
"""
"""A command that sleeps in native code with all signals blocked: only another thread can end it."""


def test_command_stuck_in_native_code_ends_with_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGING, "--json"],
        capture_output=True, text=True, env=environment(PYTHONPATH=str(ROOT)), timeout=50, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert done.stderr == "Error: step 2 hangs; see nvidia-smi\n"
    assert json.loads(done.stdout)["error"] == "step 2 hangs"
