"""Does TypeScript code compile: the pinned compiler decides, in one process for all blocks; nothing is ever executed.

In: fenced blocks. Out: a verdict for each, whatever a block does to the compiler: code that a model wrote is hostile
until shown otherwise (docs/facts.md, 7). Says nothing about whether the code is what was asked for.
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

from tutor.formats.markdown import Block
from tutor.graders.typescript.install import find_compiler
from tutor.graders.typescript.scanner import Scan, scan

Outcome = Literal["pass", "type_error", "syntax_error", "no_code", "suppressed", "timeout", "judge_error"]

SECONDS = 10.0
"""For one block alone; a batch has a little more for each of its blocks."""
SECONDS_A_BLOCK = 0.02
MEMORY_MB = 4096
"""Address space, of which Go's runtime reserves much and uses little: about 250 MB are resident."""
MAX_BYTES = 64 * 1024
MAX_DEPTH = 100
"""Brackets in each other; the compiler's time over arrays 200 deep is more than minutes."""
ALONE_BYTES = 8 * 1024
"""No answer of 515 tokens is longer: such a block is compiled by itself, so that it cannot hold others up."""
BATCH = 500
FAN = 8
"""Into how many parts a batch is split whose compiler was killed, to find the block that did it."""
MAX_OUTPUT = 16 * 2**20

COMMON = (
    *("--noEmit", "--strict", "--ignoreConfig", "--pretty", "false", "--skipLibCheck"),
    *("--target", "es2023", "--module", "esnext", "--moduleResolution", "bundler", "--moduleDetection", "force"),
    # No import and no reference leads to a file: a block stands alone, and the machine's files are not its business
    "--noResolve",
)
SYNTAX = (*COMMON, "--noCheck", "--noLib")
"""The parser alone: one text that it refuses keeps the compiler from checking the types of all the others."""
TYPES = (*COMMON, "--lib", "es2023,dom,esnext.disposable")
NO_LIB = "TS2318"
"""No global type Array: what SYNTAX is told in passing."""

_DIAGNOSTIC = re.compile(r"^(?:(?P<file>[^\s(]+)\((?P<line>\d+),\d+\): )?error (?P<code>TS\d+): (?P<message>.*)$", re.M)


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """What is wrong. `code` is the compiler's, "" for ours; `line` counts from 1 in the block, 0 is before it."""

    code: str
    line: int
    message: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome for one block and its reasons."""

    outcome: Outcome
    diagnostics: tuple[Diagnostic, ...] = ()

    @property
    def codes(self) -> frozenset[str]:
        """The compiler's codes, each once."""
        return frozenset(each.code for each in self.diagnostics if each.code)


@dataclass(frozen=True)
class _Compiler:
    """How the compiler is started."""

    command: tuple[str, ...]
    seconds: float
    memory_mb: int


class _NoVerdictError(Exception):
    """A run of the compiler that says nothing about its blocks; `verdict` is for the one that is to blame."""

    def __init__(self, outcome: Outcome, why: str) -> None:
        super().__init__(why)
        self.verdict = Verdict(outcome, (Diagnostic("", 0, why),))


def judge_blocks(blocks: Sequence[Block], *, seconds: float = SECONDS, memory_mb: int = MEMORY_MB) -> list[Verdict]:
    """A verdict for each block. `seconds` and `memory_mb` bound the compiler for one block.

    Raises HostError when there are blocks and the compiler is not installed.
    """
    if not blocks:
        return []
    compiler = _Compiler((*_cut_off(), str(find_compiler())), seconds, memory_mb)
    verdicts: dict[int, Verdict] = {}
    together: list[int] = []
    groups: list[list[int]] = []
    for index, block in enumerate(blocks):
        size = len(block.before) + len(block.code)
        found = scan(block.before + block.code) if size <= MAX_BYTES else None
        if refused := _refuse(block, found):
            verdicts[index] = refused
        elif size > ALONE_BYTES or (found and found.reaches_out):
            groups.append([index])
        else:
            together.append(index)
    groups += [together[start : start + BATCH] for start in range(0, len(together), BATCH)]
    for group in groups:
        verdicts |= _judge({index: blocks[index] for index in group}, compiler)
    return [verdicts[index] for index in range(len(blocks))]


def _refuse(block: Block, found: Scan | None) -> Verdict | None:
    """The verdict on a block that is not given to the compiler; None for one that is."""
    if found is None:
        return Verdict("judge_error", (Diagnostic("", 0, f"longer than {MAX_BYTES} bytes: not judged"),))
    if found.empty:
        return Verdict("no_code")
    if found.depth > MAX_DEPTH:
        why = f"brackets lie {found.depth} deep: the compiler would not end ({MAX_DEPTH} are tried)"
        return Verdict("timeout", (Diagnostic("", 0, why),))
    if block.quoted:
        return None
    before = block.before.count("\n")
    marks = [Diagnostic("", line - before, text) for line, text in found.suppressions if line > before]
    return Verdict("suppressed", tuple(marks)) if marks else None


