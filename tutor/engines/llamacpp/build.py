"""The pin of llama.cpp, how it is built, and where the build is. Standard library and platformdirs only.

In: this file's constants and the sources in src/. Out: the key and the folder of the build. The folder's name is a hash
of the build's inputs, so that `make demo` and the image share one build. Does not build: source_build.py does, for
scripts/build_llamacpp.py; the stages only look the folder up.
"""

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import platformdirs

VERSION = "0.3.36"
"""Version of `llama_cpp_python` on PyPI whose vendor/llama.cpp is built."""
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""SHA-256 of that source distribution; pip checks it."""
PROGRAMS = ("llama-quantize", "llama-server", "llama-imatrix", "llama-tokenize", "tutor-score")
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
    "-DLLAMA_ALL_WARNINGS=OFF",
    "-DGGML_ALL_WARNINGS=OFF",
)
"""Options of CMake: static programs for any processor of this kind, without tests, examples and web interface."""
KERNELS = {
    "AVX512": ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    "AVX512_VBMI": ("avx512vbmi",),
    "AVX512_VNNI": ("avx512_vnni",),
    "AVX512_BF16": ("avx512_bf16",),
}
"""Instructions that ggml's kernels may use beyond the portable ones (AVX2): its name, the processor's names."""
CPUINFO = Path("/proc/cpuinfo")
"""File that lists the features of the processor (Linux)."""
MARKER = "BUILD.json"
"""Name of the file that is written last into a complete build."""
SOURCE = Path(__file__).parent / "src"
"""Folder of the sources that are ours: the scorer, its CMakeLists.txt, and the starters of the converters."""


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


def kernels() -> tuple[str, ...]:
    """Names of KERNELS for a build in the user's cache; none for an image, which runs on any processor.

    With them a prompt is 1.2 to 1.5 times as fast and a generation 1.3 (Zen 5). Quantized files have the same bytes.
    """
    if os.environ.get("TUTOR_LLAMACPP"):
        return ()
    try:
        text = CPUINFO.read_text("utf-8", "replace")
    except OSError:
        return ()
    flags = set(next((line.split() for line in text.splitlines() if line.startswith("flags")), ()))
    names = tuple(name for name, needed in KERNELS.items() if flags.issuperset(needed))
    return names if "AVX512" in names else ()


def build_folder() -> Path:
    """The folder of this build: `TUTOR_LLAMACPP` where set (an image), else in the user's cache by key and kernels.

    A stage's key has no kernels, as it has none of PyTorch's: a run in containers keeps the results of one outside.
    """
    if override := os.environ.get("TUTOR_LLAMACPP"):
        return Path(override)
    name = "-".join((build_key(), *(kernel.lower() for kernel in kernels())))
    return platformdirs.user_cache_path("tutor") / "llama.cpp" / name


def is_built(folder: Path, names: Sequence[str] = PROGRAMS) -> bool:
    """Whether `folder` holds a complete build: its marker has the sizes of the programs in it.

    With `names` these programs are enough: the trainer's image has the converter and the tokenizer alone.
    """
    try:
        sizes = json.loads((folder / MARKER).read_text("utf-8"))["sizes"]
        return all((folder / "bin" / name).stat().st_size == sizes[name] for name in names)
    except (OSError, KeyError, ValueError):
        return False
