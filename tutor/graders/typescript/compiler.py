"""Compile TypeScript blocks with the pinned compiler, many in one process, under limits. No block is executed.

In: fenced blocks. Out: a verdict for each block, whatever the block does to the compiler: code from a model is treated
as hostile (docs/facts.md, 7). Does not check whether the code does what was asked.
"""

import contextlib
import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tutor.formats.child_process import running
from tutor.formats.markdown import Block
from tutor.graders.typescript.install import find_compiler
from tutor.graders.typescript.scanner import Scan, scan

Outcome = Literal["pass", "type_error", "syntax_error", "no_code", "suppressed", "timeout", "grader_error"]
"""Result of a block. `suppressed`: it turns the compiler off. `grader_error`: it could not be compiled."""

MAX_SECONDS = 10.0
"""Maximum seconds of a run of the compiler, without MORE_SECONDS_A_BLOCK."""
MORE_SECONDS_A_BLOCK = 0.02
"""Additional seconds of a batch for each of its blocks."""
MEMORY_MB = 4096
"""Address space of the compiler in MiB. Go's runtime reserves much more than it uses: about 250 MB are resident."""
MAX_CHARACTERS = 64 * 1024
"""Maximum length of a block in characters, with the code before it."""
MAX_DEPTH = 100
"""Maximum depth of nested brackets; the compiler takes minutes and more for arrays 200 deep."""
MIN_ALONE_CHARACTERS = 8 * 1024
"""Length in characters from which a block is compiled alone; answers of 515 tokens are shorter."""
MAX_BATCH = 500
"""Maximum number of blocks in one run of the compiler."""
SUB_BATCHES = 8
"""Number of sub-batches when a batch kills the compiler; used to isolate the bad block."""
MAX_OUTPUT = 16 * 2**20
"""Maximum size of the compiler's output in bytes."""

COMMON_OPTIONS = (
    *("--noEmit", "--strict", "--ignoreConfig", "--pretty", "false", "--skipLibCheck"),
    *("--target", "es2023", "--module", "esnext", "--moduleResolution", "bundler", "--moduleDetection", "force"),
    # No import and no reference leads to a file: a block cannot read the machine's files
    "--noResolve",
)
"""Options of every run of the compiler."""
SYNTAX_OPTIONS = (*COMMON_OPTIONS, "--noCheck", "--noLib")
"""Options of the first run, which only parses: one syntax error stops the type check of all blocks."""
TYPE_OPTIONS = (*COMMON_OPTIONS, "--lib", "es2023,dom,esnext.disposable")
"""Options of the second run, which checks the types."""
NO_LIBRARY_ERROR = "TS2318"
"""Code of the error 'no global type Array', which every run with SYNTAX_OPTIONS reports."""

_DIAGNOSTIC = re.compile(r"^(?:(?P<file>[^\s(]+)\((?P<line>\d+),\d+\): )?error (?P<code>TS\d+): (?P<message>.*)$", re.M)


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """An error. `code` is the compiler's or ""; `line` counts from 1 in the block, 0 is before it."""

    code: str
    line: int
    message: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one block and its diagnostics."""

    outcome: Outcome
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def codes(self) -> frozenset[str]:
        """The set of the compiler's codes."""
        return frozenset(each.code for each in self.diagnostics if each.code)


@dataclass(frozen=True)
class _Compiler:
    """The compiler's command and limits."""

    command: tuple[str, ...]
    seconds: float
    memory_mb: int


class _NoVerdictError(Exception):
    """A run of the compiler gave no verdict on its blocks; `verdict` is the one for the block that is the cause."""

    def __init__(self, outcome: Outcome, why: str) -> None:
        super().__init__(why)
        self.verdict = Verdict(outcome, (Diagnostic("", 0, why),))


def grade_blocks(blocks: Sequence[Block], *, seconds: float = MAX_SECONDS, memory_mb: int = MEMORY_MB) -> list[Verdict]:
    """Compile blocks; a verdict for each. `seconds` and `memory_mb` limit the compiler for one block.

    Raises HostError when there are blocks and the compiler is not installed.
    """
    if not blocks:
        return []
    compiler = _Compiler((*_without_network(), str(find_compiler())), seconds, memory_mb)
    verdicts: dict[int, Verdict] = {}
    together: list[int] = []
    groups: list[list[int]] = []
    for index, block in enumerate(blocks):
        size = len(block.before) + len(block.code)
        found = scan(block.before + block.code) if size <= MAX_CHARACTERS else None
        if refused := _refuse(block, found):
            verdicts[index] = refused
        elif size > MIN_ALONE_CHARACTERS or (found and found.is_global):
            groups.append([index])
        else:
            together.append(index)
    groups += [together[start : start + MAX_BATCH] for start in range(0, len(together), MAX_BATCH)]
    for group in groups:
        verdicts |= _grade({index: blocks[index] for index in group}, compiler)
    return [verdicts[index] for index in range(len(blocks))]


def _refuse(block: Block, found: Scan | None) -> Verdict | None:
    """The verdict on a block that is not compiled; None for one that is."""
    if found is None:
        return Verdict("grader_error", (Diagnostic("", 0, f"longer than {MAX_CHARACTERS} characters: not compiled"),))
    if found.empty:
        return Verdict("no_code")
    if found.depth > MAX_DEPTH:
        why = f"brackets are {found.depth} deep, the maximum is {MAX_DEPTH}: the compiler would not end"
        return Verdict("timeout", (Diagnostic("", 0, why),))
    if block.quoted:
        return None
    before = block.before.count("\n")
    suppressions = [Diagnostic("", line - before, text) for line, text in found.suppressions if line > before]
    return Verdict("suppressed", tuple(suppressions)) if suppressions else None


