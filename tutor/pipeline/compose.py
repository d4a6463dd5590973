"""Run the Compose stack: its services one by one, each with its exit code and its log.

In: a recipe, `docker` on PATH. Out: images, the services' files below `build/<recipe>/`, one log a service in `logs/`
there, and an Ollama that serves the model. Runs no stage itself: every service is a `tutor` command.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutor.artifacts.layout import BuildFolder
from tutor.errors import HostError, ServiceError
from tutor.formats.visible import clean
from tutor.graders.labels import LABELS
from tutor.machine import preflight
from tutor.pipeline.logged_command import LogError, StackError, print_output, run_logged
from tutor.pipeline.recipe_folder import held
from tutor.pipeline.runner import announced
from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
UID = 10001
"""Uid and gid of the images. Services use them when the caller is root, which no container may be."""
BUILT_SERVICES = ("trainer", "converter", "publisher", "ollama")
"""Services with an image of their own; merger and reporter use the trainer's, evaluator the publisher's."""
SERVICES_BEFORE = ("trainer", "merger", "converter")
"""Services that run before the server, in their order."""
SERVER = "ollama"
"""Service of Ollama's server."""
SERVICES_AFTER = ("publisher", "evaluator", "reporter")
"""Services that run when the server is healthy, in their order."""
DESCRIPTIONS = {
    "build": "build the images, some minutes the first time",
    "trainer": "check the rows, fetch the base, train the adapter",
    "merger": "merge the adapter into the base",
    "converter": "convert to GGUF, quantize, compare the engines' answers (the parity gate), render the Modelfile",
    "ollama": "start Ollama",
    "publisher": "publish the model, check it, and serve it unless it is worse",
    "evaluator": "evaluate the published model on the held-out prompts",
    "reporter": "write the report page and the model card",
}
"""Text of the log line that announces each step."""
COMMANDS = {
    "up": ("up", "--build", "--detach", "--wait", "--no-deps", SERVER),
    "down": ("--profile", "*", "down", "--remove-orphans"),
    "logs": ("logs", "--follow", "--tail", "100", SERVER),
    "shell": ("run", "--rm", "--no-deps", "trainer", "bash"),
}
"""Arguments of `docker compose` for the other commands of `tutor stack`."""
INTERACTIVE = ("up", "down", "shell")
"""Commands that get this terminal: Compose's own progress, or a shell."""
PRINTED_VERDICTS = ("passed", "spanish", "stopped", "code_block")
"""Verdicts of the evaluator that the last lines print; eval-ollama/ has all of them."""
RUN_COMMAND = "docker compose exec ollama ollama run"
"""Command that asks a published model, without the model's name."""
START_TIMEOUT = "180"
"""Maximum seconds until Ollama is healthy."""
STOP_TIMEOUT = "180"
"""Maximum seconds until a stopped service ends: training saves a checkpoint."""


@dataclass(frozen=True)
class Stack:
    """The containers of a recipe: the host folders that they see, and whether they use its GPU."""

    recipe: Path
    build: Path
    gpu: bool = False

    @property
    def folder(self) -> Path:
        """The folder that the services write."""
        return BuildFolder(self.build, self.recipe.stem).path

    @property
    def logs(self) -> Path:
        """The folder of the services' logs."""
        return BuildFolder(self.build, self.recipe.stem).service_logs

    def command(self, *arguments: str) -> list[str]:
        """Return a command line of `docker compose`. Raises HostError outside a checkout."""
        if not (ROOT / "compose.yaml").is_file():
            raise HostError(f"{ROOT} has no compose.yaml", "the stack needs a checkout: git clone, then make all")
        overlay = ["--file", str(ROOT / "docker" / "compose.gpu.yaml")] if self.gpu else []
        return ["docker", "compose", "--file", str(ROOT / "compose.yaml"), *overlay, *arguments]

    def environment(self, token: Path | None = None) -> dict[str, str]:
        """Return the variables that compose.yaml reads; the hub's token is in a file, never in a variable."""
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
    """Return the uid and gid of the services: the caller's, or for root those of the images."""
    return (os.getuid(), os.getgid()) if os.getuid() else (UID, UID)


def run_all(recipe: Recipe, build: Path, *, gpu: bool | None = None) -> dict[str, Any]:
    """Run every service that has work, from the images to the report; return their results and Ollama's address.

    Raises UnfitError with everything that this host lacks, StackError with the exit code of the service that failed.
    """
    with held(recipe, build):  # the services see another path of the recipe, and do not compare it
        pass
    stack = Stack(recipe.path, build, preflight.check_host(recipe, build, gpu=gpu))
    prepare(stack)
    log.info("the log of every service: %s", stack.logs)
    _step(stack, "build", stack.command("--progress", "plain", "build", *BUILT_SERVICES))
    with hub_token() as token:
        results = {name: run_service(stack, name, token) for name in SERVICES_BEFORE}
    start_server(stack)
    results |= {name: run_service(stack, name) for name in SERVICES_AFTER}
    ran = [name for name, result in results.items() if had_work(result)]
    page = Path(results[SERVICES_AFTER[2]].get("page", "")).parts[-2:]  # the container sees another path
    report = {"report": str(stack.folder.joinpath(*page))} if page else {}
    return {"ran": ran, "gpu": stack.gpu, "host": address(stack), **report, "services": results}


