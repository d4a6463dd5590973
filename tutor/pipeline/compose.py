"""The Compose stack: its services one by one, each with its exit code and its log.

In: a recipe, `docker` on PATH. Out: images, what the services write under `build/<recipe>/`, a log a service in
`logs/` there, and an Ollama that serves the model. Does no stage's work: every service is a `tutor` command.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tutor.artifacts.layout import BuildFolder
from tutor.errors import HostError, ServiceError, TutorError
from tutor.machine import preflight
from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
UID = 10001
"""The images' own user. The services have it where the caller is root, which no container may be."""
BUILT = ("trainer", "converter", "publisher", "ollama")  # merger, reporter: the trainer's image; evaluator: publisher's
BEFORE, SERVER, AFTER = ("trainer", "merger", "converter"), "ollama", ("publisher", "evaluator", "reporter")
ABOUT = {
    "build": "build the images, some minutes the first time",
    "trainer": "check the rows, fetch the base, train the adapter",
    "merger": "merge the adapter into the base",
    "converter": "convert to GGUF, quantize, compare the engines (the parity gate), render the Modelfile",
    "ollama": "start Ollama",
    "publisher": "publish the model, prove it, and serve it where it is no worse",
    "evaluator": "ask the published model the held-out prompts",
    "reporter": "write the page and the model card",
}
COMMANDS = {
    "up": ("up", "--build", "--detach", "--wait", "--no-deps", SERVER),
    "down": ("--profile", "*", "down", "--remove-orphans"),
    "logs": ("logs", "--follow", "--tail", "100", SERVER),
    "shell": ("run", "--rm", "--no-deps", "trainer", "bash"),
}
"""What people do with the containers beside running the whole stack: `docker compose` with our files and variables."""
SHARES = {
    "passed": "with all that was asked",
    "spanish": "answered in Spanish",
    "stopped": "ended by themselves",
    "code_block": "with a code block",
}
"""Of the evaluator's verdicts, what the end says; its JSON and eval-ollama/ have the rest."""
RUN = "docker compose exec ollama ollama run"
STARTING = "180"  # seconds until Ollama must be healthy
STOPPING = "180"  # seconds for a service that is told to end: training saves a checkpoint
LAST = 40  # lines of a failed service that are looked through for its error


class StackError(TutorError):
    """A service that failed, with its own exit code."""

    def __init__(self, message: str, hint: str, code: int) -> None:
        super().__init__(message, hint)
        self.code = code


