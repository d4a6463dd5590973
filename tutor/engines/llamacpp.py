"""The pinned llama.cpp's programs: convert, quantize, score, and a llama-server's lifetime.

In: model folders and GGUF files. Out: GGUF files, scores, answers of the `Engine` protocol.
Does not build llama.cpp (llamacpp_build.py), does not judge a GGUF (stages/convert.py), and imports no torch.
"""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tutor.artifacts import PARTIAL
from tutor.engines.answer import Answer, Finish, Generation
from tutor.engines.gguf_file import SAME_SPLIT, pre_tokenizer, read_gguf
from tutor.engines.llamacpp_build import SOURCE, VERSION, build_folder, is_built
from tutor.errors import ArtifactError, HostError, RecipeError, ServiceError, TutorError
from tutor.template import Message, render

__all__ = ["LlamaServer", "Programs", "Score", "pre_tokenizer", "programs", "quantize", "score", "serve", "to_gguf"]

logger = logging.getLogger(__name__)

LOAD_SECONDS = 900.0  # 16 GB from a slow disk
STOP_SECONDS = 5.0
POLL_SECONDS = 0.05
TIMEOUT = httpx2.Timeout(connect=5, read=900, write=60, pool=5)  # read: a long prompt on a slow processor
TOP_K = 40  # Ollama's default
Command = Sequence[str | Path | int]
FINISHES: dict[str, Finish] = {"eos": "stop", "word": "stop", "limit": "length"}
TETHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Asks the kernel for SIGKILL at its parent's end (PR_SET_PDEATHSIG), then becomes the program."""


@dataclass(frozen=True)
class Programs:
    """Where the pinned build lies."""

    folder: Path  # the converters, `conversion/` and gguf-py
    quantize: Path
    server: Path
    score: Path


def programs() -> Programs:
    """The programs of the pinned build. Raises HostError naming the command that builds them."""
    folder = build_folder()
    if not is_built(folder):
        raise HostError(
            f"llama.cpp is not built: {folder} is missing or not whole",
            "run: make llamacpp (or: python scripts/build_llamacpp.py), once, some minutes",
        )
    binaries = folder / "bin"
    return Programs(folder, binaries / "llama-quantize", binaries / "llama-server", binaries / "tutor-score")