def had_work(result: dict[str, Any]) -> bool:
    """Whether a service had work, from its result; true where the result does not contain this."""
    return bool(result.get("ran", result.get("published", True)))


def prepare(stack: Stack) -> None:
    """Make the folders for the uid of the services. Raises HostError when they cannot be made."""
    try:
        stack.logs.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:
            for path in (stack.folder, *stack.folder.rglob("*")):
                os.chown(path, *owner(), follow_symlinks=False)
    except OSError as error:
        raise HostError(f"cannot prepare {stack.folder}: {error.strerror}", "give another --build") from None


@contextlib.contextmanager
def hub_token() -> Iterator[Path | None]:
    """HF_TOKEN as a file that only the services' user can read, removed at the end; None when it is not set."""
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
    """Run a service to its end; return the JSON that it prints. Raises StackError with its exit code and last error."""
    # Not `up`: its exit code is 0 when a service fails.
    container = f"tutor-{name}-{os.getpid()}"
    command = stack.command("--progress", "quiet", "run", "--rm", "--no-deps", "-T", "--name", container, name)
    with _stopped(container):
        text = _step(stack, name, command, token)
    try:
        result = json.loads(text)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise StackError(f"{name} ended with exit code 0 and printed no result", f"its log: {stack.logs / name}.log", 1)
    return result


@contextlib.contextmanager
def _stopped(container: str) -> Iterator[None]:
    """Stop the container when Ctrl-C, a signal or a full disk ends the block; Compose would leave it running."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, LogError):
        log.warning("stopping %s: this may take some minutes, because a training saves a checkpoint", container)
        for command in (("stop", "--time", STOP_TIMEOUT), ("rm", "--force")):
            subprocess.run(["docker", *command, container], capture_output=True, start_new_session=True, check=False)
        raise


def start_server(stack: Stack) -> None:
    """Start Ollama, wait until it is healthy. Raises ServiceError when it is not, HostError when its port is taken."""
    wait = ("--detach", "--wait", "--wait-timeout", START_TIMEOUT, "--no-deps")
    try:
        _step(stack, SERVER, stack.command("--progress", "plain", "up", *wait, SERVER))
    except StackError as error:
        path = stack.logs / f"{SERVER}.log"
        output = path.read_text("utf-8", "replace") if path.is_file() else ""
        if "port is already allocated" in output or "address already in use" in output:
            raise HostError("the port of Ollama is taken", "set TUTOR_OLLAMA_PORT to another") from error
        done = subprocess.run(
            stack.command("logs", "--no-color", "--tail", "200", SERVER),
            env=stack.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        with path.open("a", encoding="utf-8") as kept:
            kept.write(clean(done.stdout))
        raise ServiceError("Ollama does not become healthy", f"its log: {path}") from error


def address(stack: Stack) -> str:
    """Return the address and port of Ollama on this host."""
    done = subprocess.run(
        stack.command("port", SERVER, "11434"), env=stack.environment(), capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result of a run as lines for a terminal: the model, its rates, the report, the next step."""
    published = result["services"][SERVICES_AFTER[0]]
    model = published["model"]
    where = f"{model} is build {published['build']}, at http://{result['host']} in Ollama {published['version']}"
    opening = [] if result["ran"] else ["Nothing to do: every service is up to date."]
    rates = result["services"][SERVICES_AFTER[1]].get("all", {})
    shares = [f"{LABELS[name]} {100 * rates[name]['share']:.0f} %" for name in PRINTED_VERDICTS if name in rates]
    answers = [f"Answers to {rates['n']} held-out prompts: {', '.join(shares)}."] if shares else []
    found = [f"Report: {result['report']}"] if "report" in result else []
    return [
        *opening,
        f"{where}{'' if result['gpu'] else ', without a GPU'}.",
        *answers,
        *found,
        f"Next: {RUN_COMMAND} {model}",
    ]


def run_command(recipe: Recipe, build: Path, name: str) -> int:
    """Run one of COMMANDS on this terminal; return its exit code. Raises HostError without Docker."""
    if shutil.which("docker") is None:
        raise HostError("Docker is not installed (no `docker` on PATH)", "without it: make demo")
    stack = Stack(recipe.path, build, gpu=not preflight.gpu_faults(preflight.daemon()))
    prepare(stack)
    command = stack.command(*COMMANDS[name])
    if name in INTERACTIVE:
        return subprocess.run(command, env=stack.environment(), stdout=None, check=False).returncode
    return print_output(command, stack.environment())


def _step(stack: Stack, name: str, command: Sequence[str], token: Path | None = None) -> str:
    """Run one command of the stack, announced and logged; return its stdout. Raises StackError when it fails."""
    with announced(name, DESCRIPTIONS[name]):
        return run_logged(name, command, stack.environment(token), stack.logs / f"{name}.log")