@dataclass(frozen=True)
class Stack:
    """A recipe's containers: which of the host's files they see, and whether they have its GPU."""

    recipe: Path
    build: Path
    gpu: bool = False

    @property
    def folder(self) -> Path:
        """Where the services write."""
        return BuildFolder(self.build, self.recipe.stem).path

    @property
    def logs(self) -> Path:
        """Where their logs are."""
        return BuildFolder(self.build, self.recipe.stem).service_logs

    def command(self, *arguments: str) -> list[str]:
        """A command line of `docker compose`. Raises HostError outside a checkout."""
        if not (ROOT / "compose.yaml").is_file():
            raise HostError(f"{ROOT} has no compose.yaml", "the stack needs a checkout: git clone, then make all")
        overlay = ["--file", str(ROOT / "docker" / "compose.gpu.yaml")] if self.gpu else []
        return ["docker", "compose", "--file", str(ROOT / "compose.yaml"), *overlay, *arguments]

    def environment(self, token: Path | None = None) -> dict[str, str]:
        """What compose.yaml asks the environment for. The hub's token is in a file, never in a container's variable."""
        uid, gid = owner()
        values = {
            "TUTOR_UID": str(uid),
            "TUTOR_GID": str(gid),
            "TUTOR_DATA": str(self.recipe.parent),
            "TUTOR_BUILD": str(self.build.resolve()),
            "TUTOR_RECIPE": f"data/{self.recipe.name}",
            **({"HF_TOKEN_FILE": str(token)} if token else {}),
        }
        return {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | values


def owner() -> tuple[int, int]:
    """The uid and gid that the services have: the caller's, and the images' own where the caller is root."""
    return (os.getuid(), os.getgid()) if os.getuid() else (UID, UID)


def run_all(recipe: Recipe, build: Path, *, gpu: bool | None = None) -> dict[str, Any]:
    """Do what is not done yet, from the images to the report; what each service says, and where Ollama is.

    Raises UnfitError with all that this host lacks, StackError with the exit code of the service that failed.
    """
    stack = Stack(recipe.path, build, preflight.check_host(recipe, build, gpu=gpu))
    prepare(stack)
    log.info("the log of every service: %s", stack.logs)
    _step(stack, "build", stack.command("--progress", "plain", "build", *BUILT))
    with hub_token() as token:
        results = {name: run_service(stack, name, token) for name in BEFORE}
    start_server(stack)
    results |= {name: run_service(stack, name) for name in AFTER}
    ran = [name for name, result in results.items() if did_something(result)]
    page = Path(results[AFTER[2]].get("page", "")).parts[-2:]  # as the container sees it
    report = {"report": str(stack.folder.joinpath(*page))} if page else {}
    return {"ran": ran, "gpu": stack.gpu, "host": address(stack), **report, "services": results}


def did_something(result: dict[str, Any]) -> bool:
    """Whether a service worked, by its own result; one that does not say so did."""
    return bool(result.get("ran", result.get("published", True)))


def prepare(stack: Stack) -> None:
    """Make the folders, for the uid that the services have. Raises HostError when they cannot be made."""
    try:
        stack.logs.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:
            for path in (stack.folder, *stack.folder.rglob("*")):
                os.chown(path, *owner(), follow_symlinks=False)
    except OSError as error:
        raise HostError(f"cannot prepare {stack.folder}: {error.strerror}", "give another --build") from None


@contextlib.contextmanager
def hub_token() -> Iterator[Path | None]:
    """HF_TOKEN as a file that only the services' user can read, while they may need it; None where it is not set."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="tutor-") as folder:
        path = Path(folder) / "hf_token"
        path.touch(0o600)
        path.write_text(token, "utf-8")
        if os.getuid() == 0:
            os.chown(path, *owner())
        yield path


def run_service(stack: Stack, name: str, token: Path | None = None) -> dict[str, Any]:
    """Run a service to its end; the JSON that it prints. Raises StackError with its exit code and its last error."""
    # Not `up`, whose exit code is 0 when a service that should end well does not.
    container = f"tutor-{name}-{os.getpid()}"
    command = stack.command("--progress", "quiet", "run", "--rm", "--no-deps", "-T", "--name", container, name)
    with _stopped(container):
        text = _step(stack, name, command, token)
    try:
        result = json.loads(text)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise StackError(f"{name} ended well and gave no result", f"its log: {stack.logs / name}.log", 1)
    return result


@contextlib.contextmanager
def _stopped(container: str) -> Iterator[None]:
    """Leaving by Ctrl-C or SIGTERM ends the container too, in its own way: Compose would leave it running."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        log.warning("stopping %s, which may take a while: it may save what it has", container)
        for command in (("stop", "--time", STOPPING), ("rm", "--force")):
            subprocess.run(["docker", *command, container], capture_output=True, start_new_session=True, check=False)
        raise


def start_server(stack: Stack) -> None:
    """Have Ollama running and healthy. Raises ServiceError when it is not, HostError when its port is taken."""
    wait = ("--detach", "--wait", "--wait-timeout", STARTING, "--no-deps")
    try:
        _step(stack, SERVER, stack.command("--progress", "plain", "up", *wait, SERVER))
    except StackError as error:
        path = stack.logs / f"{SERVER}.log"
        said = path.read_text("utf-8", "replace")
        if "port is already allocated" in said or "address already in use" in said:
            raise HostError("the port of Ollama is taken", "set TUTOR_OLLAMA_PORT to another") from error
        with path.open("ab") as kept:
            logs = stack.command("logs", "--no-color", "--tail", "200", SERVER)
            subprocess.run(logs, env=stack.environment(), stdout=kept, stderr=kept, check=False)
        raise ServiceError("Ollama does not become healthy", f"its log: {path}") from error


def address(stack: Stack) -> str:
    """Where Ollama answers on this host: its address and port."""
    done = subprocess.run(
        stack.command("port", SERVER, "11434"), env=stack.environment(), capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def lines(result: Mapping[str, Any]) -> list[str]:
    """What the whole run came to, for a terminal: what it did, where the model is, what to do next."""
    published = result["services"][AFTER[0]]
    model = published["model"]
    where = f"{model} is build {published['build']}, at http://{result['host']} in Ollama {published['version']}"
    opening = [] if result["ran"] else ["Nothing to do: every service is up to date."]
    rates = result["services"][AFTER[1]].get("all", {})
    shares = [f"{100 * rates[name]['share']:.0f} % {words}" for name, words in SHARES.items() if name in rates]
    answers = [f"Of {rates['n']} held-out prompts: {', '.join(shares)}."] if shares else []
    found = [f"All that was found out: {result['report']}"] if "report" in result else []
    return [*opening, f"{where}{'' if result['gpu'] else ', without a GPU'}.", *answers, *found, f"Next: {RUN} {model}"]


def call(recipe: Recipe, build: Path, name: str) -> int:
    """Run one of COMMANDS with the terminal as its own; its exit code. Raises HostError without Docker."""
    if shutil.which("docker") is None:
        raise HostError("Docker is not installed (no `docker` on PATH)", "without it: make demo")
    stack = Stack(recipe.path, build, gpu=not preflight.gpu_faults(preflight.daemon()))
    prepare(stack)
    return subprocess.run(stack.command(*COMMANDS[name]), env=stack.environment(), check=False).returncode


def _step(stack: Stack, name: str, command: Sequence[str], token: Path | None = None) -> str:
    """Run one command, its lines to the log and to its file; its stdout. Raises StackError when it fails."""
    log.info("%s: %s", name, ABOUT[name], extra={"stage": name})
    path = stack.logs / f"{name}.log"
    with path.open("w", encoding="utf-8") as kept, tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        code, last = _followed(command, stack.environment(token), kept, out)
        out.seek(0)
        text = out.read()
        kept.write(text)
    if code:
        raise _failure(name, code, last, path)
    log.info("%s: done", name, extra={"stage_done": name})
    return text


def _followed(
    command: Sequence[str], environment: dict[str, str], kept: IO[str], out: IO[str]
) -> tuple[int, list[str]]:
    """Run a command, its stderr line by line to the log and to `kept`, its stdout to `out`: code and last lines."""
    last: deque[str] = deque(maxlen=LAST)
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C at the terminal is ours to pass on
    )
    assert process.stderr is not None
    try:
        for line in process.stderr:
            kept.write(line)
            kept.flush()
            last.append(line.rstrip())
            log.info("%s", line.rstrip())
        return process.wait(), list(last)
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
        process.stderr.close()


def _failure(name: str, code: int, last: Sequence[str], path: Path) -> TutorError:
    """What a service's exit code and last lines mean."""
    hint = f"its log: {path}"
    lines = [line for line in last if line.strip()]
    said = next((line for line in reversed(lines) if line.lower().startswith("error")), lines[-1] if lines else "")
    if "could not select device driver" in said:
        return HostError(f"{name}: Docker cannot hand over the GPU", "install the NVIDIA Container Toolkit")
    if code == 125 or name == "build":
        return HostError(f"{name}: {said or 'Docker failed'}", hint)
    if code == 137:
        said = said or "killed: out of memory?"
    said = said.removeprefix("Error: ")
    return StackError(f"{name} ended with exit code {code}{f': {said}' if said else ''}", hint, code)
