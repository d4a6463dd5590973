"""Every command that installs packages: pinned by hash, wheels only; no package's code is built but the checkout's own.

The one source distribution, llama.cpp's, is downloaded by its hash, unpacked and compiled by tutor.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from support.processes.command import ROOT

from tutor.engines.llamacpp import source_build

sys.path.insert(0, str(ROOT / "scripts"))
from environment import installers

HASHED_WHEELS = ["--require-hashes", "--only-binary", ":all:"]
OWN = {
    "pip wheel --no-deps --no-build-isolation --wheel-dir /wheel /src",
    "pip install --no-deps --no-index /wheel/*.whl",
}
"""Commands for the wheel of tutor itself, whose build backend is installed by its hash."""
TEXT = ["Makefile", ".ci/run", "scripts/lock", "README.md", "CONTRIBUTING.md", "docs/*.md", ".github/workflows/*.yml"]
"""Files whose commands start no installer but scripts/install.py."""


def commands(path: Path) -> list[str]:
    """Return the commands of a Dockerfile that start pip or uv, one line each."""
    text = re.sub(r"#.*\n|\\\n", " ", path.read_text("utf-8"), flags=re.MULTILINE)
    return re.findall(r"(?:uv )?pip (?:install|download|wheel|sync)\b[^&\n]*", text)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.ollama"])
def test_image_installs_only_wheels_by_their_hash(name: str) -> None:
    found = [" ".join(command.split()) for command in commands(ROOT / "docker" / name)]
    assert len(found) == {"Dockerfile": 9, "Dockerfile.ollama": 0}[name]
    assert [line for line in found if line not in OWN and " ".join(HASHED_WHEELS) not in line] == []
    assert {line for line in found if line in OWN} == (OWN if found else set())


@pytest.mark.parametrize("again", [False, True])
def test_environment_installs_only_wheels_by_their_hash(*, again: bool) -> None:
    pins = [ROOT / "requirements" / "demo.txt"]
    for command in (
        installers.pip_install(Path("python"), pins, again=again),
        installers.uv_install(Path("uv"), Path("python"), pins, again=again),
    ):
        assert " ".join(HASHED_WHEELS) in " ".join(command)
        assert "--no-deps" in command
        assert command[-2:] == ["--requirement", str(pins[0])]


@pytest.mark.parametrize("uv", [Path("uv"), None])
def test_checkout_is_built_by_the_pinned_backend_alone(uv: Path | None) -> None:
    command = installers.checkout_install(uv, Path("python"), ROOT)
    assert command[-4:] == ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]


class Recorder:
    """Steps of a build that run nothing: `command` is the first one."""

    def __init__(self) -> None:
        self.progress: Any = self
        self.command: list[str] = []

    def line(self, text: str) -> None:
        """Print nothing."""

    def run(self, command: list[str], what: str) -> None:
        """Record a command and end the build."""
        self.command = command
        raise InterruptedError


def test_source_of_llamacpp_is_downloaded_by_its_hash(tmp_path: Path) -> None:
    steps = Recorder()
    with pytest.raises(InterruptedError):
        source_build._fetch_source(tmp_path, steps)  # type: ignore[arg-type]
    assert steps.command[1:4] == ["-m", "pip", "download"]  # pip compiles nothing then
    assert {"--require-hashes", "--no-deps", "--no-build-isolation"} <= set(steps.command)
    assert steps.command[steps.command.index("--no-binary") + 1] == "llama-cpp-python"
    (line,) = Path(steps.command[steps.command.index("-r") + 1]).read_text().splitlines()
    assert re.fullmatch(r"llama-cpp-python==[\d.]+ --hash=sha256:[0-9a-f]{64}", line)


def test_no_other_file_installs_packages() -> None:
    """In Python, the words of a command stand in a list: pip and its command, with at most an option between."""
    text = {path: path.read_text("utf-8") for pattern in TEXT for path in ROOT.glob(pattern)}
    assert [str(path) for path, text in text.items() if re.search(r"pip3? (install|download|wheel|sync)", text)] == []
    code = [*(ROOT / "tutor").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    words = re.compile(r"""["'](pip|npm)["'], *["'](install|download|wheel|sync)["']""")
    found = {path.relative_to(ROOT).as_posix() for path in code if words.search(path.read_text("utf-8"))}
    assert found == {"scripts/environment/installers.py", "tutor/engines/llamacpp/source_build.py"}


def test_lock_resolves_only_packages_with_a_wheel() -> None:
    text = (ROOT / "scripts" / "lock").read_text("utf-8").replace("\\\n", "")
    command = shlex.split(next(line for line in text.splitlines() if "uv pip compile" in line))
    assert {"--no-build", "--generate-hashes", "--no-emit-index-url"} <= set(command)


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_every_pin_has_a_version_and_hashes(path: Path) -> None:
    text = path.read_text("utf-8").replace("\\\n", "")
    pins = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert pins
    pattern = re.compile(r"[\w.-]+(\[[\w,]+\])?==\S+( ; [^;]+?)?(\s+--hash=sha256:[0-9a-f]{64})+")
    assert [line for line in pins if not pattern.fullmatch(line.strip())] == []
