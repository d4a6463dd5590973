"""The programs of the pinned llama.cpp, and how one is run: it never outlives us, takes no option from the
environment, and leaves a whole file or none. In: a command. Out: its exit code and output, or what they amount to.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutor.artifacts.stage_folder import PARTIAL
from tutor.engines.llamacpp.build import build_folder, is_built
from tutor.errors import ArtifactError, HostError, TutorError

STOP_SECONDS = 5.0
Command = Sequence[str | Path | int]
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""For the converters, which would ask the model hub."""
TETHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Asks the kernel for SIGKILL at its parent's end (PR_SET_PDEATHSIG), then becomes the program."""


@dataclass(frozen=True)
class Programs:
    """Where the pinned build lies."""

    folder: Path  # the converters, `conversion/` and gguf-py
    quantize: Path
    server: Path
    score: Path
    imatrix: Path


def programs() -> Programs:
    """The programs of the pinned build. Raises HostError naming the command that builds them."""
    folder = build_folder()
    if not is_built(folder):
        raise HostError(
            f"llama.cpp is not built: {folder} is missing or not whole",
            "run: make llamacpp (or: python scripts/build_llamacpp.py), once, some minutes",
        )
    names = ("llama-quantize", "llama-server", "tutor-score", "llama-imatrix")
    return Programs(folder, *(folder / "bin" / name for name in names))


def partial_of(target: Path) -> Path:
    """Where a program writes what becomes `target`."""
    return target.with_name(target.name + PARTIAL)


def write_file(
    target: Path, command: Command, environment: Mapping[str, str] | None = None, *, folder: Path | None = None
) -> tuple[int, str]:
    """Run a program that writes the partial of `target`, which gets its name on exit code 0: code and output.

    It runs in `folder`, where a file must not remember the path of another. Raises ArtifactError where it ends well
    and has written nothing.
    """
    partial = partial_of(target)
    try:
        done = subprocess.run(
            tethered(command),
            env=clean_environment() | dict(environment or {}),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        output = done.stdout.strip()
        if done.returncode == 0:
            if not partial.is_file():
                raise ArtifactError(f"{command[0]} wrote no {partial}")
            partial.replace(target)
        return done.returncode, output
    finally:
        partial.unlink(missing_ok=True)


def tethered(command: Command) -> list[str]:
    """The command, to be killed by the kernel when the thread that starts it ends, SIGKILL included (Linux)."""
    words = [str(word) for word in command]
    return [sys.executable, "-I", "-S", "-c", TETHER, str(os.getpid()), *words] if sys.platform == "linux" else words


def clean_environment() -> dict[str, str]:
    """Ours, without the variables by which llama.cpp takes options."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "AIP_", "NO_LOCAL_"))}


def stop(process: subprocess.Popen[Any]) -> None:
    """SIGTERM, and after a grace SIGKILL; a second Ctrl-C while waiting kills at once."""
    process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        process.kill()
        process.wait()


def fault(what: str, code: int, output: str, line: str | None = None) -> TutorError:
    """The error of a program that ended with `code`: this machine's where that shows, else the file's."""
    if code == -signal.SIGILL:
        return HostError(f"{what}: this processor lacks instructions that the build uses", "run: make llamacpp, here")
    if code == -signal.SIGKILL:
        return HostError(f"{what}: it was killed, most likely for lack of memory")
    if re.search(r"No space left on device|iostream error|basic_ios::clear", output):
        return HostError(f"{what}: the disk is full")
    lines = [re.sub(r"^[\d.]+ \w +", "", item.strip()) for item in output.split("\n") if item.strip()]
    telling = [item for item in lines if re.search(r"\b(error|failed|invalid|cannot|couldn't|unknown)\b", item)]
    return ArtifactError(f"{what}: {line or next(iter(telling or lines[-1:]), f'exit code {code}')}")
