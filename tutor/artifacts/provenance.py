"""The code, assets and package versions that a result depends on, computed from the imports of one module.

In: a module of tutor/, such as a stage's. Out: its Provenance: a hash of each file that it reaches, the version of each
package that those files import, and both as key fields. Imports no module, so that the code's hash is the same without
torch. Comments and docstrings are not hashed, and no file name is in the key: a better wording or a moved module makes
no stage stale.
"""

import importlib.metadata
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tutor.artifacts.hashing import file_sha256, json_sha256
from tutor.artifacts.source import SourceReader

PACKAGE = Path(__file__).parents[1]

LEFT_OUT = ("errors.py", "recipe", "artifacts", "machine/host.py", "machine/run_cost.py", "engines/llamacpp/build.py")
"""Files and folders that are not followed. Settings, inputs and the llama.cpp build are key fields themselves; errors,
disk access, the description of the host and the estimate of disk space change no result."""

NO_EFFECT = frozenset({"filelock", "platformdirs", "pyarrow", "openpyxl"})
"""Packages that find and lock folders, and that read a table's rows as they are: no result depends on their version."""

DISTRIBUTIONS = {"lingua": "lingua-language-detector", "markdown_it": "markdown-it-py", "pynvml": "nvidia-ml-py"}
"""Distribution by import name, where the names differ; importlib.metadata takes 0.3 s to list all."""

SCRIPTS = "src"
"""Subfolder of files that a module hands to other programs. A module that names one depends on it."""

SHIPPED = ("Modelfile.j2",)
"""Files at the top of the checkout that the wheel holds inside tutor/."""


@dataclass(frozen=True)
class Provenance:
    """What a result depends on beside its inputs and settings."""

    sources: dict[str, str]  # file below tutor/ -> hash of its content
    packages: dict[str, str]  # distribution -> version
    left_out: frozenset[str]  # files that were reached and not followed
    code: str  # hash of the sources and of which uses which, independent of their names

    @property
    def versions(self) -> dict[str, str]:
        """The version of each package, as key fields."""
        return {f"version.{name}": version for name, version in self.packages.items()}

    @property
    def fields(self) -> dict[str, str]:
        """The key fields: the hash of the code, and the version of each package."""
        return {"code": self.code, **self.versions}


