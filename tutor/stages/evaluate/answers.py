"""Generate the answers to all prompts, with a journal from which a killed run resumes.

In: a function that starts an engine, prompts, a journal's path and key. Out: a record a prompt (graders/verdict.py)
with the unchanged answer. Grades no answer, and removes no journal.

Every worker has an engine of its own, so that answers do not depend on the number of workers. Measured with the pinned
llama.cpp: slots that share a server's batches change an answer's words (4 slots: 0 of 8 greedy answers were equal),
threads and idle slots do not (8 of 8). So a llama-server has one slot, and several servers are started. An Ollama with
OLLAMA_NUM_PARALLEL above 1, which is not its default, does batch requests.
"""

import contextlib
import json
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from tutor.artifacts.disk import sync_file
from tutor.artifacts.hashing import json_sha256
from tutor.engines.protocol import Engine, Generation
from tutor.errors import ServiceError
from tutor.graders.verdict import Record
from tutor.prompt.format import PromptFormat, asked_messages
from tutor.prompt.messages import conversation, row_messages, with_line
from tutor.prompt.tutor_format import TUTOR

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""Maximum attempts for a prompt on which the engine crashes."""
MAX_LOST = 3
"""Number of consecutive prompts lost to crashes of the engine that ends the run."""


class _StoppedError(Exception):
    """Interrupts a worker's answer after another worker failed."""


@dataclass(frozen=True)
class Task:
    """One model's answers: how to generate them, and the journal that keeps them until the run is complete."""

    name: str  # the model's, for the log
    generation: Generation
    system: str
    journal: Path
    key: Mapping[str, Any]  # what else the answers depend on: the model's file, the engine's version; JSON values
    prompt: PromptFormat = TUTOR
    line: str = ""  # last paragraph of every question


@dataclass
class _Work:
    """State that all workers share."""

    task: Task
    prompts: Sequence[Mapping[str, Any]]
    records: dict[int, Record]  # by the prompt's place
    waiting: deque[int]
    append: Callable[[int, Record], None]  # to the journal
    crashes: Counter[int] = field(default_factory=Counter)  # by the prompt's place
    lost: int = 0  # consecutive prompts lost to crashes
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stop_if_failed(self, piece: str) -> None:
        """Raise _StoppedError when another worker failed; engines call this with every piece of an answer."""
        del piece
        if self.stopped.is_set():
            raise _StoppedError

    def next_place(self) -> int | None:
        """Return the next prompt's place; None when no prompt is left."""
        with self.lock:
            return self.waiting.popleft() if self.waiting and not self.stopped.is_set() else None

    def keep(self, place: int, record: Record) -> None:
        """Store an answer, or the error in its place."""
        with self.lock:
            self.records[place] = record
            count = len(self.records)
            if "error" not in record:
                self.lost = 0
                self.append(place, record)  # not an error: the next run tries that prompt again
        extra = {"done": count, "total": len(self.prompts)}
        what = record.get("error") or f"{record['tokens']} tokens, {record['finish']}"
        log.info("%s %d/%d: %s", self.task.name, count, len(self.prompts), what, extra=extra)

    def crashed(self, place: int) -> None:
        """Queue a prompt again on which the engine crashed, or give the prompt up.

        Raises ServiceError when MAX_LOST consecutive prompts are given up.
        """
        number = f"prompt {place + 1} of {len(self.prompts)}"
        with self.lock:
            self.crashes[place] += 1
            again = self.crashes[place] < MAX_ATTEMPTS
            if again:
                self.waiting.appendleft(place)
            else:
                self.lost += 1
            lost = self.lost
        log.warning("%s: the engine crashed at %s", self.task.name, number)
        if lost >= MAX_LOST:
            raise ServiceError(
                f"{self.task.name}: the engine crashed on {lost} prompts in a row, {MAX_ATTEMPTS} times each, "
                f"the last time at {number}",
                "memory may be short: try a smaller ollama.quantization or generate.context; the answers are kept",
            )
        if not again:
            self.keep(place, {"error": f"the engine crashed {MAX_ATTEMPTS} times on this prompt"})


def answer_prompts(
    start: Callable[[], AbstractContextManager[Engine]],
    prompts: Sequence[Mapping[str, Any]],
    task: Task,
    *,
    parallel: int = 1,
) -> list[Record]:
    """Return a record a prompt, in their order, from `parallel` engines at a time; a failed prompt's has `error`.

    Answers of this task and these prompts that the journal holds are not generated again. Raises ServiceError when an
    engine does not start, or crashes on MAX_LOST consecutive prompts.
    """
    questions = [row_messages(prompt, "") for prompt in prompts]
    key = {**task.key, "questions": questions, "system": task.system, "line": task.line, **asdict(task.generation)}
    with _journal(task.journal, json_sha256(key)) as (known, append):
        if known:
            log.info(
                "%s: %d of %d answers are in the journal of an interrupted run", task.name, len(known), len(prompts)
            )
        waiting = deque(place for place in range(len(prompts)) if place not in known)
        work = _Work(task, prompts, dict(known), waiting, append)
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
        finally:  # also after Ctrl-C: leaving the block waits for the workers
            work.stopped.set()


def _answer_waiting(start: Callable[[], AbstractContextManager[Engine]], work: _Work) -> None:
    """Answer waiting prompts with this worker's engine, restarted after a crash. Any error stops all workers."""
    try:
        while work.waiting and not work.stopped.is_set():
            with start() as engine:
                # Warms the engine up; repeated after an error, it distinguishes a crashed engine from a bad prompt.
                one_token = replace(work.task.generation, max_new_tokens=1)
                warm_up = partial(engine.answer, conversation("Hola"), one_token, work.stop_if_failed)
                warm_up()
                while (place := work.next_place()) is not None:
                    if not _answered(engine, place, work, warm_up):
                        break
    except _StoppedError:
        return
    except BaseException:
        work.stopped.set()
        raise


def _answered(engine: Engine, place: int, work: _Work, warm_up: Callable[[], object]) -> bool:
    """Answer one prompt; return whether the engine still runs."""
    prompt = work.prompts[place]["instruction"]
    try:
        messages = asked_messages(work.task.prompt, work.prompts[place], work.task.system)
        answer = engine.answer(with_line(messages, work.task.line), work.task.generation, work.stop_if_failed)
    except ServiceError as error:
        try:
            warm_up()
        except ServiceError:
            work.crashed(place)
            return False
        log.warning("%s: no answer to %r: %s", work.task.name, prompt[:60], error)
        work.keep(place, {"error": error.message})
        return True
    work.keep(place, asdict(answer))
    return True


@contextlib.contextmanager
def _journal(path: Path, key: str) -> Iterator[tuple[dict[int, Record], Callable[[int, Record], None]]]:
    """Yield the answers in a journal of this key, and the function that appends an answer durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known, size = _read_journal(path, key)
    with path.open("r+b" if size else "wb") as file:
        file.seek(size)
        file.truncate()  # an incomplete last line of a killed run
        if not size:
            _append(file, {"key": key})
        yield known, lambda place, record: _append(file, {"place": place, "record": record})


def _read_journal(path: Path, key: str) -> tuple[dict[int, Record], int]:
    """Return a journal's complete lines as answers by place, and their bytes; none of a journal with another key."""
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
        pass  # the prompts of incomplete lines are answered again
    return known, size


def _append(file: IO[bytes], entry: Mapping[str, Any]) -> None:
    file.write(json.dumps(entry, ensure_ascii=True).encode() + b"\n")
    sync_file(file)
