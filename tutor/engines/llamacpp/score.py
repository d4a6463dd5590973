"""Teacher-forced scores by llama.cpp: log-probabilities of given answers, and the divergence from another model.

In: a GGUF and rows of token ids. Out: log-probabilities by position. Generates nothing and sets no tolerance.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tutor.engines.llamacpp.process import clean_environment, killed_with_parent, program_error, programs, stop
from tutor.engines.trace import Score
from tutor.errors import ArtifactError
from tutor.formats.child_process import running


def score(
    gguf: Path,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
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
    if not rows:
        return []
    command: list[str | Path | int] = [programs("tutor-score").score, gguf, threads, top]
    compare = reference is not None and reference.exists()
    for option, path in (("--lora", lora), ("--reference" if compare else "--write-reference", reference)):
        command += [option, path] if path else []
    # Rows and errors go through files: a full pipe would block both sides.
    with tempfile.TemporaryFile("w+") as lines, tempfile.TemporaryFile("w+", errors="replace") as errors:
        lines.writelines(f"{len(prompt)} {' '.join(map(str, (*prompt, *answer)))}\n" for prompt, answer in rows)
        lines.seek(0)
        with running(
            lambda: subprocess.Popen(
                killed_with_parent(command),
                stdin=lines,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=clean_environment(),
                text=True,
            ),
            stop,
        ) as process:
            scores = [_score(line, gguf) for line in process.stdout or ()]
            code = process.wait()
        errors.seek(0)
        if code:
            raise program_error(f"cannot score with {gguf}", code, errors.read())
    expected = [(len(answer), len(answer) if compare else 0) for _, answer in rows]
    if [(len(item.logprobs), len(item.kl)) for item in scores] != expected:
        raise ArtifactError(f"{programs().score} returned other scores than requested")
    return scores


def reference_bytes(rows: Sequence[tuple[Sequence[int], Sequence[int]]], vocabulary: int) -> int:
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
