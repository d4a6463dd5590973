"""The pinned llama.cpp: where it lies, and how it is built from source. Standard library and platformdirs only.

In: the source distribution of `llama_cpp_python` (PyPI), which carries a complete llama.cpp.
Out: a folder with `bin/` (programs), the converters with `conversion/` and `gguf-py/`, licences, and BUILD.json last.
The folder's name is the hash of all that the build depends on, so `make demo` and the image share one recipe.
Never called at run time: `scripts/build_llamacpp.py` builds, the stages only look the folder up.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from tutor.errors import ArtifactError, HostError

VERSION = "0.3.36"
"""Of `llama_cpp_python` on PyPI; its vendor/llama.cpp is what is built."""
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""Of that source distribution, as pip checks it."""
PROGRAMS = ("llama-quantize", "llama-server", "llama-imatrix", "llama-perplexity", "tutor-score")
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=OFF",
    "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_TOOLS_INSTALL=OFF",
    "-DGGML_CCACHE=OFF",
)
CONVERTERS = (
    "convert_hf_to_gguf.py",
    "convert_lora_to_gguf.py",
    "conversion",
    "gguf-py",
    "LICENSE",
    "licenses",
)
MARKER = "BUILD.json"
SOURCE = Path(__file__).parent / "src"
BUILD_PACKAGES = ("cmake", "ninja", "scikit-build-core")
"""scikit-build-core only lets pip hand over the checked source distribution without preparing an environment."""


def build_key() -> str:
    """Sixteen hex digits over everything that the build depends on: pin, options, our scorer, processor kind."""
    digest = hashlib.sha256()
    for text in (VERSION, SHA256, *CMAKE_OPTIONS, *PROGRAMS, platform.machine(), platform.system()):
        digest.update(text.encode() + b"\0")
    for name in ("CMakeLists.txt", "score.cpp"):
        digest.update((SOURCE / name).read_bytes())
    return digest.hexdigest()[:16]


def build_folder() -> Path:
    """The folder of this build: `TUTOR_LLAMACPP` where set (an image), else in the user's cache by its key."""
    override = os.environ.get("TUTOR_LLAMACPP")
    return Path(override) if override else platformdirs.user_cache_path("tutor") / "llama.cpp" / build_key()


def is_built(folder: Path) -> bool:
    """Whether `folder` holds a whole build: its marker is there and names the programs' sizes as they are."""
    try:
        sizes = json.loads((folder / MARKER).read_text("utf-8"))["sizes"]
        return all((folder / "bin" / name).stat().st_size == sizes[name] for name in PROGRAMS)
    except (OSError, KeyError, ValueError):
        return False


def build(folder: Path, jobs: int) -> None:
    """Build llama.cpp into `folder`, whole or absent. Raises HostError without a compiler, ArtifactError on failure."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise HostError("no C++ compiler (c++) on this machine", "install one, on Debian: apt-get install g++")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(folder.with_suffix(".lock")):
        if is_built(folder):
            return
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as scratch:
            work = Path(scratch)
            source = _fetch_source(work)
            _compile(source, work / "build", jobs)
            _install(source, work / "build", work / "whole", compiler)
            shutil.rmtree(folder, ignore_errors=True)
            (work / "whole").rename(folder)


def _fetch_source(work: Path) -> Path:
    """Unpack the hash-checked source distribution; its vendor/llama.cpp."""
    pin = work / "pin.txt"
    pin.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n", "utf-8")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--require-hashes",
    ]
    _run([*pip, "--no-binary", "llama-cpp-python", "-r", str(pin), "-d", str(work)], "fetch the source")
    archive = next(work.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2, Debian 12's, has none
        tar.extractall(work)  # noqa: S202 - pip has checked its hash
    return work / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"


def _compile(source: Path, out: Path, jobs: int) -> None:
    cmake = [
        "cmake",
        "-S",
        str(SOURCE),
        "-B",
        str(out),
        "-G",
        "Ninja",
        f"-DLLAMA_CPP_DIR={source}",
        *CMAKE_OPTIONS,
    ]
    _run(cmake, "configure llama.cpp")
    _run(["cmake", "--build", str(out), "--parallel", str(jobs), "--target", *PROGRAMS], "compile llama.cpp")


def _install(source: Path, built: Path, whole: Path, compiler: str) -> None:
    (whole / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        found = next((path for path in built.rglob(name) if path.is_file()), None)
        if found is None:
            raise ArtifactError(f"the llama.cpp build made no {name}")
        shutil.copy2(found, whole / "bin" / name)
    for name in CONVERTERS:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy2
        copy(source / name, whole / name)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    record = {
        "llama_cpp_python": VERSION,
        "sha256": SHA256,
        "options": CMAKE_OPTIONS,
        "compiler": version.partition("\n")[0],
        "sizes": {name: (whole / "bin" / name).stat().st_size for name in PROGRAMS},
    }
    (whole / MARKER).write_text(json.dumps(record, indent=1), "utf-8")


def _run(command: list[str], what: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        done = subprocess.run(command, env={**os.environ, "PATH": path}, stdout=sys.stderr, check=False)
    except FileNotFoundError as error:
        missing = [name for name in BUILD_PACKAGES if not _installed(name)]
        raise HostError(f"cannot {what}: {error.filename} not found", f"pip install {' '.join(missing)}") from error
    if done.returncode:
        raise ArtifactError(f"cannot {what}: {command[0]} exited with {done.returncode}", "its output stands above")


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait for another build of the same folder: the kernel frees the lock when its holder ends."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Build unless built; print the folder. For scripts/build_llamacpp.py."""
    folder = build_folder()
    if not is_built(folder):
        sys.stderr.write(f"building llama.cpp into {folder}: once, some minutes\n")
        try:
            build(folder, os.cpu_count() or 1)
        except (HostError, ArtifactError) as error:
            sys.stderr.write(f"Error: {error}\n")
            return error.code
    sys.stdout.write(f"{folder}\n")
    return 0
