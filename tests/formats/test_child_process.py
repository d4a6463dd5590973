"""formats/child_process.py: a signal at any moment of a start leaves no program running."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from tutor.formats.child_process import running

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


class EndedError(Exception):
    """What the handler of these tests raises."""


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    def end(number: int, _: object) -> None:
        raise EndedError(number)

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


def kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def test_signal_while_a_program_starts_ends_the_program_too() -> None:
    started = []

    def start() -> "subprocess.Popen[bytes]":
        started.append(subprocess.Popen(SLEEP))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    with pytest.raises(EndedError), running(start, kill):
        pytest.fail("the block is not entered")
    assert started[0].returncode == -signal.SIGKILL


def test_signal_after_the_start_ends_the_program() -> None:
    with pytest.raises(EndedError), running(lambda: subprocess.Popen(SLEEP), kill) as process:
        os.kill(os.getpid(), signal.SIGTERM)
    assert process.returncode == -signal.SIGKILL


def test_started_program_blocks_no_signal() -> None:
    with running(lambda: subprocess.Popen(SLEEP), kill) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM


def test_program_of_another_thread_is_stopped() -> None:
    codes = []

    def work() -> None:
        with running(lambda: subprocess.Popen(SLEEP), kill) as process:
            pass
        codes.append(process.returncode)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [-signal.SIGKILL]
