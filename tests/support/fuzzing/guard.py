"""Run tutor on an input, and check what must hold for every input.

In: arguments, and a folder with the inputs. Out: the exit code and what was printed; `broken_rules` lists the rules
that were broken. Each run is a fork of a process that has imported the stages (support.processes.command).
"""

import re
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from support.processes.command import console_script, forked

CODES = frozenset({0, *range(2, 9)})
"""Exit codes for an input of any content: 1 is a bug."""
CPU_SECONDS = 20
"""Maximum processor seconds of one run."""
WALL_SECONDS = 150
"""Maximum seconds of one run, which may share the processor: a run that waits for ever uses none."""
PEAK_BYTES = 1 << 30
"""Maximum growth of memory of one run in bytes."""
LINE_LENGTH = 4000
"""Maximum characters of an error's line."""


@dataclass(frozen=True)
class Outcome:
    """One run: its end, its output, its memory, and the inputs that it changed."""

    code: int
    stdout: str
    stderr: str
    growth: int  # peak of the resident memory above that of the start, in bytes
    changed: tuple[str, ...]


def run(
    *arguments: str | Path,
    folder: Path,
    env: Mapping[str, str] | None = None,
    entry: Callable[[], None] = console_script,
) -> Outcome:
    """Run `tutor` (or `entry`) in `folder`/inputs; it may write below `folder`/build alone. Raises TimeoutError."""
    inputs, build = folder / "inputs", folder / "build"
    home = inputs / "home"
    home.mkdir(exist_ok=True)
    build.mkdir(exist_ok=True)
    before = contents(inputs)
    settings = {"HOME": str(home), "OLLAMA_HOST": "127.0.0.1:1", "HF_HUB_OFFLINE": "1", "TUTOR_BUILD": str(build)}
    settings |= {"XDG_CACHE_HOME": str(build / "cache")}
    limits = Limits(entry, folder / "scratch" / "growth", CPU_SECONDS)
    process = forked(*arguments, scratch=folder / "scratch", env={**settings, **(env or {})}, cwd=inputs, entry=limits)
    done = process.finish(WALL_SECONDS)
    after = contents(inputs)
    changed = tuple(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))
    growth = int(limits.notes.read_text("utf-8")) if limits.notes.exists() else 0
    return Outcome(done.returncode, done.stdout, done.stderr, growth, changed)


@dataclass(frozen=True)
class Limits:
    """A console script with a limit of processor time, whose peak memory is written to a file."""

    entry: Callable[[], None]
    notes: Path
    seconds: int

    def __call__(self) -> None:
        """Run the script. SIGXCPU ends it after `seconds`."""
        resource.setrlimit(resource.RLIMIT_CPU, (self.seconds, self.seconds + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Path("/proc/self/clear_refs").write_text("5", "utf-8")  # resets the peak of the resident memory
        start = memory("VmRSS")
        try:
            self.entry()
        finally:
            self.notes.write_text(str(memory("VmHWM") - start), "utf-8")


@dataclass(frozen=True)
class Call:
    """A function of one path as a console script: its errors end the process as those of a command."""

    function: Callable[[Path], object]

    def __call__(self) -> None:
        """Call the function with the last argument."""
        from tutor.cli.exit import run_and_exit

        argument = click.Argument(["path"], type=click.Path(path_type=Path))
        run_and_exit(click.Command("call", params=[argument], callback=self.call), "tutor")

    def call(self, path: Path) -> None:
        """Call the function, and forget its result, which is no exit code."""
        self.function(path)


def memory(name: str) -> int:
    """Return a figure of this process's memory in bytes: VmRSS now, VmHWM at its peak."""
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    assert line, name
    return int(line[1]) * 1024


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder with their content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def broken_rules(outcome: Outcome) -> list[str]:
    """Return the rules that a run broke; empty for a run as it must be."""
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("Error: ")]
    printed = outcome.stdout + outcome.stderr
    rules = {
        f"exit code {outcome.code}": outcome.code in CODES,
        f"{len(errors)} error lines": len(errors) == (outcome.code != 0),
        "a traceback": "Traceback (most recent call last)" not in printed,
        "a line too long": all(len(line) <= LINE_LENGTH for line in errors),
        "a control character": all(sign.isprintable() or sign in "\n\t\u200d" for sign in printed),
        f"{outcome.growth >> 20} MiB of memory": outcome.growth < PEAK_BYTES,
        f"changed {', '.join(outcome.changed)}": not outcome.changed,
    }
    return [rule for rule, holds in rules.items() if not holds]
