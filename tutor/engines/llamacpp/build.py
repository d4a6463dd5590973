"""Build the pinned llama.cpp from source and find the build. Standard library, filelock and platformdirs only.

In: the source distribution of `llama_cpp_python` (PyPI), which contains a complete llama.cpp.
Out: a folder with `bin/` (programs), the converters with `conversion/` and `gguf-py/`, licences, and BUILD.json last.
The folder's name is a hash of the build's inputs, so that `make demo` and the image share one build.
Does not build at run time: `scripts/build_llamacpp.py` builds, the stages only look the folder up.
"""

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
from pathlib import Path

import platformdirs
from filelock import FileLock

from tutor.errors import ArtifactError, HostError

VERSION = "0.3.36"
"""Version of `llama_cpp_python` on PyPI whose vendor/llama.cpp is built."""
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""SHA-256 of that source distribution; pip checks it."""
PROGRAMS = ("llama-quantize", "llama-server", "llama-imatrix", "tutor-score")
"""Names of the programs that are built, as CMake targets."""
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
"""Options of CMake: static programs for any processor of this kind, without tests, examples and web interface."""
CONVERTERS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE", "licenses")
"""Files and folders of llama.cpp that are copied as they are: the converters in Python, and the licences."""
MARKER = "BUILD.json"
"""Name of the file that is written last into a complete build."""
SOURCE = Path(__file__).parent / "src"
"""Folder of the sources that are ours: the scorer, its CMakeLists.txt, and the starters of the converters."""
BUILD_PACKAGES = ("cmake", "ninja", "scikit-build-core")
"""Packages that a build needs. scikit-build-core lets pip download the source without an isolated environment."""


def build_key() -> str:
    """Sixteen hex digits that identify a build: pin, options, programs, our scorer's code, processor and system.

    Lines that are only a comment are not hashed: better words compile nothing again.
    """
    digest = hashlib.sha256()
    for text in (VERSION, SHA256, *CMAKE_OPTIONS, *PROGRAMS, platform.machine(), platform.system()):
        digest.update(text.encode() + b"\0")
    for name in ("CMakeLists.txt", "score.cpp"):
        code = (line for line in (SOURCE / name).read_text("utf-8").splitlines() if not _is_comment(line))
        digest.update("\n".join(code).encode() + b"\0")
    return digest.hexdigest()[:16]


def _is_comment(line: str) -> bool:
    """Whether a line of C++ or CMake has a comment and nothing else."""
    words = line.split(maxsplit=1)
    return bool(words) and words[0] in ("//", "#")


def build_folder() -> Path:
    """The folder of this build: `TUTOR_LLAMACPP` where set (an image), else in the user's cache by its key."""
    override = os.environ.get("TUTOR_LLAMACPP")
    return Path(override) if override else platformdirs.user_cache_path("tutor") / "llama.cpp" / build_key()


def is_built(folder: Path) -> bool:
    """Whether `folder` holds a complete build: its marker has the sizes of the programs in it."""
    try:
        sizes = json.loads((folder / MARKER).read_text("utf-8"))["sizes"]
        return all((folder / "bin" / name).stat().st_size == sizes[name] for name in PROGRAMS)
    except (OSError, KeyError, ValueError):
        return False


def build(folder: Path, jobs: int) -> None:
    """Build llama.cpp into `folder`, complete or absent.

    Raises HostError without a compiler, ArtifactError when the build fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise HostError("no C++ compiler (c++) on this machine", "install one, on Debian: apt-get install g++")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if is_built(folder):  # by another process, while this one waited
            return
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as scratch:
            work = Path(scratch)
            source = _fetch_source(work)
            _compile(source, work / "build", jobs)
            _install(source, work / "build", work / "complete", compiler)
            shutil.rmtree(folder, ignore_errors=True)
            (work / "complete").rename(folder)


def _fetch_source(work: Path) -> Path:
    """Download and unpack the source distribution, checked by its hash; return its vendor/llama.cpp."""
    pin = work / "pin.txt"
    pin.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n", "utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    _run(
        [*pip, "--require-hashes", "--no-binary", "llama-cpp-python", "-r", str(pin), "-d", str(work)],
        "fetch the source",
    )
    archive = next(work.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2, Debian 12's, has none
        tar.extractall(work)  # noqa: S202 - pip has checked its hash
    return work / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"


def _compile(source: Path, out: Path, jobs: int) -> None:
    cmake = ["cmake", "-S", str(SOURCE), "-B", str(out), "-G", "Ninja"]
    _run([*cmake, f"-DLLAMA_CPP_DIR={source}", *CMAKE_OPTIONS], "configure llama.cpp")
    _run(["cmake", "--build", str(out), "--parallel", str(jobs), "--target", *PROGRAMS], "compile llama.cpp")


def _install(source: Path, built: Path, target: Path, compiler: str) -> None:
    (target / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        found = next((path for path in built.rglob(name) if path.is_file()), None)
        if found is None:
            raise ArtifactError(f"the llama.cpp build made no {name}")
        shutil.copy2(found, target / "bin" / name)
    for name in CONVERTERS:
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy2
        copy(source / name, target / name)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    record = {
        "llama_cpp_python": VERSION,
        "sha256": SHA256,
        "options": CMAKE_OPTIONS,
        "compiler": version.partition("\n")[0],
        "sizes": {name: (target / "bin" / name).stat().st_size for name in PROGRAMS},
    }
    (target / MARKER).write_text(json.dumps(record, indent=1), "utf-8")


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


def main() -> int:
    """Build llama.cpp unless it is built, and print its folder; return the exit code. For scripts/build_llamacpp.py."""
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