def _grade(blocks: Mapping[int, Block], compiler: _Compiler) -> dict[int, Verdict]:
    """The verdicts on blocks that are compiled together; a run without verdicts is repeated in sub-batches."""
    try:
        syntax = _compile(blocks, SYNTAX_OPTIONS, compiler)
        rest = {index: block for index, block in blocks.items() if not syntax[index]}
        types = _compile(rest, TYPE_OPTIONS, compiler) if rest else {}
    except _NoVerdictError as failure:
        if len(blocks) == 1:
            return dict.fromkeys(blocks, failure.verdict)
        verdicts: dict[int, Verdict] = {}
        for part in range(min(SUB_BATCHES, len(blocks))):
            verdicts |= _grade({index: blocks[index] for index in list(blocks)[part::SUB_BATCHES]}, compiler)
        return verdicts
    outcomes: dict[int, Verdict] = {}
    for index in blocks:
        found = syntax[index] or types[index]
        outcome: Outcome = "syntax_error" if syntax[index] else "type_error" if found else "pass"
        outcomes[index] = Verdict(outcome, tuple(found))
    return outcomes


def _compile(blocks: Mapping[int, Block], options: tuple[str, ...], compiler: _Compiler) -> dict[int, list[Diagnostic]]:
    """Run the compiler once; return each block's errors. Raises _NoVerdictError when its output is of no use."""
    # Random names: a block can neither import another one nor forge a diagnostic of another one
    names = {f"b{secrets.token_hex(8)}.ts": index for index in blocks}
    with tempfile.TemporaryDirectory(prefix="tutor-tsc-") as folder:
        for name, index in names.items():
            source = blocks[index].before + blocks[index].code
            (Path(folder) / name).write_text(source, "utf-8", errors="replace", newline="")
        code, output = _run([*compiler.command, *options, *names], Path(folder), compiler, len(blocks))
    found: dict[int, list[Diagnostic]] = {index: [] for index in blocks}
    for match in _DIAGNOSTIC.finditer(output):
        if match["file"] in names:
            index = names[match["file"]]
            line = max(0, int(match["line"]) - blocks[index].before.count("\n"))
            found[index].append(Diagnostic(match["code"], line, _printable(match["message"])))
        elif match["file"] is None and not (match["code"] == NO_LIBRARY_ERROR and options is SYNTAX_OPTIONS):
            raise _NoVerdictError("grader_error", f"the compiler: {match['code']} {_printable(match['message'])}")
    # This compiler ends with 1 on errors, other versions with 2; a crash ends with 2, too
    if (
        code not in (0, 1, 2)
        or "\ngoroutine " in output
        or (code and options is TYPE_OPTIONS and not any(found.values()))
    ):
        first = _printable((output.strip().splitlines() or [""])[0])
        raise _NoVerdictError("grader_error", f"the compiler ended with {code}: {first}")
    return found


def _run(command: Sequence[str], folder: Path, compiler: _Compiler, blocks: int) -> tuple[int, str]:
    """Exit code and output of a command in its own process group.

    Kills the group at the deadline and raises _NoVerdictError.
    """
    deadline = compiler.seconds + MORE_SECONDS_A_BLOCK * blocks
    environment = {"PATH": os.defpath, "HOME": str(folder), "GOMEMLIMIT": f"{compiler.memory_mb // 2}MiB"}
    output = folder / "output"
    with output.open("wb") as sink:
        try:
            with running(
                lambda: subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                ),
                _kill,
            ) as process:
                _limit(process.pid, deadline, compiler.memory_mb)
                code = process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise _NoVerdictError("timeout", f"the compiler was killed after {deadline:.0f} s") from None
    return code, output.read_bytes().decode("utf-8", "replace")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill the group: on hostile input the compiler survives SIGTERM and SIGINT."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _limit(pid: int, seconds: float, memory_mb: int) -> None:
    """Set limits that hold even if this process dies: address space, processor time, size of output."""
    processor_time = int(seconds * (os.cpu_count() or 1)) + 2
    limits = {
        resource.RLIMIT_AS: memory_mb * 2**20,
        resource.RLIMIT_CPU: processor_time,
        resource.RLIMIT_FSIZE: MAX_OUTPUT,
        resource.RLIMIT_CORE: 0,
    }
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        for kind, limit in limits.items():
            resource.prlimit(pid, kind, (limit, limit))


def _without_network() -> tuple[str, ...]:
    """Arguments that start a command without network; none when this user has no permission to do so.

    A second barrier: the compiler opens no connection and, with --noResolve, only the files of the blocks and of its
    own libraries.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--user", "--map-root-user", "--net", "--")
    quiet = subprocess.DEVNULL
    allowed = subprocess.run([*command, "true"], stdin=quiet, stdout=quiet, stderr=quiet, check=False).returncode == 0
    return command if allowed else ()


def _printable(text: str) -> str:
    """A message of the compiler, which may quote the block: one line, no control characters, at most 300 characters."""
    return "".join(character if character.isprintable() else " " for character in text)[:300]
