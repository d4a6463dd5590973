"""Start one llama-server, wait until it is healthy, generate, measure, stop it.

In: a GGUF file. Out: an `Engine`. Does not build llama.cpp (build.py) and imports no torch.
"""

import contextlib
import json
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tutor.engines.llamacpp.process import Command, clean_environment, killed_with_parent, program_error, programs, stop
from tutor.engines.protocol import Answer, Finish, Generation
from tutor.errors import HostError, ServiceError
from tutor.formats.child_process import running
from tutor.prompt.format import PromptFormat
from tutor.prompt.messages import Message
from tutor.prompt.tutor_format import TUTOR

logger = logging.getLogger(__name__)

LOAD_SECONDS = 900.0
"""Maximum seconds until the model is loaded: 16 GB from a slow disk."""
POLL_SECONDS = 0.05
"""Seconds between two health checks."""
TIMEOUT = httpx2.Timeout(connect=5, read=900, write=60, pool=5)
"""Seconds of a request; `read` allows a long prompt on a slow processor."""
FINISHES: dict[str, Finish] = {"eos": "eos", "word": "stop", "limit": "length"}
"""Finish reasons by llama-server's `stop_type`."""


@contextlib.contextmanager
def serve(
    gguf: Path,
    *,
    context: int,
    threads: int,
    log: Path,
    own_template: bool = False,
    prompt: PromptFormat = TUTOR,
) -> Iterator["LlamaServer"]:
    """A healthy llama-server for this file, stopped at the end in any case.

    `context` in tokens; `log` receives the server's output; `own_template` keeps the file's chat template, which is
    used by /apply-template only. Raises ServiceError when the server does not become healthy.
    """
    program = programs("llama-server").server
    command: Command = [program, "-m", gguf, "-c", context, "-t", threads, "-tb", threads, "-np", 1]
    command = [*command, "--offline", "--no-webui", "--no-slots", "--fit", "off", "--cache-ram", 0]
    # Requests have rendered prompts: the file's own template is not used.
    template = ("--jinja",) if own_template else ("--no-jinja", "--chat-template", "chatml")
    command = [*command, *template]
    with _socket_folder() as folder, log.open("wb") as output:
        socket = folder / "llama.sock"
        # One connection per request: the server closes idle ones at any time, also when the next request starts.
        limits = httpx2.Limits(max_keepalive_connections=0)
        transport = httpx2.HTTPTransport(uds=str(socket), trust_env=False, limits=limits)
        with (
            running(
                lambda: subprocess.Popen(
                    killed_with_parent([*command, "--host", socket]),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=clean_environment(),
                    start_new_session=True,  # Ctrl-C at the terminal stops an answer, not the server
                ),
                stop,
            ) as process,
            httpx2.Client(
                base_url="http://llama-server", transport=transport, timeout=TIMEOUT, trust_env=False
            ) as client,
        ):
            _wait_until_ready(client, process, gguf, log)
            yield LlamaServer(client, context, log, process.pid, prompt)


@contextlib.contextmanager
def _socket_folder() -> Iterator[Path]:
    """A folder for this user alone, with a path short enough for a Unix socket (108 bytes)."""
    default = tempfile.gettempdir()
    # /tmp is safe: the folder's name is random and its mode 0700.
    short = default if len(os.fsencode(default)) < 70 else "/tmp"  # noqa: S108
    with tempfile.TemporaryDirectory(prefix="tutor-", dir=short) as folder:
        yield Path(folder)


def _wait_until_ready(client: httpx2.Client, process: subprocess.Popen[bytes], gguf: Path, log: Path) -> None:
    started = time.monotonic()
    while time.monotonic() - started < LOAD_SECONDS:
        if process.poll() is not None:
            error = program_error(
                f"llama-server cannot serve {gguf}", process.returncode, log.read_text("utf-8", "replace")
            )
            raise error if isinstance(error, HostError) else ServiceError(error.message, f"its output: {log}")
        with contextlib.suppress(httpx2.TransportError):  # no socket yet
            if client.get("/health").status_code == 200:
                logger.info("llama-server has loaded %s in %.1f s", gguf.name, time.monotonic() - started)
                return
        time.sleep(POLL_SECONDS)
    raise ServiceError(f"llama-server has not loaded {gguf} in {LOAD_SECONDS:.0f} s", f"its output: {log}")


@dataclass(frozen=True)
class Speed:
    """Speeds of a server in tokens per second."""

    prompt: float
    generation: float


