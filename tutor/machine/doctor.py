"""What this machine can do, before hours are spent: its parts and programs, and what a recipe would take on it.

In: host.py, the programs on PATH, installed packages, a recipe where one is given. Out: checks, each with what to do,
and the estimate of the recipe by part and stage. Starts nothing, fetches nothing and needs no torch.
"""

import contextlib
import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tutor.engines.llamacpp import build as llamacpp_build
from tutor.engines.ollama.client import connect
from tutor.engines.ollama.protocol import UnreachableError, check_version
from tutor.errors import HostError, TutorError
from tutor.graders.typescript import install as typescript_install
from tutor.machine import capacity, device, host, preflight
from tutor.machine.memory.estimate import gb
from tutor.recipe.settings import Recipe

State = Literal["ok", "warning", "missing"]

RUN, STACK, SERVE = "tutor run", "make all", "tutor publish"
"""Who needs a thing: the stages in this environment, the containers, Ollama."""
ANSWER = 2.0  # seconds for Ollama to say its version
KNOWN_BAD = (
    ("transformers", (5, 0), (5, 22, 2), "drops every blank of an R1-Distill-Llama text"),
    ("torch", (0,), (2, 10), "can run code of a checkpoint it loads (CVE-2026-24747)"),
    ("jinja2", (0,), (3, 1, 6), "lets a template out of its sandbox"),
)
"""Package, first and first good version, what it does (docs/facts.md, 8)."""
CUDA_PACKAGE = re.compile(r"nvidia-cuda-runtime(-cu\d+)?")


@dataclass(frozen=True)
class Check:
    """One thing that this machine has or lacks."""

    what: str
    state: State
    found: str
    hint: str = ""  # what to do where it is not ok
    needed_by: str = RUN  # whom it stops where it is missing


@dataclass(frozen=True)
class Report:
    """All checks; for a recipe its estimate, and why it cannot run here."""

    checks: tuple[Check, ...]
    recipe: Mapping[str, Any] | None
    refusal: HostError | None

    @property
    def ways(self) -> dict[str, list[str]]:
        """What each way to train lacks: the stages in this environment, and the containers."""
        lacks = [(check.needed_by, check.what) for check in self.checks if check.state == "missing"]
        return {way: [what for needed_by, what in lacks if needed_by == way] for way in (RUN, STACK)}

    @property
    def fault(self) -> HostError | None:
        """Why nothing can be trained here; None where something can."""
        if self.refusal is not None or not all(self.ways.values()):
            return self.refusal
        lacks = "; ".join(f"{way} lacks {', '.join(what)}" for way, what in self.ways.items())
        return HostError(f"this machine cannot train yet: {lacks}", "the list above says what to do")

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        fault = self.fault
        return {
            "ok": fault is None,
            "error": fault.message if fault else None,
            "hint": fault.hint if fault else None,
            "lacks": self.ways,
            "checks": [asdict(check) for check in self.checks],
            "recipe": self.recipe,
        }


def examine(recipe: Recipe | None, build: Path) -> Report:
    """Look at everything that a run needs; with a recipe also at what it takes."""
    gpus = host.gpus()
    info = preflight.daemon()
    checks = [
        *gpu_checks(gpus),
        *machine_checks(build),
        *package_checks(),
        *program_checks(),
        ollama_check(),
        *docker_checks(info, gpu=bool(gpus)),
    ]
    if recipe is None:
        return Report(tuple(checks), None, None)
    shape = capacity.find_shape(recipe, build)
    refusal = None
    try:
        # Stages that are done need no room any more, and no memory.
        to_do = [name for name in capacity.WEIGHT_STAGES if not preflight.is_made(recipe, build, name)]
        capacity.refuse(recipe, build, to_do)
    except HostError as error:
        refusal = error
    return Report(tuple(checks), capacity.forecast(recipe, build, shape, next(iter(gpus), None)), refusal)


def gpu_checks(gpus: list[host.Gpu]) -> Iterator[Check]:
    """GPU, memory, compute capability, driver and its CUDA."""
    if not gpus:
        yield Check("GPU", "warning", "no NVIDIA GPU answers (nvidia-smi)", "training uses the CPU: data/demo.toml")
        return
    several = f"{len(gpus)} are visible; training takes one" if len(gpus) > 1 else ""
    for gpu in gpus:
        memory = f"{gpu.name}, {gb(gpu.total)}, {gb(gpu.free)} free"
        yield Check(
            "GPU",
            "warning" if several else "ok",
            memory,
            several and f"{several}: set CUDA_VISIBLE_DEVICES, or use accelerate launch",
        )
    first = gpus[0]
    capability = ".".join(map(str, first.capability))
    if first.capability < device.CUDA_CAPABILITY:
        yield Check("compute capability", "missing", capability, "7.5 is needed; CUDA_VISIBLE_DEVICES= uses the CPU")
    elif first.capability < device.BF16_CAPABILITY:
        yield Check("compute capability", "warning", capability, "no bf16 below 8.0: training uses fp16")
    else:
        yield Check("compute capability", "ok", capability)
    runs, built = host.driver_cuda(), built_for_cuda()
    found = f"{first.driver}, runs CUDA {dotted(runs)}" if runs else first.driver
    if runs and built and runs[0] < built[0]:
        yield Check("driver", "missing", found, f"the installed PyTorch has CUDA {dotted(built)}: update the driver")
    else:
        yield Check("driver", "ok", found)


def built_for_cuda() -> tuple[int, ...] | None:
    """The CUDA that the installed PyTorch brings; None without one."""
    for package in importlib.metadata.distributions():
        if CUDA_PACKAGE.fullmatch(package.metadata["Name"] or ""):
            return host.version(package.version)[:2]
    return None


