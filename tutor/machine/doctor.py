"""The report of `tutor doctor`: this machine's hardware and programs, and the forecast of a recipe on it.

In: host.py, the programs on PATH, installed packages, an optional recipe. Out: checks, each with the next step, and the
recipe's forecast by part and stage (capacity.py). Starts nothing, downloads nothing and needs no torch.
"""

import importlib.metadata
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tutor.artifacts.provenance import installed_version
from tutor.engines.llamacpp import build as llamacpp_build
from tutor.engines.llamacpp.source_build import find_compiler
from tutor.engines.ollama.health import server_states
from tutor.errors import HostError, RecipeError
from tutor.graders.typescript import install as typescript_install
from tutor.machine import capacity, container_host, device, host, preflight
from tutor.machine.host import dotted
from tutor.machine.memory.estimate import gb
from tutor.recipe.settings import Recipe

CheckState = Literal["ok", "warning", "missing"]

RUN = "tutor run"
"""Command that requires the checks of stages in this environment."""
DEMO = "make demo"
"""Command that installs what the stages need, and trains a small model on the CPU."""
INSTALLS = f"installs what {RUN} needs, and uses neither Docker nor a GPU"
"""What that command does where packages or llama.cpp are missing."""
STACK = "make all"
"""Command that requires the checks of containers."""
SERVE = "tutor publish"
"""Command that requires the checks of Ollama."""
ANSWER_TIMEOUT = 2.0
"""Maximum seconds of Ollama's answer to the version request."""

KNOWN_BAD = (
    ("transformers", (5, 0), (5, 22, 2), "drops every blank of an R1-Distill-Llama text"),
    ("torch", (0,), (2, 10), "can run code of a checkpoint it loads (CVE-2026-24747)"),
    ("jinja2", (0,), (3, 1, 6), "lets a template escape from its sandbox"),
)
"""Package, first faulty and first good version, the fault (docs/facts.md, 8)."""


@dataclass(frozen=True)
class HostCheck:
    """One requirement, and whether this machine meets it."""

    what: str
    state: CheckState
    found: str
    hint: str = ""  # the next step where it is not ok
    needed_by: str = RUN  # the command that cannot run without it


@dataclass(frozen=True)
class HostReport:
    """All checks; with a recipe its forecast, and the reason why it cannot run here."""

    checks: tuple[HostCheck, ...]
    recipe: Mapping[str, Any] | None
    refusal: HostError | RecipeError | None

    @property
    def missing_by_command(self) -> dict[str, list[str]]:
        """Missing requirements of each way to train: the stages in this environment, and the containers."""
        lacks = [(check.needed_by, check.what) for check in self.checks if check.state == "missing"]
        return {way: list(dict.fromkeys(what for by, what in lacks if by == way)) for way in (RUN, STACK)}

    @property
    def conclusions(self) -> dict[str, str]:
        """What each way to train still needs here, by its command; nothing for a recipe that cannot run here."""
        if self.refusal is not None:
            return {}
        needs = {way: f"needs {', '.join(lacks)}" for way, lacks in self.missing_by_command.items() if lacks}
        demo = {DEMO: INSTALLS} if RUN in needs and self._installable else {}
        return {**demo, **{way: needs.get(way, "lacks nothing") for way in (RUN, STACK)}}

    @property
    def _installable(self) -> bool:
        """Whether everything that the stages lack is a package or program that `make` installs."""
        lacks = [check for check in self.checks if (check.state, check.needed_by) == ("missing", RUN)]
        return all(check.hint.startswith("make ") for check in lacks)

    @property
    def fault(self) -> HostError | RecipeError | None:
        """The reason why no way to train works here; None where one works."""
        if self.refusal is not None or not all(self.missing_by_command.values()):
            return self.refusal
        needs = "; ".join(f"{way} needs {', '.join(what)}" for way, what in self.missing_by_command.items())
        if self._installable:
            return HostError(needs, f"{DEMO} {INSTALLS}")
        return HostError(needs, "follow the hints in the list above")

    def as_dict(self) -> dict[str, Any]:
        """The report as a JSON object."""
        fault = self.fault
        return {
            "ok": fault is None,
            "error": fault.message if fault else None,
            "hint": fault.hint if fault else None,
            "lacks": self.missing_by_command,
            "checks": [asdict(check) for check in self.checks],
            "recipe": self.recipe,
        }


