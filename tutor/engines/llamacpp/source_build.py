"""Build the pinned llama.cpp from source. Standard library and platformdirs only.

In: the source distribution of `llama_cpp_python` (PyPI), which contains a complete llama.cpp.
Out: a folder with `bin/` (programs), the converters with `conversion/` and `gguf-py/`, licences, and BUILD.json last.
An interrupted build leaves its sources and objects beside the folder, and the next call continues from there.
Does not decide what is built (build.py), nor print how far it is (build_output.py).
"""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from tutor.engines.llamacpp.build import (
    CMAKE_OPTIONS,
    MARKER,
    PROGRAMS,
    SHA256,
    SOURCE,
    VERSION,
    build_folder,
    is_built,
    kernels,
)
from tutor.engines.llamacpp.build_output import BuildProgress, explain
from tutor.errors import ArtifactError, HostError
from tutor.formats import terminal
from tutor.formats.child_process import running

CONVERTERS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE", "licenses")
"""Files and folders of llama.cpp that are copied as they are: the converters in Python, and the licences."""
COMPILERS = ("c++", "g++", "clang++")
"""C++ compilers that CMake looks for, in its order; the variable CXX comes first."""
INSTALL_COMPILER = "install one, on Debian: apt-get install g++"
"""Next step of a user without a C++ compiler."""
RECORD = "llama_cpp_python"
"""First key of the marker."""
STATUS = "[%f/%t] "
"""Beginning of Ninja's lines (NINJA_STATUS): number of finished steps, number of all steps."""
BYTES_PER_JOB = 1 << 30
"""Memory in bytes that one compiler may need."""
STOP_SECONDS = 10.0
"""Seconds between SIGTERM and SIGKILL of a program that must end."""
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a build, with exit code 128 + number: a stop, a closed terminal."""


def build(folder: Path, jobs: int) -> None:
    """Build llama.cpp into `folder`, complete or absent.

    Raises HostError where this machine lacks something, ArtifactError when the build fails.
    """
    compiler = find_compiler()
    _refuse_foreign_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name(f"{folder.name}.lock")) as lock:
        if is_built(folder):  # by another process, while this one waited
            return
        work = folder.with_name(f"{folder.name}.partial")
        work.mkdir(exist_ok=True)
        log = work / "build.log"
        log.unlink(missing_ok=True)
        steps = Steps(log, lock)
        source = _fetch_source(work, steps)
        _compile(source, work / "build", jobs, compiler, steps)
        shutil.rmtree(work / "complete", ignore_errors=True)
        _install(source, work / "build", work / "complete", compiler)
        shutil.rmtree(folder, ignore_errors=True)
        (work / "complete").rename(folder)
        shutil.rmtree(work, ignore_errors=True)


def _refuse_foreign_folder(folder: Path) -> None:
    """Raise HostError where TUTOR_LLAMACPP names a folder with other content, which a build would delete."""
    if not os.environ.get("TUTOR_LLAMACPP") or not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not _is_build(folder)):
        raise HostError(
            f"{folder} was not made by tutor: it has no {MARKER} of tutor's",
            "set TUTOR_LLAMACPP to another folder, or move this one away",
        )


def _is_build(folder: Path) -> bool:
    """Whether tutor made a folder, complete or not: its marker has the key that only this module writes."""
    try:
        return RECORD in (folder / MARKER).read_text("utf-8", "replace")
    except OSError:
        return False


def find_compiler() -> list[str]:
    """The words of the command that compiles C++: of the variable CXX, else the first known compiler that is there.

    Raises HostError when it is not on this machine.
    """
    try:
        asked = shlex.split(os.environ.get("CXX", ""))
    except ValueError:
        raise HostError(f"CXX is {os.environ['CXX']!r}, with an open quote", "correct it, or: unset CXX") from None
    for words in [asked] if asked else [[name] for name in COMPILERS]:
        if shutil.which(words[0]):
            return words
    named = f"{asked[0]}, from the variable CXX" if asked else COMPILERS[0]
    raise HostError(f"no C++ compiler ({named}) on this machine", INSTALL_COMPILER)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold the lock of a build; yield its file. Programs inherit it: it is held until the last of them has ended."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            terminal.write_note("llama.cpp: waiting for another build of it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise HostError(f"cannot lock {path}: {error.strerror}", "set XDG_CACHE_HOME to a local disk") from None
        yield file.fileno()


class Steps:
    """Runs the programs of a build, with their output in one log file."""

    def __init__(self, log: Path, lock: int) -> None:
        self.log, self.lock = log, lock
        self.progress = BuildProgress()

    def run(self, command: list[str], what: str) -> None:
        """Run a program to its end. Raises HostError or ArtifactError with the line that explains its failure."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        env = {**os.environ, "PATH": path, "NINJA_STATUS": STATUS, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        lines: list[str] = []
        with self.log.open("a", encoding="utf-8") as log:
            try:
                with running(
                    lambda: subprocess.Popen(
                        command,
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                        errors="replace",
                        pass_fds=(self.lock,),
                    ),
                    self._end,
                ) as process:
                    for line in process.stdout or ():
                        log.write(line)
                        lines.append(line)
                        self.progress.read(line)
                    code = process.wait()
            except FileNotFoundError as error:
                raise HostError(f"cannot {what}: {error.filename} not found", "make llamacpp brings it") from error
        if code:
            raise explain(what, lines, code, self.log)

    def _end(self, process: subprocess.Popen[str]) -> None:
        """End a program that may still run: a build that nobody waits for would go on beside the next one."""
        self.progress.end()
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            process.kill()
            process.wait()