def machine_checks(build: Path) -> Iterator[Check]:
    """Memory, processor, disk."""
    memory = host.memory()
    if memory is None:
        yield Check("memory", "warning", "unknown", "/proc/meminfo cannot be read")
    else:
        limit = ", the container's limit" if memory.limit else ""
        yield Check("memory", "ok", f"{gb(memory.total)}{limit}, {gb(memory.available)} free")
    cpu = host.processor()
    found = f"{cpu.name}, {cpu.cores} cores{''.join(f', {name}' for name in cpu.features)}"
    vectors = any(name in cpu.features for name in host.VECTOR_FEATURES)
    yield Check("processor", "ok" if vectors else "warning", found, "" if vectors else "neither AVX2 nor NEON: slow")
    _, place, free = host.free_disk(build)
    writable = os.access(place, os.W_OK)
    hint = "" if writable else "nothing can be written there: give another --build"
    yield Check("disk", "ok" if writable else "missing", f"{gb(free)} free on that of {place}", hint)


def package_checks() -> Iterator[Check]:
    """The train environment, its versions against pyproject.toml's, and versions that are known to harm."""
    wanted = dict(wanted_versions("train"))
    versions = {name: installed(name) for name in {**wanted, **{name: "" for name, *_ in KNOWN_BAD}}}
    absent = [name for name in wanted if versions[name] is None]
    if absent:
        names = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        yield Check("train environment", "missing", f"{names} not installed", "make install")
    else:
        yield Check("train environment", "ok", f"torch {versions['torch']}, transformers {versions['transformers']}")
    bad = set()
    for name, first, good, harm in KNOWN_BAD:
        found = versions[name]
        if found is not None and first <= numbers(found) < good:
            bad.add(name)
            yield Check(name, "missing", f"{found} {harm}", f"{dotted(good)} or newer: make install")
    for name, specifier in wanted.items():
        found = versions[name]
        if found is not None and name not in bad and not satisfies(found, specifier):
            yield Check(name, "warning", f"{found}; tutor is tested with {specifier}", "make install")


def wanted_versions(extra: str) -> Iterator[tuple[str, str]]:
    """The packages of an extra of tutor's, with the versions that it takes."""
    for line in importlib.metadata.requires("tutor") or ():
        found = re.fullmatch(rf"([\w.-]+)\s*([^;]*);\s*extra == ['\"]{extra}['\"]", line)
        if found:
            yield found[1], found[2].strip()


def installed(package: str) -> str | None:
    """A package's version; None where it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def satisfies(found: str, specifier: str) -> bool:
    """Whether a version is what pyproject.toml asks for: `==`, `>=` and `<`, which is all that it uses."""
    have = numbers(found)
    for part in specifier.split(","):
        sign, wanted = part.strip().rstrip("0123456789."), numbers(part)
        length = max(len(have), len(wanted))
        one, other = ((*value, *(0,) * (length - len(value))) for value in (have, wanted))
        if (sign == "==" and one != other) or (sign == ">=" and one < other) or (sign == "<" and one >= other):
            return False
    return True


def numbers(version: str) -> tuple[int, ...]:
    """A version's numbers, without what comes behind a plus."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def program_checks() -> Iterator[Check]:
    """llama.cpp and the TypeScript compiler, both pinned."""
    folder = llamacpp_build.build_folder()
    if llamacpp_build.is_built(folder):
        yield Check("llama.cpp", "ok", f"of llama_cpp_python {llamacpp_build.VERSION}, {folder}")
    else:
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        hint = "make llamacpp" if compiler else "install a C++ compiler (apt-get install g++), then: make llamacpp"
        yield Check("llama.cpp", "missing", f"not built ({folder})", hint)
    try:
        program = typescript_install.find_compiler()
    except HostError as error:
        # Code is judged with it; rows and answers can do without.
        yield Check("TypeScript compiler", "missing", error.message, "make typescript", needed_by="code checks")
    else:
        yield Check("TypeScript compiler", "ok", f"{typescript_install.VERSION}, {program.parent}")


def ollama_check() -> Check:
    """The server that `tutor publish` would use."""
    try:
        with connect(None, silent=ANSWER) as server:
            version = server.version(ANSWER)
            if host.version(version) == (0, 0, 0):
                return Check(
                    "Ollama", "warning", f"{version} at {server.host}", "built from source? taken as new enough"
                )
            check_version(version)
            return Check("Ollama", "ok", f"{version} at {server.host}", needed_by=SERVE)
    except UnreachableError as error:
        program = "installed, " if shutil.which("ollama") else ""
        return Check("Ollama", "missing", f"{program}{error.message}", error.hint or "", needed_by=SERVE)
    except TutorError as error:
        return Check("Ollama", "missing", error.message, error.hint or "", needed_by=SERVE)


def docker_checks(info: Mapping[str, Any], *, gpu: bool) -> Iterator[Check]:
    """Docker with Compose, and the toolkit that hands a GPU to containers."""
    faults = preflight.docker_faults(info)
    for fault in faults:
        yield Check("Docker", "missing", fault.what, fault.hint, needed_by=STACK)
    if faults:
        return
    yield Check("Docker", "ok", str(info.get("ServerVersion", "")), needed_by=STACK)
    toolkit = [fault for fault in preflight.gpu_faults(info) if "Toolkit" in fault.what]
    for fault in toolkit if gpu else ():
        yield Check("NVIDIA container toolkit", "missing", fault.what, fault.hint, needed_by=STACK)
    if gpu and not toolkit:
        yield Check("NVIDIA container toolkit", "ok", "known to Docker", needed_by=STACK)


def dotted(version: tuple[int, ...]) -> str:
    """A version's numbers as people write them."""
    return ".".join(map(str, version))