def examine(recipe: Recipe | None, build: Path) -> HostReport:
    """Check everything that a run needs; with a recipe also forecast what it takes."""
    gpus = host.gpus()
    checks = [
        *gpu_checks(gpus),
        *machine_checks(build),
        *package_checks(),
        *program_checks(),
        *ollama_checks(gpu=bool(gpus)),
        *docker_checks(container_host.daemon(), gpu=bool(gpus)),
    ]
    if recipe is None:
        return HostReport(tuple(checks), None, None)
    shape = capacity.find_shape(recipe, build)
    refusal: HostError | RecipeError | None = None
    try:
        # Finished stages need no more disk space and memory.
        to_do = [name for name in capacity.WEIGHT_STAGES if not preflight.is_made(recipe, build, name)]
        capacity.refuse_stages(recipe, build, to_do)
    except (HostError, RecipeError) as error:
        refusal = error
    return HostReport(tuple(checks), capacity.forecast_run(recipe, build, shape, next(iter(gpus), None)), refusal)


def gpu_checks(gpus: list[host.Gpu]) -> Iterator[HostCheck]:
    """Check the GPU, its memory and compute capability, and the driver with its CUDA."""
    if not gpus:
        yield HostCheck("GPU", "warning", "no NVIDIA GPU answers (nvidia-smi)", "training uses the CPU: data/demo.toml")
        return
    several = f"{len(gpus)} are visible; training takes one" if len(gpus) > 1 else ""
    for gpu in gpus:
        memory = f"{gpu.name}, {gb(gpu.total)}, {gb(gpu.free)} free"
        yield HostCheck(
            "GPU",
            "warning" if several else "ok",
            memory,
            several and f"{several}: set CUDA_VISIBLE_DEVICES, or use accelerate launch",
        )
    first = gpus[0]
    capability = dotted(first.capability)
    if first.capability < device.CUDA_CAPABILITY:
        yield HostCheck(
            "compute capability", "missing", capability, "7.5 is needed; CUDA_VISIBLE_DEVICES= uses the CPU"
        )
    elif first.capability < device.BF16_CAPABILITY:
        yield HostCheck("compute capability", "warning", capability, "no bf16 below 8.0: training uses fp16")
    else:
        yield HostCheck("compute capability", "ok", capability)
    runs, built = host.driver_cuda(), device.built_for_cuda()
    found = f"{first.driver}, runs CUDA {dotted(runs)}" if runs else first.driver
    if runs and built and runs[0] < built[0]:
        yield HostCheck(
            "driver", "missing", found, f"the installed PyTorch has CUDA {dotted(built)}: update the driver"
        )
    else:
        yield HostCheck("driver", "ok", found)


def machine_checks(build: Path) -> Iterator[HostCheck]:
    """Check memory, processor and disk."""
    memory = host.memory()
    if memory is None:
        yield HostCheck("memory", "warning", "unknown", "/proc/meminfo cannot be read")
    else:
        limit = ", the container's limit" if memory.limit else ""
        yield HostCheck("memory", "ok", f"{gb(memory.total)}{limit}, {gb(memory.available)} free")
    cpu = host.processor()
    found = f"{cpu.name}, {cpu.cores} cores{''.join(f', {name}' for name in cpu.features)}"
    vectors = any(name in cpu.features for name in host.VECTOR_FEATURES)
    yield HostCheck(
        "processor", "ok" if vectors else "warning", found, "" if vectors else "neither AVX2 nor NEON: slow"
    )
    _, place, free = host.free_disk(build)
    writable = os.access(place, os.W_OK)
    hint = "" if writable else "nothing can be written there: give another --build"
    yield HostCheck("disk", "ok" if writable else "missing", f"{gb(free)} free on that of {place}", hint)