def to_gguf(model: Path, target: Path, pre_tokenizer: str) -> None:
    """Write the F16 GGUF of a 16-bit Hugging Face folder, whole or not at all.

    `pre_tokenizer` is what the function of that name says. Raises ArtifactError with the converter's last line.
    """
    folder, names = programs().folder, ",".join((pre_tokenizer, *SAME_SPLIT.get(pre_tokenizer, ())))
    command: Command = [sys.executable, SOURCE / "convert.py", folder, model, _partial(target), names]
    code, output = _write(target, command, {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"})
    if "BPE pre-tokenizer was not recognized" in output and code:
        found = re.search(r"chkhsh:\s*([0-9a-f]{64})", output)
        raise ArtifactError(
            f"cannot convert {model}: its BPE pre-tokenizer was not recognized (chkhsh {found[1] if found else '?'}) "
            f"by the pinned llama.cpp (of llama_cpp_python {VERSION})",
            "tokenizer changed? compare tokenizer.json with the base's",
        )
    if code:
        raise _fault(f"cannot convert {model}", code, output, output.rpartition("\n")[2])


def quantize(source: Path, target: Path, kind: str, threads: int) -> None:
    """Quantize a 16- or 32-bit GGUF, whole or not at all.

    Raises RecipeError for an unknown kind or a source that is quantized already, ArtifactError where it fails.
    """
    import gguf

    kinds = {item.name.removeprefix("MOSTLY_"): item for item in gguf.LlamaFileType}
    if kind not in kinds:
        raise RecipeError(f"unknown quantization {kind!r}", "known: Q4_K_M, Q5_K_M, Q8_0 and llama.cpp's others")
    found = gguf.LlamaFileType(read_gguf(source).fields.get("general.file_type", kinds["GUESSED"]))
    if found not in (kinds["ALL_F32"], kinds["F16"], kinds["BF16"]):
        raise RecipeError(
            f"{source} is already quantized ({found.name.removeprefix('MOSTLY_')}), and quantizing again can fail",
            "it needs a model in FP16/FP32",
        )
    code, output = _write(target, [programs().quantize, source, _partial(target), kind, threads])
    if code:
        raise _fault(f"cannot quantize {source} to {kind}", code, output)


def _partial(target: Path) -> Path:
    return target.with_name(target.name + PARTIAL)


def _write(target: Path, command: Command, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run a program that writes the partial of `target`, which gets its name on exit code 0: code and output."""
    partial = _partial(target)
    try:
        done = subprocess.run(
            _tethered(command),
            env=_environment() | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        output = done.stdout.strip()
        if done.returncode == 0:
            if not partial.is_file():
                raise ArtifactError(f"{command[0]} wrote no {partial}")
            partial.replace(target)
        return done.returncode, output
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Score:
    """What a model makes of one given answer, token by token, in natural logarithms."""

    logprobs: tuple[float, ...]  # of the answer's ids
    top: tuple[tuple[tuple[int, float], ...], ...]  # at each place, the most probable ids, best first


def score(
    gguf: Path,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    threads: int,
    top: int = 1,
    lora: Path | None = None,
) -> list[Score]:
    """Teacher-forced scores of (prompt ids, answer ids) rows, in their order; one process for all of them.

    Raises ArtifactError when the model does not load, an id is outside its vocabulary, or a score is not finite.
    """
    if not rows:
        return []
    command: Command = [programs().score, gguf, threads, top, *([lora] if lora else [])]
    # Rows come from a file and complaints go to one: no pipe can fill while the other side waits.
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+", errors="replace") as complaints:
        given.writelines(f"{len(prompt)} {' '.join(map(str, (*prompt, *answer)))}\n" for prompt, answer in rows)
        given.seek(0)
        process = subprocess.Popen(
            _tethered(command), stdin=given, stdout=subprocess.PIPE, stderr=complaints, env=_environment(), text=True
        )
        try:
            scores = [_score(line, gguf) for line in process.stdout or ()]
            code = process.wait()
        finally:
            _stop(process)
        complaints.seek(0)
        if code:
            raise _fault(f"cannot score with {gguf}", code, complaints.read())
    if [len(item.logprobs) for item in scores] != [len(answer) for _, answer in rows]:
        raise ArtifactError(f"{programs().score} gave other scores than it was asked for")
    return scores


def _score(line: str, gguf: Path) -> Score:
    try:
        values = json.loads(line)
    except ValueError:  # C++ writes nan and inf as JSON does not
        raise ArtifactError(f"{gguf} gives probabilities that are not finite") from None
    tops = tuple(tuple((int(id_), float(logprob)) for id_, logprob in place) for place in values["top"])
    return Score(tuple(values["logprobs"]), tops)


@contextlib.contextmanager
def serve(
    gguf: Path, *, context: int, threads: int, lora: Path | None = None, log: Path, own_template: bool = False
) -> Iterator["LlamaServer"]:
    """A ready llama-server for exactly this file, stopped on the way out, whatever happens.

    `context` in tokens; `log` takes what the server says; `own_template` keeps the file's chat template, which only
    says how it would render a conversation. Raises ServiceError when it does not get ready.
    """
    command: Command = [programs().server, "-m", gguf, "-c", context, "-t", threads, "-tb", threads, "-np", 1]
    command = [*command, "--offline", "--no-webui", "--no-slots", "--fit", "off", "--cache-ram", 0]
    # Prompts come rendered: the file's own template stays out.
    template = ("--jinja",) if own_template else ("--no-jinja", "--chat-template", "chatml")
    command = [*command, *template, *(("--lora", lora) if lora else ())]
    with _socket_folder() as folder, log.open("wb") as output:
        socket = folder / "llama.sock"
        process = subprocess.Popen(
            _tethered([*command, "--host", socket]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,  # Ctrl-C at the terminal ends an answer, not the server
        )
        # A connection a request: the server closes kept ones when it likes, and the next request meets the closing.
        once = httpx2.Limits(max_keepalive_connections=0)
        transport = httpx2.HTTPTransport(uds=str(socket), trust_env=False, limits=once)
        try:
            with httpx2.Client(
                base_url="http://llama-server", transport=transport, timeout=TIMEOUT, trust_env=False
            ) as client:
                _wait_until_ready(client, process, gguf, log)
                yield LlamaServer(client, context, log)
        finally:
            _stop(process)


@contextlib.contextmanager
def _socket_folder() -> Iterator[Path]:
    """A folder that only this user can enter, with a path short enough for a Unix socket (108 bytes)."""
    usual = tempfile.gettempdir()
    short = usual if len(os.fsencode(usual)) < 70 else "/tmp"  # noqa: S108 (the folder's name is random, its mode 0700)
    with tempfile.TemporaryDirectory(prefix="tutor-", dir=short) as folder:
        yield Path(folder)


def _wait_until_ready(client: httpx2.Client, process: subprocess.Popen[bytes], gguf: Path, log: Path) -> None:
    started = time.monotonic()
    while time.monotonic() - started < LOAD_SECONDS:
        if process.poll() is not None:
            fault = _fault(f"llama-server cannot serve {gguf}", process.returncode, log.read_text("utf-8", "replace"))
            raise fault if isinstance(fault, HostError) else ServiceError(fault.message, f"all it said: {log}")
        with contextlib.suppress(httpx2.TransportError):  # no socket yet
            if client.get("/health").status_code == 200:
                logger.info("llama-server has loaded %s in %.1f s", gguf.name, time.monotonic() - started)
                return
        time.sleep(POLL_SECONDS)
    raise ServiceError(f"llama-server has not loaded {gguf} in {LOAD_SECONDS:.0f} s", f"what it said: {log}")


class LlamaServer:
    """An `Engine`: a running llama-server."""

    name = "llama.cpp"

    def __init__(self, client: httpx2.Client, context: int, log: Path) -> None:
        self._client = client
        self._context = context
        self._log = log

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """The answer to the last message. Raises ServiceError when the prompt is too long or the server fails."""
        request = _request(render(messages), generation, self._context)
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
        return Answer(
            text="".join(pieces),
            finish=finish,
            prompt_tokens=end["tokens_evaluated"],
            tokens=end["tokens_predicted"] - (end["stop_type"] == "eos"),
            seconds=time.monotonic() - started,
            tokens_per_second=end["timings"]["predicted_per_second"],
        )

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text as the server reads a prompt: special tokens in it, BOS where the model wants one."""
        answer = self.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})
        return [int(token) for token in answer["tokens"]]

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What the server answers to a request at once. Raises ServiceError where it is no JSON object, or an error."""
        try:
            response = self._client.post(path, json=body)
            value = response.json()
        except (httpx2.TransportError, ValueError) as error:
            raise self._failure(f"no answer from {path}: {error}") from error
        if response.status_code != 200 or not isinstance(value, dict):
            raise self._failure(_complaint(response.text))
        return value

    def _events(self, response: httpx2.Response) -> Iterator[dict[str, Any]]:
        if response.status_code != 200:
            response.read()
            raise self._failure(_complaint(response.text))
        for event in httpx2.EventSource(response):
            try:
                value = json.loads(event.data)
            except ValueError:
                raise self._failure(f"an event that is no JSON: {event.data[:80]}") from None
            if "error" in value:
                raise self._failure(_complaint(event.data))
            yield value

    def _failure(self, what: str) -> ServiceError:
        return ServiceError(f"llama-server: {what}", f"all it said: {self._log}")


def _request(prompt: str, generation: Generation, context: int) -> dict[str, Any]:
    """The body of POST /completion: every sampler is named, so that no default of the server or the file counts."""
    greedy = generation.temperature == 0
    return {
        "prompt": prompt,
        "stream": True,
        "n_predict": generation.max_new_tokens,
        "stop": list(generation.stops),
        "seed": generation.seed,
        "samplers": ["penalties", "temperature"] if greedy else ["penalties", "top_k", "top_p", "temperature"],
        "temperature": generation.temperature,
        "top_k": 0 if greedy else TOP_K,
        "top_p": generation.top_p,
        "repeat_penalty": generation.repetition_penalty,
        # transformers' penalty sees the whole sequence; this server refuses -1 for it.
        "repeat_last_n": context,
        # A prompt in other batches has other last bits, so an answer that must repeat starts afresh.
        "cache_prompt": not greedy,
    }


def _complaint(text: str) -> str:
    """The message of an error body, or its beginning."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _tethered(command: Command) -> list[str]:
    """The command, to be killed by the kernel when the thread that starts it ends, SIGKILL included (Linux)."""
    words = [str(word) for word in command]
    return [sys.executable, "-I", "-S", "-c", TETHER, str(os.getpid()), *words] if sys.platform == "linux" else words


def _environment() -> dict[str, str]:
    """Ours, without the variables by which llama.cpp takes options."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "AIP_", "NO_LOCAL_"))}


def _stop(process: subprocess.Popen[Any]) -> None:
    """SIGTERM, and after a grace SIGKILL; a second Ctrl-C while waiting kills at once."""
    process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    finally:
        process.kill()
        process.wait()


def _fault(what: str, code: int, output: str, line: str | None = None) -> TutorError:
    """The error of a program that ended with `code`: this machine's where that shows, else the file's."""
    if code == -signal.SIGILL:
        return HostError(f"{what}: this processor lacks instructions that the build uses", "run: make llamacpp, here")
    if code == -signal.SIGKILL:
        return HostError(f"{what}: it was killed, most likely for lack of memory")
    if re.search(r"No space left on device|iostream error|basic_ios::clear", output):
        return HostError(f"{what}: the disk is full")
    lines = [re.sub(r"^[\d.]+ \w +", "", item.strip()) for item in output.split("\n") if item.strip()]
    telling = [item for item in lines if re.search(r"\b(error|failed|invalid|cannot|couldn't|unknown)\b", item)]
    return ArtifactError(f"{what}: {line or next(iter(telling or lines[-1:]), f'exit code {code}')}")
