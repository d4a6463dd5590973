"""The manifest of a folder: what made it, which files it holds, and whether both still hold.

In: a folder, or the key fields that a result depends on. Out: the folder's Manifest, the damage found in the folder,
the key fields that differ. Writes nothing.
"""

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import host_fault, read_json_object
from tutor.artifacts.hashing import file_sha256, json_sha256
from tutor.errors import ArtifactError, HostError

MANIFEST = "manifest.json"

BEGINNING = b'{\n "stage": "'
"""First bytes of a manifest, as `write_json` writes it."""


@dataclass(frozen=True)
class Manifest:
    """What made a folder, and what is in it."""

    stage: str
    key: str  # sha256 over `fields`
    fields: dict[str, Any]  # recipe part, inputs' hashes, versions of code and tools
    outputs: dict[str, dict[str, Any]]  # relative path -> size in bytes, sha256
    results: dict[str, Any]  # small figures that the stage measured
    started: str  # UTC
    seconds: float
    host: str
    sources: dict[str, str] = field(default_factory=dict)  # hash of each file of code; names the files, not in the key

    @property
    def fingerprint(self) -> str:
        """sha256 over the names and contents of the outputs: equal bytes, equal fingerprint, whoever made them."""
        return json_sha256({name: entry["sha256"] for name, entry in self.outputs.items()})

    def has_key_of(self, fields: Mapping[str, Any]) -> bool:
        """Whether the folder was made of exactly these key fields."""
        return self.key == json_sha256(dict(fields))

    def changes(self, fields: Mapping[str, Any], sources: Mapping[str, str]) -> list[str]:
        """The key fields that differ now, one line each; for the code the files that changed."""
        lines = changed_fields(self.fields, fields)
        named = _changed_sources(self.sources, sources)
        if self.fields.get("code") == fields.get("code") or not named:
            return lines
        return sorted([*named, *(line for line in lines if not line.startswith("code: "))])

    def other_fields(self, fields: Mapping[str, Any]) -> list[str]:
        """Names of the given key fields that had another value when the folder was made."""
        return [name for name, value in fields.items() if self.fields.get(name) != value]


def recipe_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a recipe as key fields."""
    return {f"recipe.{name}": value for name, value in settings.items()}


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a whole folder, or None.

    Raises ArtifactError when the file exists and is damaged, HostError when it cannot be read: its folder may be whole.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb"):
            values = read_json_object(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        values = None
    except OSError as error:
        raise host_fault(error, path) or HostError(f"cannot read {path}: {error.strerror}") from None
    try:
        manifest = Manifest(**(values or {}))
    except TypeError:
        manifest = None
    if manifest is None or not _is_well_formed(manifest):
        raise ArtifactError(f"{path} is damaged", "run again the command that made it")
    return manifest


def find_manifest(folder: Path) -> Manifest | None:
    """The manifest of a whole folder; None also when it is damaged, for callers that can do without the folder."""
    try:
        return read_manifest(folder)
    except ArtifactError:
        return None


def _is_well_formed(manifest: Manifest) -> bool:
    """Whether the fields have their types: JSON of any shape can stand in the file."""
    texts = (manifest.stage, manifest.key, manifest.started, manifest.host)
    objects = (manifest.fields, manifest.outputs, manifest.results, manifest.sources)
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(manifest.seconds, int | float)
        and all(isinstance(value, dict) for value in objects)
        and all(map(_is_output, manifest.outputs.values()))
    )


def _is_output(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)


def is_ours(folder: Path) -> bool:
    """Whether tutor made a folder, by the content of its manifest: other programs write a manifest.json, too.

    One that is cut still begins as only tutor's does.
    """
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            start = file.read(len(BEGINNING))
    except OSError:
        return False
    return start == BEGINNING or {"stage", "key", "outputs"} <= (read_json_object(path) or {}).keys()


def find_damage(folder: Path, *, content: bool = False) -> list[str]:
    """Differences between a folder and its manifest: missing files, other sizes, with `content` other hashes."""
    manifest = read_manifest(folder)
    return [f"{folder / MANIFEST} is missing"] if manifest is None else differences(manifest, folder, content=content)


def differences(manifest: Manifest, folder: Path, *, content: bool = False) -> list[str]:
    """Differences between a folder and its manifest, which was read before."""
    problems = []
    for name, entry in manifest.outputs.items():
        path = folder / name
        size = _size(path)
        if size is None:
            problems.append(f"{path} is missing")
        elif size != entry["size"]:
            problems.append(f"{path} has {size} bytes instead of {entry['size']}")
        elif content and file_sha256(path) != entry["sha256"]:
            problems.append(f"{path} has changed since it was made")
    return problems


def _size(path: Path) -> int | None:
    """The size of a file in bytes; None where there is none, or no longer."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def is_made(folder: Path, fields: Mapping[str, Any]) -> bool:
    """Whether a folder is whole and was made of exactly these key fields."""
    manifest = find_manifest(folder)
    return manifest is not None and manifest.has_key_of(fields) and not differences(manifest, folder)


def require_stage(folder: Path, stage: str) -> Manifest:
    """The manifest of a stage that must have run. Raises ArtifactError with the command that makes the folder."""
    manifest, problems = inspect_folder(folder)
    if problems:
        raise ArtifactError(problems[0], f"run: tutor run --until {stage}")
    if manifest is None:
        raise ArtifactError(f"{folder} is not there", f"run: tutor run --until {stage}")
    return manifest


def inspect_folder(folder: Path, *, content: bool = False) -> tuple[Manifest | None, tuple[str, ...]]:
    """The manifest of a folder, None when it is missing or damaged, and the damage as `find_damage` describes it."""
    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        return None, (error.message,)
    return manifest, tuple(differences(manifest, folder, content=content)) if manifest else ()


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The key fields that differ, one line each: name, old value, new value."""
    return [
        f"{name}: {_short(before.get(name))} -> {_short(now.get(name))}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def _changed_sources(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files whose content is new or gone, one line each; a file that was moved is neither."""
    old = {f"code.{name}": value for name, value in before.items() if value not in now.values()}
    new = {f"code.{name}": value for name, value in now.items() if value not in before.values()}
    return changed_fields(old, new) if before else []


def _short(value: Any) -> str:
    text = "(absent)" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:16]}…"
