"""Teacher-forced scores by llama.cpp: log-probabilities of given answers, and the divergence from another model.

In: a GGUF and rows of token ids. Out: log-probabilities by position. Generates nothing and sets no tolerance.
"""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tutor.engines.llamacpp.process import clean_environment, killed_with_parent, program_error, programs, stop
from tutor.engines.trace import Score
from tutor.errors import ArtifactError

Rows = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Prompt ids and answer ids of each row."""
AT_A_TIME = 2
"""Maximum number of files that are scored at a time, each with its share of the cores: what one process does on one
thread (divergences, reading) does not leave the other cores idle."""


def score_each(
    files: Mapping[str, Path], rows: Rows, *, threads: int, top: int = 1, reference: Path | None = None
) -> Generator[tuple[str, list[Score]]]:
    """Yield the scores of several files by their names, in their order; as `score`, AT_A_TIME of them at a time."""
    names, at_a_time = list(files), min(AT_A_TIME, threads)
    for batch in (names[start : start + at_a_time] for start in range(0, len(names), at_a_time)):
        with ExitStack() as stack:
            start = partial(_running, rows=rows, threads=threads // len(batch), top=top, reference=reference)
            running = {name: stack.enter_context(start(files[name])) for name in batch}
            for name, result in running.items():
                yield name, result()


def score(
    gguf: Path,
    rows: Rows,
    *,
    threads: int,
    top: int = 1,
    lora: Path | None = None,
    reference: Path | None = None,
) -> list[Score]:
    """Teacher-forced scores of (prompt ids, answer ids) rows, in their order, by one process.

    `reference` is a file of full distributions (`reference_bytes`). A missing file is written; an existing one, written
    by a reference model for the same rows, gives each score `kl` and `same`.
    Raises ArtifactError when the model does not load, an id is outside its vocabulary, or a score is not finite.
    """
    with _running(gguf, rows, threads=threads, top=top, lora=lora, reference=reference) as result:
        return result()


@contextlib.contextmanager
def _running(
    gguf: Path, rows: Rows, *, threads: int, top: int, lora: Path | None = None, reference: Path | None = None
) -> Iterator[Callable[[], list[Score]]]:
    """Start a process that scores rows; yield the function that waits for its scores. The end of the block stops it."""
    if not rows:
        yield list
        return
    command: list[str | Path | int] = [programs().score, gguf, threads, top]
    compare = reference is not None and reference.exists()
    for option, path in (("--lora", lora), ("--reference" if compare else "--write-reference", reference)):
        command += [option, path] if path else []
    # Through files: a full pipe would block the process until its turn to be read.
    with (
        tempfile.TemporaryFile("w+") as lines,
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
    ):
        lines.writelines(f"{len(prompt)} {' '.join(map(str, (*prompt, *answer)))}\n" for prompt, answer in rows)
        lines.seek(0)
        process = subprocess.Popen(
            killed_with_parent(command),
            stdin=lines,
            stdout=output,
            stderr=errors,
            env=clean_environment(),
        )

        def result() -> list[Score]:
            if code := process.wait():
                errors.seek(0)
                raise program_error(f"cannot score with {gguf}", code, errors.read())
            output.seek(0)
            scores = [_score(line, gguf) for line in output]
            expected = [(len(answer), len(answer) if compare else 0) for _, answer in rows]
            if [(len(item.logprobs), len(item.kl)) for item in scores] != expected:
                raise ArtifactError(f"{programs().score} returned other scores than requested")
            return scores

        try:
            yield result
        finally:
            stop(process)


def reference_bytes(rows: Rows, vocabulary: int) -> int:
    """Size of the distributions in bytes: 32 bits for each token of the vocabulary at each position of an answer."""
    return sum(len(answer) for _, answer in rows) * vocabulary * 4


def _score(line: str, gguf: Path) -> Score:
    try:
        values = json.loads(line)
    except ValueError:  # C++ writes nan and inf, which are not JSON
        raise ArtifactError(f"{gguf} gives probabilities that are not finite") from None
    tops = tuple(tuple((int(id_), float(logprob)) for id_, logprob in position) for position in values["top"])
    same = tuple(bool(value) for value in values.get("same", ()))
    return Score(tuple(values["logprobs"]), tops, tuple(values.get("kl", ())), same)
