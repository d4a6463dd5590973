"""Run the Compose stack: its services one by one, each with its exit code and its log.

In: a recipe, `docker` on PATH. Out: images, the services' files below `build/<recipe>/`, one log a service in `logs/`
there, and an Ollama that serves the model. Runs no stage itself: every service is a `tutor` command.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tutor.engines.ollama.client import connect
from tutor.engines.ollama.health import gpu_notice
from tutor.errors import HostError, ServiceError, TutorError
from tutor.formats.visible import clean
from tutor.graders.labels import verdict_labels
from tutor.machine import container_host, preflight
from tutor.machine.container_host import Project
from tutor.pipeline.compose_command import Stack, hub_token, owner, prepare
from tutor.pipeline.logged_command import LogError, StackError, print_output, run_logged
from tutor.pipeline.recipe_folder import held, refuse_unreadable
from tutor.pipeline.runner import announced
from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

BUILT_SERVICES = ("trainer", "converter", "publisher", "ollama")
"""Services with an image of their own; fetcher, merger and reporter use the trainer's, evaluator the publisher's."""
SERVICES_BEFORE = ("fetcher", "trainer", "merger", "converter")
"""Services that run before the server, in their order."""
SERVER = "ollama"
"""Service of Ollama's server."""
SERVICES_AFTER = ("publisher", "evaluator", "reporter")
"""Services that run when the server is healthy, in their order."""
DESCRIPTIONS = {
    "build": "build the images, some minutes the first time",
    "fetcher": "check the rows, fetch the base",
    "trainer": "train the adapter",
    "merger": "merge the adapter into the base",
    "converter": "convert to GGUF, quantize, compare the engines' answers (the parity gate), score general texts",
    "ollama": "start Ollama",
    "publisher": "publish the model, check it, and serve it unless it is worse",
    "evaluator": "ask the published model and its untuned base the held-out prompts",
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
PRINTED_VERDICTS = ("passed", "language", "ended", "code_block")
"""Verdicts of the evaluator that the last lines print; eval-ollama/ has all of them."""
RUN_COMMAND = "exec ollama ollama run"
"""Arguments of `docker compose` that ask a published model, without the model's name."""
START_TIMEOUT = "180"
"""Maximum seconds until Ollama is healthy."""
STOP_TIMEOUT = "180"
"""Maximum seconds until a stopped service ends: training saves a checkpoint."""


def run_all(recipe: Recipe, build: Path, *, gpu: bool | None = None) -> dict[str, Any]:
    """Run every service that has work, from the images to the report; return their results and Ollama's address.

    Raises UnfitError with everything that this host lacks, StackError with the exit code of the service that failed.
    """
    with held(recipe, build):  # the services see another path of the recipe, and do not compare it
        pass
    daemon = container_host.daemon()
    if (uid := owner(daemon)[0]) not in (0, os.getuid()):
        refuse_unreadable(recipe, uid)
    project = container_host.project() if daemon.info else Project()
    stack = Stack(recipe.path, build, preflight.check_host(recipe, build, daemon, project, gpu=gpu), daemon)
    prepare(stack)
    if volumes := container_host.first_volumes(project):
        before = container_host.FIRST_PROJECT
        log.warning("%s is a new project; COMPOSE_PROJECT_NAME=%s uses %s", project.name, before, ", ".join(volumes))
    log.info("the log of every service: %s", stack.logs)
    _step(stack, "build", stack.command("--progress", "plain", "build", *BUILT_SERVICES))
    stack = replace(stack, images=find_images(stack, project))
    with hub_token(daemon) as token:
        results = {SERVICES_BEFORE[0]: run_service(stack, SERVICES_BEFORE[0], token)}
    results |= {name: run_service(stack, name) for name in SERVICES_BEFORE[1:]}
    start_server(stack)
    results[SERVICES_AFTER[0]] = run_service(stack, SERVICES_AFTER[0])
    _warn_of_cpu(stack, results[SERVICES_AFTER[0]])  # before hours of answers from it
    results |= {name: run_service(stack, name) for name in SERVICES_AFTER[1:]}
    ran = [name for name, result in results.items() if had_work(result)]
    page = Path(results[SERVICES_AFTER[2]].get("page", "")).parts[-2:]  # the container sees another path
    report = {"report": str(stack.folder.joinpath(*page))} if page else {}
    made = {"ran": ran, "gpu": stack.gpu, "project": project.name, "images": dict(stack.images)}
    return {**made, "host": address(stack), **report, "services": results}


def find_images(stack: Stack, project: Project) -> dict[str, str]:
    """Return each service's image and the one below it, with their digests or ids: a tag may move.

    BuildKit pulls an image without adding it to this host's list: its digest is then in the log of the build.
    """
    built = (stack.logs / "build.log").read_text("utf-8", "replace")
    below = {}
    for name in dict.fromkeys(project.bases.values()):
        pulled = re.search(rf"FROM \S*{re.escape(name)}@(sha256:[0-9a-f]{{64}})", built)
        below[name] = f"{name}@{pulled[1]}" if pulled else container_host.identified(name)
        if "@" not in name:
            log.info("%s is named by its tag only; now it is %s", name, below[name])
    found = {image: container_host.identified(image) for image in dict.fromkeys(project.images.values())}
    found |= {image: f"{found[image]}, from {below[name]}" for image, name in project.bases.items()}
    return {service: found[image] for service, image in project.images.items()}


def _warn_of_cpu(stack: Stack, published: Mapping[str, Any]) -> None:
    """Log a warning when the published model is not on this host's GPU, which the services cannot see."""
    if not stack.gpu or "model" not in published:
        return
    with contextlib.suppress(TutorError), connect(f"http://{address(stack)}") as server:
        if notice := gpu_notice(server, host_has_gpu=True, model=published["model"]):
            log.warning("%s", notice)


def had_work(result: dict[str, Any]) -> bool:
    """Whether a service had work, from its result; true where the result does not contain this."""
    return bool(result.get("ran", result.get("published", True)))


def run_service(stack: Stack, name: str, token: Path | None = None) -> dict[str, Any]:
    """Run a service to its end; return the JSON that it prints. Raises StackError with its exit code and last error."""
    # Not `up`: its exit code is 0 when a service fails.
    container = f"tutor-{name}-{os.getpid()}"
    shown = {"TUTOR_IMAGE": stack.images.get(name), "TUTOR_OLLAMA_IMAGE": stack.images.get(SERVER)}
    variables = [word for each, value in shown.items() if value for word in ("--env", f"{each}={value}")]
    options = ("run", "--rm", "--no-deps", "-T", "--name", container, *variables)
    command = stack.command("--progress", "quiet", *options, name)
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
    evaluated = result["services"][SERVICES_AFTER[1]]
    rates, labels = evaluated.get("all", {}), verdict_labels(evaluated.get("language"))
    shares = [f"{labels[name]} {100 * rates[name]['share']:.0f} %" for name in PRINTED_VERDICTS if name in rates]
    answers = [f"Answers to {rates['n']} held-out prompts: {', '.join(shares)}."] if shares else []
    found = [f"Report: {result['report']}"] if "report" in result else []
    return [
        *opening,
        f"{where}{'' if result['gpu'] else ', without a GPU'}.",
        *answers,
        *found,
        f"Next: docker compose {_named(result['project'])}{RUN_COMMAND} {model}",
    ]


def _named(project: str) -> str:
    """Return the option that names a project where only the environment of this process does."""
    return f"--project-name {shlex.quote(project)} " if os.environ.get("COMPOSE_PROJECT_NAME") else ""


def run_command(recipe: Recipe, build: Path, name: str) -> int:
    """Run one of COMMANDS on this terminal; return its exit code. Raises HostError where Docker cannot run it."""
    daemon = container_host.daemon()
    faults = container_host.docker_faults(daemon)
    if not faults:
        project = container_host.project()
        faults = container_host.project_faults(project) or (preflight.port_faults(project) if name == "up" else [])
    if faults:
        raise HostError(faults[0].what, faults[0].hint)
    stack = Stack(recipe.path, build, not preflight.gpu_faults(daemon), daemon)
    prepare(stack)
    command = stack.command(*COMMANDS[name])
    if name in INTERACTIVE:
        return subprocess.run(command, env=stack.environment(), stdout=None, check=False).returncode
    return print_output(command, stack.environment())


def _step(stack: Stack, name: str, command: Sequence[str], token: Path | None = None) -> str:
    """Run one command of the stack, announced and logged; return its stdout. Raises StackError when it fails."""
    with announced(name, DESCRIPTIONS[name]):
        return run_logged(name, command, stack.environment(token), stack.logs / f"{name}.log")