def _fetch_source(work: Path, steps: Steps) -> Path:
    """Download and unpack the source distribution, checked by its hash; return its vendor/llama.cpp."""
    source = work / "source"
    if not source.is_dir():
        terminal.write_note(f"llama.cpp: fetching the source (llama_cpp_python {VERSION})")
        fetched = work / "fetched"
        shutil.rmtree(fetched, ignore_errors=True)
        fetched.mkdir()
        pin = fetched / "pin.txt"
        pin.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n", "utf-8")
        # requirements/build.txt has cmake, ninja, and scikit-build-core, which pip needs to download the source.
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        pip += ["--retries", "2", "--timeout", "30", "--require-hashes", "--no-binary", "llama-cpp-python"]
        steps.run([*pip, "-r", str(pin), "-d", str(fetched)], "fetch the source of llama.cpp")
        with tarfile.open(next(fetched.glob("llama_cpp_python-*.tar.gz"))) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2, Debian 12's, has none
            tar.extractall(fetched)  # noqa: S202 - pip has checked its hash
        (fetched / f"llama_cpp_python-{VERSION}").rename(source)
        shutil.rmtree(fetched)
    return source / "vendor" / "llama.cpp"


def _compile(source: Path, out: Path, jobs: int, compiler: list[str], steps: Steps) -> None:
    """Compile what is not compiled yet. Objects of another compiler are of no use."""
    used = out / "compiler.txt"
    text = f"{shlex.join(compiler)}\n{_version(compiler)}"
    if out.is_dir() and not (used.is_file() and used.read_text("utf-8") == text):
        shutil.rmtree(out)
    cmake = ["cmake", "-S", str(SOURCE), "-B", str(out), "-G", "Ninja", f"-DLLAMA_CPP_DIR={source}", *_options()]
    steps.run(cmake, "configure llama.cpp")
    used.write_text(text, "utf-8")
    compile_ = ["cmake", "--build", str(out), "--parallel", str(jobs), "--target", *PROGRAMS]
    steps.run(compile_, "compile llama.cpp")


def _options() -> tuple[str, ...]:
    """Options of CMake on this machine."""
    return (*CMAKE_OPTIONS, *(f"-DGGML_{name}=ON" for name in kernels()))


def _install(source: Path, built: Path, target: Path, compiler: list[str]) -> None:
    (target / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        found = next((path for path in built.rglob(name) if path.is_file()), None)
        if found is None:
            raise ArtifactError(f"the llama.cpp build made no {name}")
        shutil.copy2(found, target / "bin" / name)
    for name in CONVERTERS:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy2
        copy(source / name, target / name)
    record = {
        RECORD: VERSION,
        "sha256": SHA256,
        "options": _options(),
        "compiler": _version(compiler),
        "sizes": {name: (target / "bin" / name).stat().st_size for name in PROGRAMS},
    }
    (target / MARKER).write_text(json.dumps(record, indent=1), "utf-8")


def _version(compiler: list[str]) -> str:
    """First line of the compiler's own description."""
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0]


def usable_jobs(cores: int, memory: int | None) -> int:
    """Number of compilers to run at a time: one a core, and no more than fit in `memory` bytes (None: unknown)."""
    return cores if memory is None else max(1, min(cores, memory // BYTES_PER_JOB))


def main(cores: int, memory: int | None) -> int:
    """Build llama.cpp unless it is built, and print its folder; return the exit code. For scripts/build_llamacpp.py.

    `cores` and `memory` (bytes) are those that this process may use.
    """
    folder = build_folder()
    if not is_built(folder):
        began = time.monotonic()
        terminal.write_note(f"llama.cpp: building it into {folder}: once, some minutes")
        try:
            with terminal.ending_by_signals(ENDING_SIGNALS):
                build(folder, usable_jobs(cores, memory))
        except (HostError, ArtifactError) as error:
            terminal.write_note(f"Error: {error}")
            return error.code
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            terminal.write_note(f"Error: cannot build llama.cpp: the disk of {folder.parent} is full; delete something")
            return HostError.code
        except KeyboardInterrupt:
            terminal.write_note("llama.cpp: interrupted; the next call continues from here")
            return 130
        terminal.write_note(f"llama.cpp: built in {time.monotonic() - began:.0f} s")
    terminal.write_result(str(folder))
    return 0
