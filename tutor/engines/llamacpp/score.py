"""Teacher-forced scores by llama.cpp: what a model makes of given answers, and how far it is from another model.

In: a GGUF and rows of token ids. Out: log-probabilities, place by place. Generates nothing and judges nothing.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tutor.engines.llamacpp.process import clean_environment, fault, programs, stop, tethered
from tutor.engines.trace import Score
from tutor.errors import ArtifactError


def score(
    gguf: Path,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    threads: int,
    top: int = 1,
    lora: Path | None = None,
    reference: Path | None = None,
) -> list[Score]:
    """Teacher-forced scores of (prompt ids, answer ids) rows, in their order; one process for all of them.

    `reference` is a file of whole distributions (`reference_bytes` of them): written where it is not there; where it
    is, by a reference model on the same rows, scores have `kl` and `same`.
    Raises ArtifactError when the model does not load, an id is outside its vocabulary, or a score is not finite.
    """
    if not rows:
        return []
    command: list[str | Path | int] = [programs().score, gguf, threads, top]
    compared = reference is not None and reference.exists()
    for option, path in (("--lora", lora), ("--against" if compared else "--keep", reference)):
        command += [option, path] if path else []
    # Rows come from a file and complaints go to one: no pipe can fill while the other side waits.
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+", errors="replace") as complaints:
        given.writelines(f"{len(prompt)} {' '.join(map(str, (*prompt, *answer)))}\n" for prompt, answer in rows)
        given.seek(0)
        process = subprocess.Popen(
            tethered(command),
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=complaints,
            env=clean_environment(),
            text=True,
        )
        try:
            scores = [_score(line, gguf) for line in process.stdout or ()]
            code = process.wait()
        finally:
            stop(process)
        complaints.seek(0)
        if code:
            raise fault(f"cannot score with {gguf}", code, complaints.read())
    wanted = [(len(answer), len(answer) if compared else 0) for _, answer in rows]
    if [(len(item.logprobs), len(item.kl)) for item in scores] != wanted:
        raise ArtifactError(f"{programs().score} gave other scores than it was asked for")
    return scores


def reference_bytes(rows: Sequence[tuple[Sequence[int], Sequence[int]]], vocabulary: int) -> int:
    """How large the distributions are: 32 bits for every token of the vocabulary at every place of an answer."""
    return sum(len(answer) for _, answer in rows) * vocabulary * 4


def _score(line: str, gguf: Path) -> Score:
    try:
        values = json.loads(line)
    except ValueError:  # C++ writes nan and inf as JSON does not
        raise ArtifactError(f"{gguf} gives probabilities that are not finite") from None
    tops = tuple(tuple((int(id_), float(logprob)) for id_, logprob in place) for place in values["top"])
    same = tuple(bool(value) for value in values.get("same", ()))
    return Score(tuple(values["logprobs"]), tops, tuple(values.get("kl", ())), same)
