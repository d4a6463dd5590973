"""Fake `uv` and `pip install` in a checkout with the real set-up scripts: no network, no real packages."""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.processes.command import ROOT, environment

UV = """\
import os, sys, time
from pathlib import Path
with open("calls", "a") as file:
    file.write(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
if sys.argv[1:] == ["cache", "dir"]:
    print(os.environ.get("FAKE_CACHE", os.getcwd()))
    sys.exit()
if "--editable" in sys.argv:
    sys.exit()
print(open("answer").read(), flush=True)
if Path("wait").exists():
    time.sleep(60)
sys.exit(int(Path("code").read_text()))
"""
ANSWER = """\
Resolved 3 packages in 10ms
Downloading torch (514.2MiB)
Downloading triton (272.5MiB)
 Downloaded triton
 Downloaded torch
Prepared 3 packages in 1.53s
Installed 3 packages in 886ms
"""
"""Output of uv 0.13.9 where its stderr is no terminal, shortened."""
PYTHON = """\
#!/bin/sh
[ "$1 $2 $3" = "-m pip install" ] && shift 2 && exec "$(dirname "$0")/pip" "$@"
exec {python} "$@"
"""
"""Python of the virtual environment: the real one, with the fake as `pip install`."""
TOOL = """\
import os, sys, time
from pathlib import Path
name = Path(__file__).stem
with open("calls", "a") as file:
    file.write(f"{name}\\n")
if Path(f"{name}.wait").exists():
    print("llama.cpp: 3 of 120", file=sys.stderr, flush=True)
    time.sleep(60)
if Path(f"{name}.error").exists():
    print("Error:", Path(f"{name}.error").read_text(), file=sys.stderr)
    sys.exit(4)
folder = Path.cwd() / "cache" / name
folder.mkdir(parents=True, exist_ok=True)
(folder / ("BUILD.json" if "llamacpp" in name else "INSTALL.json")).touch()
print(folder)
"""


@dataclass(frozen=True)
class Checkout:
    """A folder with the set-up's scripts, the Makefile, small pins, and a .venv that holds pip and the fake uv."""

    folder: Path

    def set_answer(self, answer: str, code: int) -> None:
        """Let uv and pip print `answer` and exit with `code`."""
        (self.folder / "answer").write_text(answer, "utf-8")
        (self.folder / "code").write_text(str(code), "utf-8")

    def calls(self) -> list[str]:
        """Return the commands of uv and of the tools' scripts since the last look."""
        path = self.folder / "calls"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def command(self, *arguments: str) -> list[str]:
        """Return the command of the real script."""
        return [sys.executable, str(self.folder / "scripts" / "install.py"), *arguments]

    def install(self, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """Run the real script to its end."""
        return self._run(self.command(*arguments), env)

    def make(self, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
        """Run make to its end."""
        return self._run(["make", f"PYTHON={sys.executable}", *arguments], env)

    def _run(self, command: list[str], env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
        plain = {name: value for name, value in environment().items() if not name.startswith(("MAKE", "MFLAGS"))}
        return subprocess.run(
            command, cwd=self.folder, env=plain | env, capture_output=True, text=True, timeout=120, check=False
        )


def make_checkout(folder: Path) -> Checkout:
    """Make a checkout whose virtual environment is whole: bin/python has pip, bin/uv and pip install are fakes."""
    scripts = folder / "scripts"
    shutil.copytree(ROOT / "scripts" / "environment", scripts / "environment", ignore=shutil.ignore_patterns("__py*"))
    for name in ("scripts/install.py", "Makefile", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder / name)
    for name in ("build_llamacpp.py", "install_typescript.py"):
        (scripts / name).write_text(TOOL, "utf-8")
    (folder / "requirements").mkdir()
    for name in ("base", "wheel", "build", "train", "demo", "dev", "uv"):
        (folder / "requirements" / f"{name}.txt").write_text(f"{name}-package==1.0 \\\n    --hash=sha256:00\n", "utf-8")
    checkout = Checkout(folder)
    checkout.set_answer(ANSWER, 0)
    bin_folder = folder / ".venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("uv", "pip"):
        _program(bin_folder / name, f"#!{sys.executable}\n{UV}")
    _program(bin_folder / "python", PYTHON.format(python=sys.executable))
    digest = hashlib.sha256()
    for name in ("requirements/uv.txt", "pyproject.toml"):
        digest.update((folder / name).read_bytes() + b"\0")
    (folder / ".venv" / "installer").write_text(digest.hexdigest(), "utf-8")
    os.utime(folder / "pyproject.toml", (0, 0))
    return checkout


def _program(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")
    path.chmod(0o755)
