"""Work in a child process that is killed at a chosen file-system call."""

import os
import signal
import sys
from collections.abc import Callable

STEPS = frozenset({"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir"})
"""Audit events of calls that change a file system; Python raises each event before the call."""


def in_child(work: Callable[[], object]) -> int:
    """Do the work in a forked process; return its exit status as subprocess gives it, 99 for an exception."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - nothing may go on in the child
            os._exit(getattr(error, "code", 99))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that is killed (-9) at its file system call number `step`; return whether it was."""

    def run() -> None:
        left = step

        def hook(event: str, _: object) -> None:
            nonlocal left
            if event in STEPS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    status = in_child(run)
    assert status in (0, -signal.SIGKILL)
    return status != 0