def package_checks() -> Iterator[HostCheck]:
    """Check the train environment: installed, as in pyproject.toml, without versions of known faults."""
    wanted = dict(wanted_versions("train"))
    versions = {name: installed_version(name) for name in {**wanted, **{name: "" for name, *_ in KNOWN_BAD}}}
    absent = [name for name in wanted if versions[name] is None]
    if absent:
        names = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        yield HostCheck("train environment", "missing", f"{names} not installed", "make install")
    else:
        yield HostCheck(
            "train environment", "ok", f"torch {versions['torch']}, transformers {versions['transformers']}"
        )
    bad = set()
    for name, first, good, harm in KNOWN_BAD:
        found = versions[name]
        if found is not None and first <= numbers(found) < good:
            bad.add(name)
            yield HostCheck(name, "missing", f"{found} {harm}", f"make install: it brings {dotted(good)} or newer")
    for name, specifier in wanted.items():
        found = versions[name]
        if found is not None and name not in bad and not satisfies(found, specifier):
            yield HostCheck(name, "warning", f"{found}; tutor is tested with {specifier}", "make install")


def wanted_versions(extra: str) -> Iterator[tuple[str, str]]:
    """The packages of one of tutor's extras, with the accepted versions."""
    for line in importlib.metadata.requires("tutor") or ():
        found = re.fullmatch(rf"([\w.-]+)\s*([^;]*);\s*extra == ['\"]{extra}['\"]", line)
        if found:
            yield found[1], found[2].strip()


def satisfies(found: str, specifier: str) -> bool:
    """Whether a version satisfies a specifier of pyproject.toml, which uses only `==`, `>=` and `<`."""
    have = numbers(found)
    for part in specifier.split(","):
        sign, wanted = part.strip().rstrip("0123456789."), numbers(part)
        length = max(len(have), len(wanted))
        one, other = ((*value, *(0,) * (length - len(value))) for value in (have, wanted))
        if (sign == "==" and one != other) or (sign == ">=" and one < other) or (sign == "<" and one >= other):
            return False
    return True


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, without a local part such as +cu128."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def program_checks() -> Iterator[HostCheck]:
    """Check llama.cpp and the TypeScript compiler, both of pinned versions."""
    folder = llamacpp_build.build_folder()
    if llamacpp_build.is_built(folder):
        yield HostCheck("llama.cpp", "ok", f"of llama_cpp_python {llamacpp_build.VERSION}, {folder}")
    else:
        hint = "make llamacpp"
        try:
            find_compiler()
        except HostError as error:
            hint = f"{error}; then: make llamacpp"
        yield HostCheck("llama.cpp", "missing", f"not built ({folder})", hint)
    try:
        program = typescript_install.find_compiler()
    except HostError as error:
        # Only the code checks of rows and answers need it.
        yield HostCheck("TypeScript compiler", "missing", error.message, "make typescript", needed_by="code checks")
    else:
        yield HostCheck("TypeScript compiler", "ok", f"{typescript_install.VERSION}, {program.parent}")


def ollama_checks(*, gpu: bool) -> Iterator[HostCheck]:
    """Check the server that `tutor publish` would use, and show how its address is understood."""
    for what, state, found, hint in server_states(ANSWER_TIMEOUT, host_has_gpu=gpu):
        yield HostCheck(what, state, found, hint, needed_by=SERVE)


def docker_checks(daemon: container_host.Daemon, *, gpu: bool) -> Iterator[HostCheck]:
    """Check Docker with Compose, its images, and the toolkit that gives containers access to a GPU."""
    if not (faults := container_host.docker_faults(daemon)):
        faults = container_host.project_faults(project := container_host.project())
    if faults:
        yield from (HostCheck("Docker", "missing", fault.what, fault.hint, needed_by=STACK) for fault in faults)
        return
    found = f"{daemon.info.get('ServerVersion', '')}{', rootless' if daemon.rootless else ''}"
    yield HostCheck("Docker", "ok", found, needed_by=STACK)
    yield HostCheck("images", "ok", container_host.tagged_images(project) or "named by digest", needed_by=STACK)
    if gpu:
        lacks = [fault for fault in preflight.gpu_faults(daemon) if "Toolkit" in fault.what]
        found, hint = (lacks[0].what, lacks[0].hint) if lacks else ("known to Docker", "")
        yield HostCheck("NVIDIA container toolkit", "missing" if lacks else "ok", found, hint, needed_by=STACK)
