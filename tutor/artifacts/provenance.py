"""The code and the package versions that a stage's result depends on, as fields of its key."""

import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

from tutor.artifacts.hashing import file_sha256


def provenance(sources: Iterable[str], packages: Iterable[str]) -> dict[str, str]:
    """Hashes of files of tutor/ and versions of packages, as fields of a key."""
    code = {f"code.{source}": file_sha256(Path(__file__).parents[1] / source)[:16] for source in sources}
    return code | {f"version.{package}": installed_version(package) for package in packages}


def installed_version(package: str) -> str:
    """A package's version, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
