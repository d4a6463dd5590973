"""Run programs of the pinned llama.cpp: killed with this process, no options from the environment, complete files.

In: a command. Out: its exit code and output, or an error. Contains nothing that is specific to one program.
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
"""Seconds between SIGTERM and SIGKILL."""
Command = Sequence[str | Path | int]
"""A program and its arguments."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Environment variables that keep the converters from contacting the model hub."""
DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Python program that requests SIGKILL at its parent's end (PR_SET_PDEATHSIG) and then executes its arguments."""


@dataclass(frozen=True)
class Programs:
    """Paths of the pinned build."""

    folder: Path  # the build: converters, `conversion/` and gguf-py
    quantize: Path
    server: Path
    score: Path
    imatrix: Path
    tokenize: Path


def programs(*needed: str) -> Programs:
    """The paths of the pinned build.

    Raises HostError where it lacks one of the programs `needed`, with the command that builds it; without names, where
    it is not there at all (the converters are Python files of it).
    """
    folder = build_folder()
    if not is_built(folder, needed):
        raise HostError(
            f"llama.cpp is not built: {folder} is missing or incomplete",
            "run: make llamacpp (or: python scripts/build_llamacpp.py), once, some minutes",
        )
    names = ("llama-quantize", "llama-server", "tutor-score", "llama-imatrix", "llama-tokenize")
    return Programs(folder, *(folder / "bin" / name for name in names))


def partial_path(target: Path) -> Path:
    """The path that a program writes to before the file is renamed to `target`."""
    return target.with_name(target.name + PARTIAL)


def write_file(
    target: Path, command: Command, environment: Mapping[str, str] | None = None, *, folder: Path | None = None
) -> tuple[int, str]:
    """Run a program that writes `partial_path(target)`, as `write_files` does."""
    return write_files((target,), command, environment, folder=folder)


def write_files(
    targets: Sequence[Path],
    command: Command,
    environment: Mapping[str, str] | None = None,
    *,
    folder: Path | None = None,
) -> tuple[int, str]:
    """Run a program that writes the `partial_path` of each target; rename them on exit code 0. Return code and output.

    The program runs in `folder` when a file must not store another file's path. Raises ArtifactError when it ends
    with 0 and a file is missing.
    """
    partials = {target: partial_path(target) for target in targets}
    try:
        done = subprocess.run(
            killed_with_parent(command),
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
            if missing := [partial for partial in partials.values() if not partial.is_file()]:
                raise ArtifactError(f"{command[0]} wrote no {missing[0]}")
            for target, partial in partials.items():
                partial.replace(target)
        return done.returncode, output
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def killed_with_parent(command: Command) -> list[str]:
    """The command, wrapped so that the kernel kills it when the thread that starts it ends (Linux)."""
    words = [str(word) for word in command]
    if sys.platform != "linux":
        return words
    return [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *words]


def clean_environment() -> dict[str, str]:
    """This process's environment without the variables that are options of llama.cpp."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "AIP_", "NO_LOCAL_"))}


def stop(process: subprocess.Popen[Any]) -> None:
    """Send SIGTERM and after STOP_SECONDS SIGKILL; a second Ctrl-C meanwhile kills at once."""
    process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        process.kill()
        process.wait()


def program_error(what: str, code: int, output: str, line: str | None = None) -> TutorError:
    """The error of a program that ended with `code`: HostError for a fault of this machine, else ArtifactError."""
    if code == -signal.SIGILL:
        return HostError(f"{what}: this processor lacks instructions that the build uses", "run: make llamacpp, here")
    if code == -signal.SIGKILL:
        return HostError(f"{what}: it was killed, most likely for lack of memory")
    if re.search(r"No space left on device|iostream error|basic_ios::clear", output):
        return HostError(f"{what}: the disk is full")
    lines = [re.sub(r"^[\d.]+ \w +", "", item.strip()) for item in output.split("\n") if item.strip()]
    errors = [item for item in lines if re.search(r"\b(error|failed|invalid|cannot|couldn't|unknown)\b", item)]
    return ArtifactError(f"{what}: {line or next(iter(errors or lines[-1:]), f'exit code {code}')}")