class LlamaServer:
    """An `Engine`: a running llama-server."""

    name = "llama.cpp"

    def __init__(self, client: httpx2.Client, context: int, log: Path, pid: int, prompt: PromptFormat = TUTOR) -> None:
        self._client = client
        self._context = context
        self._log = log
        self._pid = pid
        self._prompt = prompt

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """The answer to the last message. Raises ServiceError when the prompt is too long or the server fails."""
        request = _request(self._prompt.render(messages), generation, self._context)
        started = time.monotonic()
        pieces: list[str] = []
        end: dict[str, Any] = {}
        try:
            # Leaving this block by any exception closes the connection, which ends the generation too.
            with self._client.stream("POST", "/completion", json=request) as response:
                for event in self._events(response):
                    pieces.append(event["content"])
                    if on_text and event["content"]:
                        on_text(event["content"])
                    if event["stop"]:
                        end = event
        except httpx2.TransportError as error:
            raise self._failure(f"the connection broke: {error}") from error
        finish = FINISHES.get(end.get("stop_type", ""))
        if finish is None:
            raise self._failure("its stream ended without the final event")
        split = self._prompt.reply("".join(pieces))
        return Answer(
            text=split.answer,
            thought=split.thought,
            finish=finish,
            prompt_tokens=end["tokens_evaluated"],
            tokens=end["tokens_predicted"] - (finish == "eos"),
            seconds=time.monotonic() - started,
            tokens_per_second=end["timings"]["predicted_per_second"],
        )

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text as of a prompt: special tokens are parsed, BOS is added when the model has one."""
        answer = self.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return [int(token) for token in answer["tokens"]]

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that the server returns. Raises ServiceError for an error and for anything else."""
        try:
            response = self._client.post(path, json=body)
            value = response.json()
        except (httpx2.TransportError, ValueError) as error:
            raise self._failure(f"no answer from {path}: {error}") from error
        if response.status_code != 200 or not isinstance(value, dict):
            raise self._failure(_error_message(response.text))
        return value

    def speed(self, ids: Sequence[int], tokens: int) -> "Speed":
        """Measure the speed for a prompt of these ids and a generation of `tokens` tokens."""
        request = {"prompt": list(ids), "n_predict": tokens, "ignore_eos": True, "cache_prompt": False, "top_k": 1}
        try:
            response = self._client.post("/completion", json=request)
            timings = response.json()["timings"]
            return Speed(float(timings["prompt_per_second"]), float(timings["predicted_per_second"]))
        except (httpx2.TransportError, ValueError, KeyError, TypeError) as error:
            raise self._failure(f"no speed: {error}") from error

    def peak_memory(self) -> int | None:
        """Peak memory of the server in bytes, with the pages of its file; None when unknown."""
        try:
            status = Path(f"/proc/{self._pid}/status").read_text("utf-8")
        except OSError:
            return None
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else None

    def _events(self, response: httpx2.Response) -> Iterator[dict[str, Any]]:
        if response.status_code != 200:
            response.read()
            raise self._failure(_error_message(response.text))
        for event in httpx2.EventSource(response):
            try:
                value = json.loads(event.data)
            except ValueError:
                raise self._failure(f"an event that is no JSON: {event.data[:80]}") from None
            if "error" in value:
                raise self._failure(_error_message(event.data))
            yield value

    def _failure(self, what: str) -> ServiceError:
        return ServiceError(f"llama-server: {what}", f"its output: {self._log}")


def _request(prompt: str, generation: Generation, context: int) -> dict[str, Any]:
    """The body of POST /completion. It names every sampler, so that no default of the server or the file applies."""
    greedy = generation.temperature == 0
    return {
        "prompt": prompt,
        "stream": True,
        "n_predict": generation.max_new_tokens,
        "stop": list(generation.stops),
        "seed": generation.seed,
        "samplers": ["penalties", "temperature"] if greedy else ["penalties", "top_k", "top_p", "temperature"],
        "temperature": generation.temperature,
        "top_k": 0 if greedy else generation.top_k,
        "top_p": generation.top_p,
        "repeat_penalty": generation.repetition_penalty,
        # The penalty of transformers covers the full sequence; this server refuses -1 for that.
        "repeat_last_n": context,
        # A prompt in other batches rounds differently, so an answer that must repeat starts without a cache.
        "cache_prompt": not (greedy or generation.repeatable),
    }


def _error_message(text: str) -> str:
    """The message in an error body, else the beginning of the body."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
