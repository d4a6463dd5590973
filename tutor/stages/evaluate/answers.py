"""Ask an engine every prompt, and keep each answer the moment it is there: a killed run goes on where it stopped.

In: what starts an engine, prompts, a journal's path and key. Out: a record a prompt (graders/verdict.py), the answers
as they came. Helper of the evaluate stage. Does not judge, and removes no journal.

Answers do not depend on how many are asked at a time where every worker has an engine of its own, as here. Measured
with the pinned llama.cpp: slots that share a server's batches change an answer's words (4 slots: 0 of 8 answers were
the same, greedily), threads and idle slots do not (8 of 8). So a llama-server has one slot, and is started more than
once. An Ollama with OLLAMA_NUM_PARALLEL above 1, which is not its default, batches on its own account.
"""

import contextlib
import json
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from tutor.artifacts.hashing import json_sha256
from tutor.engines.protocol import Engine, Generation
from tutor.errors import ServiceError
from tutor.graders.verdict import Record
from tutor.prompt import conversation

log = logging.getLogger(__name__)

TRIES = 2
"""How often a prompt is asked on which the engine dies; after that it has no answer."""
DEADLY = 3
"""So many prompts in a row that have no answer because the engine died end the run."""


class _StoppedError(Exception):
    """Raised in a worker's answer when another worker failed."""


@dataclass(frozen=True)
class Task:
    """Whom to ask, how, and where the answers are kept meanwhile."""

    name: str  # the model's, for the progress lines
    generation: Generation
    system: str
    journal: Path
    key: Mapping[str, Any]  # what else decides the answers: the model's file, the engine's version; JSON


@dataclass
class _Work:
    """What the workers share."""

    task: Task
    prompts: Sequence[Mapping[str, Any]]
    records: dict[int, Record]  # by the prompt's place
    waiting: deque[int]
    keep: Callable[[int, Record], None]
    deaths: Counter[int] = field(default_factory=Counter)
    lost: int = 0  # prompts in a row on which the engine died
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def heed(self, piece: str) -> None:
        """Called with every piece of an answer: the way out of a long one."""
        del piece
        if self.stopped.is_set():
            raise _StoppedError

    def take(self) -> int | None:
        """The next prompt's place; None when there is none left."""
        with self.lock:
            return self.waiting.popleft() if self.waiting and not self.stopped.is_set() else None

    def done(self, place: int, record: Record) -> None:
        """Keep an answer, or why there is none."""
        with self.lock:
            self.records[place] = record
            count = len(self.records)
            if "error" not in record:
                self.lost = 0
                self.keep(place, record)  # an error may not be one the next time
        extra = {"done": count, "total": len(self.prompts)}
        what = record.get("error") or f"{record['tokens']} tokens, {record['finish']}"
        log.info("%s %d/%d: %s", self.task.name, count, len(self.prompts), what, extra=extra)

    def died(self, place: int) -> None:
        """The engine died on a prompt: ask it again, or give it up. Raises ServiceError when too many are given up."""
        number = f"prompt {place + 1} of {len(self.prompts)}"
        with self.lock:
            self.deaths[place] += 1
            again = self.deaths[place] < TRIES
            if again:
                self.waiting.appendleft(place)
            else:
                self.lost += 1
            lost = self.lost
        log.warning("%s: the engine died at %s", self.task.name, number)
        if lost >= DEADLY:
            raise ServiceError(
                f"{self.task.name}: the engine died on {lost} prompts in a row, {TRIES} times each, the last time at "
                f"{number}",
                "memory may be short: try a smaller ollama.quantization or generate.context; the answers are kept",
            )
        if not again:
            self.done(place, {"error": f"the engine died on it {TRIES} times"})


def ask_all(
    start: Callable[[], AbstractContextManager[Engine]],
    prompts: Sequence[Mapping[str, Any]],
    task: Task,
    *,
    parallel: int = 1,
) -> list[Record]:
    """A record a prompt, in their order, by `parallel` engines at a time; a prompt that fails is a record with `error`.

    What the task's journal holds of the same task and prompts is not asked again. Raises ServiceError when an engine
    does not start, or dies on DEADLY prompts in a row.
    """
    questions = [prompt["instruction"] for prompt in prompts]
    key = {**task.key, "questions": questions, "system": task.system, **asdict(task.generation)}
    with _journal(task.journal, json_sha256(key)) as (known, keep):
        if known:
            log.info("%s: %d of %d answers are there from a run that was ended", task.name, len(known), len(prompts))
        waiting = deque(place for place in range(len(prompts)) if place not in known)
        work = _Work(task, prompts, dict(known), waiting, keep)
        if parallel < 2:
            _answer_waiting(start, work)
        else:
            _in_threads(start, work, min(parallel, max(1, len(waiting))))
        return [work.records[place] for place in range(len(prompts))]


def _in_threads(start: Callable[[], AbstractContextManager[Engine]], work: _Work, workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(_answer_waiting, start, work) for _ in range(workers)]
        try:
            for each in running:
                each.result()
        finally:  # Ctrl-C, too: leaving the block waits for the workers
            work.stopped.set()


def _answer_waiting(start: Callable[[], AbstractContextManager[Engine]], work: _Work) -> None:
    """Answer what is waiting with an engine of one's own, started again when it dies. Any error stops all workers."""
    try:
        while work.waiting and not work.stopped.is_set():
            with start() as engine:
                # The first request is slower, and tells a dead engine from a bad prompt.
                least = replace(work.task.generation, max_new_tokens=1)
                warm_up = partial(engine.answer, conversation("Hola"), least, work.heed)
                warm_up()
                while (place := work.take()) is not None:
                    if not _answered(engine, place, work, warm_up):
                        break
    except _StoppedError:
        return
    except BaseException:
        work.stopped.set()
        raise


def _answered(engine: Engine, place: int, work: _Work, warm_up: Callable[[], object]) -> bool:
    """Whether the engine still lives after this prompt."""
    prompt = work.prompts[place]["instruction"]
    try:
        answer = engine.answer(conversation(prompt, work.task.system), work.task.generation, work.heed)
    except ServiceError as error:
        try:
            warm_up()
        except ServiceError:
            work.died(place)
            return False
        log.warning("%s: no answer to %r: %s", work.task.name, prompt[:60], error)
        work.done(place, {"error": error.message})
        return True
    work.done(place, asdict(answer))
    return True


@contextlib.contextmanager
def _journal(path: Path, key: str) -> Iterator[tuple[dict[int, Record], Callable[[int, Record], None]]]:
    """The answers in a journal of this key, and what adds one to it, at once and for good."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known, size = _read_journal(path, key)
    with path.open("r+b" if size else "wb") as file:
        file.seek(size)
        file.truncate()  # a last line that was being written when the run was killed
        if not size:
            _append(file, {"key": key})
        yield known, lambda place, record: _append(file, {"place": place, "record": record})


def _read_journal(path: Path, key: str) -> tuple[dict[int, Record], int]:
    """The whole lines of a journal as answers by place, and their bytes; nothing of another key's."""
    known: dict[int, Record] = {}
    size = 0
    try:
        with path.open("rb") as file:
            for line in file:
                entry = json.loads(line) if line.endswith(b"\n") else {}
                if not size and entry.get("key") != key:
                    break
                if size:
                    known[int(entry["place"])] = dict(entry["record"])
                size += len(line)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # what is not whole is asked again
    return known, size


def _append(file: IO[bytes], entry: Mapping[str, Any]) -> None:
    file.write(json.dumps(entry, ensure_ascii=True).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