def _judge(blocks: Mapping[int, Block], compiler: _Compiler) -> dict[int, Verdict]:
    """The verdicts on blocks that are compiled together; a run that fails is repeated with fewer of them."""
    try:
        syntax = _compile(blocks, SYNTAX, compiler)
        rest = {index: block for index, block in blocks.items() if not syntax[index]}
        types = _compile(rest, TYPES, compiler) if rest else {}
    except _NoVerdictError as failure:
        if len(blocks) == 1:
            return dict.fromkeys(blocks, failure.verdict)
        verdicts: dict[int, Verdict] = {}
        for part in range(min(FAN, len(blocks))):
            verdicts |= _judge({index: blocks[index] for index in list(blocks)[part::FAN]}, compiler)
        return verdicts
    outcomes: dict[int, Verdict] = {}
    for index in blocks:
        found = syntax[index] or types[index]
        outcome: Outcome = "syntax_error" if syntax[index] else "type_error" if found else "pass"
        outcomes[index] = Verdict(outcome, tuple(found))
    return outcomes


def _compile(blocks: Mapping[int, Block], options: tuple[str, ...], compiler: _Compiler) -> dict[int, list[Diagnostic]]:
    """One run of the compiler: what it says of each block. Raises _NoVerdictError when it says nothing of use."""
    # Names that a block cannot know: it can neither import another nor write a line as if it were about another
    names = {f"b{secrets.token_hex(8)}.ts": index for index in blocks}
    with tempfile.TemporaryDirectory(prefix="tutor-tsc-") as folder:
        for name, index in names.items():
            source = blocks[index].before + blocks[index].code
            (Path(folder) / name).write_text(source, "utf-8", errors="replace", newline="")
        code, said = _run([*compiler.command, *options, *names], Path(folder), compiler, len(blocks))
    found: dict[int, list[Diagnostic]] = {index: [] for index in blocks}
    for match in _DIAGNOSTIC.finditer(said):
        if match["file"] in names:
            index = names[match["file"]]
            line = max(0, int(match["line"]) - blocks[index].before.count("\n"))
            found[index].append(Diagnostic(match["code"], line, _printable(match["message"])))
        elif match["file"] is None and not (match["code"] == NO_LIB and options is SYNTAX):
            raise _NoVerdictError("judge_error", f"the compiler: {match['code']} {_printable(match['message'])}")
    # 1 is this compiler's code for errors, 2 that of others; a crash is 2, too
    if code not in (0, 1, 2) or "\ngoroutine " in said or (code and options is TYPES and not any(found.values())):
        last = _printable((said.strip().splitlines() or [""])[0])
        raise _NoVerdictError("judge_error", f"the compiler ended with {code}: {last}")
    return found


def _run(command: Sequence[str], folder: Path, compiler: _Compiler, blocks: int) -> tuple[int, str]:
    """Exit code and output of a command in its own process group, which is killed at the deadline.

    Raises _NoVerdictError for that.
    """
    deadline = compiler.seconds + SECONDS_A_BLOCK * blocks
    environment = {"PATH": os.defpath, "HOME": str(folder), "GOMEMLIMIT": f"{compiler.memory_mb // 2}MiB"}
    output = folder / "output"
    with output.open("wb") as sink:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _limit(process.pid, deadline, compiler.memory_mb)
            code = process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise _NoVerdictError("timeout", f"the compiler was killed after {deadline:.0f} s") from None
        finally:
            if process.poll() is None:
                # Nothing less: on hostile input the compiler outlives SIGTERM and SIGINT
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, output.read_bytes().decode("utf-8", "replace")


def _limit(pid: int, seconds: float, memory_mb: int) -> None:
    """Bounds that hold even if this process dies: address space, processor time, what it writes."""
    processor_time = int(seconds * (os.cpu_count() or 1)) + 2
    limits = {
        resource.RLIMIT_AS: memory_mb * 2**20,
        resource.RLIMIT_CPU: processor_time,
        resource.RLIMIT_FSIZE: MAX_OUTPUT,
        resource.RLIMIT_CORE: 0,
    }
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        for kind, most in limits.items():
            resource.prlimit(pid, kind, (most, most))


def _cut_off() -> tuple[str, ...]:
    """The command in front that takes the network away, where this user may do that.

    The compiler opens no connection and, with --noResolve, no file but the blocks and its own libraries: this is the
    second lock, and a machine without it is as safe as the compiler is.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--user", "--map-root-user", "--net", "--")
    quiet = subprocess.DEVNULL
    allowed = subprocess.run([*command, "true"], stdin=quiet, stdout=quiet, stderr=quiet, check=False).returncode == 0
    return command if allowed else ()


def _printable(text: str) -> str:
    """A message of the compiler, which quotes the block: on one line, without control characters, short."""
    return "".join(sign if sign.isprintable() else " " for sign in text)[:300]
