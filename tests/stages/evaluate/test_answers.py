"""stages/evaluate/answers.py: engines that crash, several prompts at a time, journals of interrupted runs."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutor.engines.protocol import Answer, Engine, Generation
from tutor.errors import ServiceError
from tutor.prompt.messages import Message
from tutor.prompt.tutor_format import render
from tutor.stages.evaluate.answers import MAX_LOST, Task, answer_prompts

GREEDY = Generation(max_new_tokens=50, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=7)
PROMPTS = [{"instruction": f"¿Qué es {name}?"} for name in "abcdef"]


@dataclass
class Fake:
    """Engine that repeats its question. `faults`: errors by question.

    `crashes_on`: part of a question that crashes the engine. `crashed_from`: number of the request from which on every
    request fails. Engines that share `barrier` wait for each other in their first answers.
    """

    faults: dict[str, str] = field(default_factory=dict)
    crashes_on: str = ""
    crashed_from: int | None = None
    pause: float = 0.0
    barrier: threading.Barrier | None = None
    name: str = "fake"
    asked: list[tuple[str, Generation]] = field(default_factory=list)

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        question = messages[-1]["content"]
        self.asked.append((render(messages), generation))
        if self.barrier and len(self.asked) == 1:
            self.barrier.wait(30)
        for _ in range(3):
            time.sleep(self.pause / 3)
            if on_text:
                on_text("x")
        if self.crashes_on and self.crashes_on in question:
            self.crashed_from = 0
        if self.crashed_from is not None and len(self.asked) >= self.crashed_from:
            raise ServiceError("connection refused")
        if fault := self.faults.get(question):
            raise ServiceError(fault)
        return Answer(f" Sobre {question}", "eos", 12, 10, 0.5, 20.0)


class Servers:
    """Function that starts engines, in sequence or in parallel; `made`: the started engines."""

    def __init__(self, *engines: Fake, always: Fake | None = None) -> None:
        self.left = list(engines)
        self.always = always
        self.made: list[Fake] = []
        self.running = 0
        self.most = 0
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Engine]:
        with self.lock:
            if not self.left and self.always is None:
                raise ServiceError("no engine starts any more")
            self.made.append(self.left.pop(0) if self.left else replace(self.always or Fake(), asked=[]))
            engine = self.made[-1]
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            yield engine
        finally:
            with self.lock:
                self.running -= 1

    def questions(self) -> list[str]:
        """Return all questions except the warm-ups."""
        asked = [entry for engine in self.made for entry in engine.asked]
        return [prompt[13:23] for prompt, generation in asked if generation.max_new_tokens > 1]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task("tutor", GREEDY, "", tmp_path / "eval.journal" / "tutor.jsonl", {"model": "0" * 64})


def texts(records: Sequence[dict[str, Any]]) -> list[str]:
    return [record.get("text", record.get("error")) for record in records]


EXPECTED = [f" Sobre ¿Qué es {name}?" for name in "abcdef"]


def test_prompts_are_answered_once_in_order_after_a_warm_up(task: Task) -> None:
    servers = Servers(Fake())
    records = answer_prompts(servers, PROMPTS, replace(task, system="Eres un tutor."))
    assert texts(records) == EXPECTED
    asked = servers.made[0].asked
    assert asked[0][1].max_new_tokens == 1
    assert [prompt for prompt, _ in asked[1:]] == [
        f"Eres un tutor.\n\nInstrucción: {prompt['instruction']}\nRespuesta:" for prompt in PROMPTS
    ]
    assert {generation for _, generation in asked[1:]} == {GREEDY}


def test_failed_prompt_gives_an_error_record(task: Task) -> None:
    records = answer_prompts(Servers(Fake(faults={"¿Qué es b?": "too long"})), PROMPTS, task)
    assert records[1] == {"error": "too long"}
    assert texts(records) == [EXPECTED[0], "too long", *EXPECTED[2:]]


def test_crashed_engine_restarts_at_the_same_prompt(task: Task) -> None:
    servers = Servers(Fake(crashed_from=4), Fake())
    assert texts(answer_prompts(servers, PROMPTS, task)) == EXPECTED
    assert [prompt[13:23] for prompt, _ in servers.made[1].asked[1:]][:2] == ["¿Qué es c?", "¿Qué es d?"]


def test_prompt_that_crashes_every_engine_is_given_up(task: Task) -> None:
    servers = Servers(always=Fake(crashes_on="c"))
    records = answer_prompts(servers, PROMPTS, task)
    assert records[2] == {"error": "the engine crashed 2 times on this prompt"}
    assert [record for record in texts(records) if record in EXPECTED] == [*EXPECTED[:2], *EXPECTED[3:]]
    assert len(servers.made) == 3


def test_consecutive_crashes_end_the_run(task: Task) -> None:
    servers = Servers(always=Fake(crashes_on="¿"))
    with pytest.raises(ServiceError, match=f"crashed on {MAX_LOST} prompts in a row, 2 times each.*prompt 3 of 6"):
        answer_prompts(servers, PROMPTS, task)
    assert servers.running == 0


def test_engine_that_never_answers_ends_the_run(task: Task) -> None:
    servers = Servers(Fake(crashed_from=1))
    with pytest.raises(ServiceError, match="refused"):
        answer_prompts(servers, PROMPTS, task)
    assert len(servers.made) == 1


# Parallel engines


def test_parallel_engines_give_equal_answers_in_order(task: Task) -> None:
    servers = Servers(always=Fake(barrier=threading.Barrier(3)))
    assert texts(answer_prompts(servers, PROMPTS, task, parallel=3)) == EXPECTED
    assert servers.most == 3, "each with an engine of its own"
    assert sorted(servers.questions()) == [f"¿Qué es {name}?" for name in "abcdef"]


def test_number_of_engines_is_at_most_that_of_prompts(task: Task) -> None:
    servers = Servers(always=Fake())
    answer_prompts(servers, PROMPTS[:2], task, parallel=64)
    assert len(servers.made) <= 2


@dataclass
class Slow(Fake):
    """Engine whose answer takes a minute, in pieces, unless the engine is stopped."""

    stopped: bool = False

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        assert on_text
        assert self.barrier
        self.barrier.wait(30)
        try:
            for _ in range(6000):
                on_text("x")
                time.sleep(0.01)
        except Exception:
            self.stopped = True
            raise
        return super().answer(messages, generation, on_text)


def test_failed_worker_stops_the_answers_of_the_others(task: Task) -> None:
    barrier = threading.Barrier(3)
    servers = Servers(Fake(crashed_from=1, barrier=barrier), Slow(barrier=barrier), Slow(barrier=barrier))
    with pytest.raises(ServiceError, match="refused"):
        answer_prompts(servers, PROMPTS, task, parallel=3)
    assert [engine.stopped for engine in servers.made if isinstance(engine, Slow)] == [True, True]
    assert servers.running == 0


def test_parallel_engine_that_crashes_is_restarted(task: Task) -> None:
    servers = Servers(Fake(crashed_from=3), always=Fake(pause=0.01))
    assert texts(answer_prompts(servers, PROMPTS, task, parallel=2)) == EXPECTED


# Journals


class Killed(BaseException):
    """The end of the process, which no code handles."""


@dataclass
class Ending(Fake):
    """Engine that answers some prompts; then the process ends."""

    answers: int = 3

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        if generation.max_new_tokens > 1:
            self.answers -= 1
        if self.answers < 0:
            raise Killed
        return super().answer(messages, generation, on_text)


def ended(task: Task, answers: int = 3, **options: Any) -> None:
    with pytest.raises(Killed):
        answer_prompts(Servers(Ending(answers=answers, **options)), PROMPTS, task)


def test_killed_run_resumes_from_its_journal(task: Task, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "tutor")
    ended(task)
    servers = Servers(Fake())
    assert texts(answer_prompts(servers, PROMPTS, task)) == EXPECTED
    assert servers.questions() == ["¿Qué es d?", "¿Qué es e?", "¿Qué es f?"]
    assert "3 of 6 answers are in the journal" in caplog.text
    assert ("tutor 6/6: 10 tokens, eos", 6, 6) in [
        (record.getMessage(), getattr(record, "done", None), getattr(record, "total", None))
        for record in caplog.records
    ]


def test_complete_journal_starts_no_engine(task: Task) -> None:
    answer_prompts(Servers(Fake()), PROMPTS, task)
    assert texts(answer_prompts(Servers(), PROMPTS, task)) == EXPECTED


def test_failed_prompt_is_answered_again_in_the_next_run(task: Task) -> None:
    answer_prompts(Servers(Fake(faults={"¿Qué es b?": "busy"})), PROMPTS, task)
    servers = Servers(Fake())
    assert texts(answer_prompts(servers, PROMPTS, task)) == EXPECTED
    assert servers.questions() == ["¿Qué es b?"]


@pytest.mark.parametrize(
    "other",
    [
        {"key": {"model": "1" * 64}},
        {"generation": replace(GREEDY, seed=8)},
        {"generation": replace(GREEDY, max_new_tokens=51)},
        {"system": "Otro."},
    ],
)
def test_journal_of_other_settings_is_not_used(task: Task, other: dict[str, Any]) -> None:
    ended(task)
    servers = Servers(Fake())
    answer_prompts(servers, PROMPTS, replace(task, **other))
    assert len(servers.questions()) == 6


def test_journal_of_other_prompts_is_not_used(task: Task) -> None:
    ended(task)
    servers = Servers(Fake())
    assert texts(answer_prompts(servers, PROMPTS[1:], task)) == EXPECTED[1:]
    assert len(servers.questions()) == 5


@given(st.integers(0, 2000))
@settings(max_examples=60, deadline=None)
def test_journal_cut_anywhere_keeps_its_complete_lines(tmp_path_factory: pytest.TempPathFactory, kept: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "j.jsonl"
    task = Task("tutor", GREEDY, "", path, {})
    ended(task, answers=4)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    servers = Servers(Fake())
    assert texts(answer_prompts(servers, PROMPTS, task)) == EXPECTED
    assert len(servers.questions()) == 6 - max(0, whole[:kept].count(b"\n") - 1)
    assert json.loads(path.read_bytes().splitlines()[0]).keys() == {"key"}
    assert texts(answer_prompts(Servers(), PROMPTS, task)) == EXPECTED


@pytest.mark.parametrize("content", [b"", b"\n", b"[]\n", b"null\n", b"\xff\xfe\n", b'{"key": 1}\n{}\n', b"{\n"])
def test_file_that_is_no_journal_is_overwritten(task: Task, content: bytes) -> None:
    task.journal.parent.mkdir()
    task.journal.write_bytes(content)
    assert texts(answer_prompts(Servers(Fake()), PROMPTS, task)) == EXPECTED
    assert texts(answer_prompts(Servers(), PROMPTS, task)) == EXPECTED