class SourceTree:
    """The files of a package, each read once; what each needs and the versions of other packages, each found once."""

    def __init__(self, cache: Path | None = None, *, package: Path = PACKAGE) -> None:
        """`cache` is the JSON file that remembers what was read of each source (None: this process's memory alone)."""
        self._reader = SourceReader(cache)
        self._package = package
        self._imports: dict[Path, list[tuple[str, list[Path]]]] = {}
        self._needs: dict[Path, set[Path]] = {}
        self._contents: dict[Path, str] = {}
        self._versions: dict[str, str] = {}

    def provenance(self, module: str | Path, *, left_out: Collection[str] = LEFT_OUT) -> Provenance:
        """What a module depends on; `module` (or its file) and `left_out` are paths below the package.

        Raises ArtifactError for a source that cannot be read.
        """
        found, skipped = self.reach(self._package / module, left_out=left_out)
        contents = {self._name(path): self._content(path) for path in found}
        packages = {name for path in found for name in self._packages(path)} - NO_EFFECT
        self._reader.remember()
        return Provenance(
            {name: content for name, content in sorted(contents.items()) if content},
            {name: self.version(name) for name in sorted(packages)},
            frozenset(map(self._name, skipped)),
            json_sha256(sorted(self._with_needs(path, found) for path in found if self._content(path)))[:16],
        )

    def reach(self, entry: Path, *, left_out: Collection[str] = LEFT_OUT) -> tuple[set[Path], set[Path]]:
        """The files that `entry` depends on, itself included, and those that were met and left out."""
        ignored = {self._package / name for name in left_out}
        found: set[Path] = set()
        skipped: set[Path] = set()
        waiting = {entry}
        while waiting:
            path = waiting.pop()
            if not ignored.isdisjoint({path, *path.parents}):
                skipped.add(path)
                continue
            found.add(path)
            needs = self._needed_by(path)
            if path.parent.is_relative_to(entry.parent) and entry.is_relative_to(self._package):
                needs = needs | set(_other_files(path.parent))
            waiting |= needs - found - skipped
        return found, skipped

    def _needed_by(self, path: Path) -> set[Path]:
        """The files that a file's imports and strings name; none for a file that is not Python."""
        if path.suffix != ".py":
            return set()
        if path not in self._needs:
            imported = {file for _, files in self._imported(path) for file in files}
            self._needs[path] = imported | {*self._assets(path)}
        return self._needs[path]

    def _imported(self, path: Path) -> list[tuple[str, list[Path]]]:
        """Each imported name with its files, the one that holds it last: of the package, or scripts beside a script."""
        if path not in self._imports:
            self._imports[path] = list(self._find_imported(path))
        return self._imports[path]

    def _find_imported(self, path: Path) -> Iterator[tuple[str, list[Path]]]:
        for name in self._reader.source(path).imports:
            parts = name.split(".")
            if name.startswith("."):
                dots = len(name) - len(name.lstrip("."))
                above = path.parents[dots - 1].relative_to(self._package).parts
                yield name, list(_module_files(self._package, [*above, *filter(None, parts)]))
            elif parts[0] == self._package.name:
                yield name, list(_module_files(self._package, parts[1:]))
            elif (script := _script(path, parts[0])) is not None:
                yield name, [script]

    def _assets(self, path: Path) -> Iterator[Path]:
        """Files beside the module, in its SCRIPTS folder, or shipped with the package."""
        for name in self._reader.source(path).names:
            for asset in (path.parent / name, path.parent / SCRIPTS / name):
                if (asset.suffix != ".py" or asset.parent.name == SCRIPTS) and asset.is_file():
                    yield asset
            if name in SHIPPED:
                installed, checkout = self._package / name, self._package.parent / name
                yield installed if installed.is_file() else checkout

    def _packages(self, path: Path) -> Iterator[str]:
        """The distributions that a file imports."""
        for name in self._reader.source(path).imports if path.suffix == ".py" else ():
            top = name.partition(".")[0]
            if top not in {"", self._package.name} and _script(path, top) is None:
                yield DISTRIBUTIONS.get(top, top)

    def _content(self, path: Path) -> str:
        if path not in self._contents:
            is_python = path.suffix == ".py"
            self._contents[path] = self._reader.source(path).content if is_python else file_sha256(path)[:16]
        return self._contents[path]

    def _with_needs(self, path: Path, found: set[Path]) -> list[str]:
        """The content of a file, and of each file that it needs: an import may change where no content does."""
        names = self._imported(path) if path.suffix == ".py" else []
        used = [f"{name.rpartition('.')[2]} {self._content(files[-1])}" for name, files in names if files[-1] in found]
        return [self._content(path), *sorted(used)]

    def version(self, name: str) -> str:
        """A package's version, or "not installed"."""
        if name not in self._versions:
            self._versions[name] = version_text(name)
        return self._versions[name]

    def _name(self, path: Path) -> str:
        """A file's name below the package, equal in a checkout and in an installed wheel."""
        base = self._package if path.is_relative_to(self._package) else self._package.parent
        return path.relative_to(base).as_posix()


def _module_files(package: Path, parts: list[str]) -> Iterator[Path]:
    """The file of a dotted name, whose last part may be a name in it, and each __init__.py on the way."""
    folder = package
    for part in parts:
        yield folder / "__init__.py"
        if (module := folder / f"{part}.py").is_file():
            yield module
            return
        if not (folder / part / "__init__.py").is_file():
            return
        folder /= part
    yield folder / "__init__.py"


def _script(path: Path, name: str) -> Path | None:
    """The script that another script imports by name."""
    script = path.with_name(f"{name}.py")
    return script if path.parent.name == SCRIPTS and script.is_file() else None


def _other_files(folder: Path) -> Iterator[Path]:
    """The files of a folder that are not Python, without hidden ones."""
    return (path for path in folder.iterdir() if path.suffix != ".py" and path.name[0] != "." and path.is_file())


def installed_version(package: str) -> str | None:
    """A package's version; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def version_text(package: str) -> str:
    """A package's version, or "not installed"."""
    return installed_version(package) or "not installed"
