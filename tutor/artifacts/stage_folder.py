"""Stage folders: whole or absent, each with a manifest, a key and what made it; one writer a build at a time.

In: a folder, the key's fields, a function that fills a scratch folder. Out: the folder under its final name,
`manifest.json` written last inside, everything synced, then one rename. A killed run leaves a `.partial`, never a half,
and `.checkpoints` where its stage keeps any: what lies there survives until the stage is complete.
"""

import contextlib
import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tutor.errors import ArtifactError, HostError, LockError, RecipeError, TutorError

MANIFEST = "manifest.json"
PARTIAL = ".partial"
OLD = ".old"
CHECKPOINTS = ".checkpoints"
LOG = ".log"
HASHES = ".hashes.json"
RESUME = ".resume"
"""What a stage keeps in its scratch folder to go on from after a kill; no part of the finished folder."""


@dataclass(frozen=True)
class Manifest:
    """What made a folder, and what is in it."""

    stage: str
    key: str  # sha256 over `fields`
    fields: dict[str, Any]  # recipe part, inputs' hashes, versions of code and tools
    outputs: dict[str, dict[str, Any]]  # relative path -> size in bytes, sha256
    results: dict[str, Any]  # what the stage found out; small
    started: str  # UTC
    seconds: float
    host: str

    @property
    def fingerprint(self) -> str:
        """sha256 over the names and contents of the outputs: equal bytes, equal fingerprint, whoever made them."""
        return digest({name: entry["sha256"] for name, entry in self.outputs.items()})


def provenance(sources: Iterable[str], packages: Iterable[str]) -> dict[str, str]:
    """Hashes of files of tutor/ and versions of packages, as fields of a key."""
    code = {f"code.{source}": file_sha256(Path(__file__).parents[1] / source)[:16] for source in sources}
    return code | {f"version.{package}": installed(package) for package in packages}


def installed(package: str) -> str:
    """A package's version, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields that differ, a line each."""
    return [
        f"{name}: {_short(before.get(name))} -> {_short(now.get(name))}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


def _short(value: Any) -> str:
    text = "(absent)" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:16]}…"


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content. Raises ArtifactError when it cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from None


def cached_sha256(path: Path, cache: Path) -> str:
    """sha256 of an input file, looked up by size, mtime and inode: 16 GB of weights are read once, not each time."""
    if known := known_sha256(path, cache):
        return known
    value = file_sha256(path)
    # It only saves time: `tutor status` has to work on a disk that is full or read-only.
    with contextlib.suppress(OSError):
        remember_sha256(path, cache, value)
    return value


def known_sha256(path: Path, cache: Path) -> str | None:
    """What `remember_sha256` was told of a file, as long as its size, mtime and inode are the same."""
    entry = (_read_json(cache) or {}).get(str(path.resolve()))
    if isinstance(entry, dict) and entry.get("seen") == _seen(path) and "sha256" in entry:
        return str(entry["sha256"])
    return None


def remember_sha256(path: Path, cache: Path, value: str) -> None:
    """Keep a file's sha256 for `known_sha256`. Raises OSError when the cache cannot be written."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_json(cache, {**(_read_json(cache) or {}), str(path.resolve()): {"seen": _seen(path), "sha256": value}})


def _seen(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, readable by other users (the next service may have another uid)."""
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    # A path whose name is not UTF-8 has half surrogates, which JSON can only hold escaped.
    data = text.encode("utf-8", "backslashreplace")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as handle:
        try:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
            Path(handle.name).chmod(0o644)
            Path(handle.name).replace(path)
        except BaseException:
            Path(handle.name).unlink(missing_ok=True)
            raise
    sync(path.parent)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a whole folder, or None. Raises ArtifactError when it is there and damaged."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = Manifest(**(_read_json(path) or {}))
    except TypeError:
        manifest = None
    if manifest is None or not all(map(_is_object, (manifest.fields, manifest.outputs, manifest.results))):
        raise ArtifactError(f"{path} is damaged", f"rm -r {folder} and run again")
    return manifest


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def check(folder: Path, *, content: bool = False) -> list[str]:
    """What differs between a folder and its manifest: missing files, other sizes, with `content` other hashes."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder / MANIFEST} is missing"]
    problems = []
    for name, entry in manifest.outputs.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{path} has {path.stat().st_size} bytes instead of {entry['size']}")
        elif content and file_sha256(path) != entry["sha256"]:
            problems.append(f"{path} has another content than when it was made")
    return problems


def require(folder: Path, stage: str) -> Manifest:
    """The manifest of a stage that must have run. Raises ArtifactError naming the command that makes it."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise ArtifactError(f"{folder} is not there", f"run: tutor run --until {stage}")
    if problems := check(folder):
        raise ArtifactError(problems[0], f"run: tutor run --until {stage}")
    return manifest


def refuse_foreign(folder: Path) -> None:
    """Raise RecipeError for a folder that no stage made: it would be replaced or removed with all that is in it."""
    if folder.is_dir() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise RecipeError(
            f"{folder} was not made by tutor: it holds files and no {MANIFEST}", "give another --build, or move it away"
        )


@contextlib.contextmanager
def writing(
    folder: Path, stage: str, fields: Mapping[str, Any], *, resume: bool = False
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a scratch folder and a dict for the results; on a clean exit both become `folder`, else nothing changes.

    With `resume` the scratch folder of a run that was killed or interrupted comes back as it was left, if its fields
    were the same. What the stage keeps there below RESUME is never part of `folder`; an error still removes all of it.
    Raises HostError when the disk is full or cannot be written, RecipeError when `folder` is not one of ours,
    ArtifactError when the scratch folder is removed meanwhile.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    key = digest(dict(fields))
    started = datetime.datetime.now(datetime.UTC)
    clock = _Clock()
    refuse_foreign(folder)
    try:
        if not resume or (_read_json(partial / RESUME / "key.json") or {}).get("key") != key:
            remove(partial)
        _finish_interrupted_swap(folder)
        partial.mkdir(parents=True, exist_ok=True)
        if resume:
            (partial / RESUME).mkdir(exist_ok=True)
            write_json(partial / RESUME / "key.json", {"key": key})
        results: dict[str, Any] = {}
        yield partial, results
        outputs = seal(partial)
        remove(partial / RESUME)
        manifest = Manifest(
            stage=stage,
            key=key,
            fields=dict(fields),
            outputs=outputs,
            results=results,
            started=started.isoformat(timespec="seconds"),
            seconds=round(clock.seconds(), 3),
            host=platform.node(),
        )
        write_json(partial / MANIFEST, asdict(manifest))
        _swap(partial, folder)
    except BaseException as error:
        fault = disk_fault(error, partial)  # before the disk is freed
        if not resume or isinstance(error, Exception):
            remove(partial)
        if fault:
            raise fault from error
        raise


_DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})
_FULL = 1 << 20
"""Bytes: with less left the disk is taken as full, whatever a library made of it (PyTorch does not say why)."""


def disk_fault(error: BaseException, partial: Path) -> TutorError | None:
    """What happened to the disk, when that is why writing ended."""
    if isinstance(error, TutorError) or not isinstance(error, Exception):
        return None
    # Rust libraries (safetensors) have errors of their own, with the number in the text.
    named = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(named[1]) if named else None
    if number in (errno.ENOENT, None) and not partial.exists():
        return ArtifactError(f"{partial} was removed while it was written", "run again")
    try:
        free = shutil.disk_usage(partial.parent).free
    except OSError:
        free = 0
    if number in _DISK_FAULTS or free < _FULL:
        where = getattr(error, "filename", None) or partial
        reason = os.strerror(number) if number in _DISK_FAULTS else os.strerror(errno.ENOSPC)
        return HostError(f"{where}: {reason}", f"{free / 1e9:.1f} GB are free in {partial.parent}")
    return None


class _Clock:
    """Seconds since it was made, whatever happens to the wall clock."""

    def __init__(self) -> None:
        self._start = os.times().elapsed

    def seconds(self) -> float:
        return os.times().elapsed - self._start


def seal(partial: Path) -> dict[str, dict[str, Any]]:
    """Make all in it readable (safetensors writes 0600), sync it, and record each file's size and hash."""
    outputs = {}
    partial.chmod(0o755)
    for path in sorted(partial.rglob("*")):
        if path.is_relative_to(partial / RESUME):
            continue
        path.chmod(0o755 if path.is_dir() else 0o644)
        sync(path)
        if not path.is_dir():
            name = path.relative_to(partial).as_posix()
            sha256 = known_sha256(path, partial / RESUME / HASHES) or file_sha256(path)
            outputs[name] = {"size": path.stat().st_size, "sha256": sha256}
    return outputs


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(partial: Path, folder: Path) -> None:
    """Put the new folder in place of the old one: between the two renames the name is absent, never half."""
    sync(partial)
    old = folder.with_name(folder.name + OLD)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    sync(folder.parent)
    remove(old)
    remove(checkpoints(folder))


def checkpoints(folder: Path) -> Path:
    """Where the stage that writes `folder` may keep what a killed run must not lose; gone once it is complete."""
    return folder.with_name(folder.name.removesuffix(PARTIAL) + CHECKPOINTS)


def _finish_interrupted_swap(folder: Path) -> None:
    """A kill between the two renames leaves `.old`: the whole older folder gets its name back."""
    old = folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():
        old.rename(folder)
    remove(old)


def log_folder(partial: Path) -> Path:
    """Where a stage that writes `partial` says how it goes: beside it, part of no manifest, and there when it fails."""
    return partial.with_name(partial.name.removesuffix(PARTIAL) + LOG)


def remove(path: Path) -> None:
    """Remove a folder where there is one."""
    if path.is_symlink():  # to another disk: the link goes, what it names stays
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a build folder. Raises LockError at once, with the holder, when another run has it.

    The kernel frees the lock when its holder ends, so that a killed run never blocks the next one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(
            f"cannot make {folder}: {error.strerror}", "give --build a folder that can be written"
        ) from None
    lock, holder = FileLock(folder / ".lock"), folder / ".lock.json"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = {"pid": "?", "host": "?", "since": "?"} | (_read_json(holder) or {})
        raise LockError(
            f"{folder} is in use by process {who['pid']} on {who['host']} since {who['since']}",
            "wait for it, or end it",
        ) from None
    except OSError as error:
        raise HostError(
            f"cannot write {folder}: {error.strerror}", "give --build a folder that can be written"
        ) from None
    try:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        # Only for the message above: a full disk must not keep `tutor clean` from emptying it.
        with contextlib.suppress(OSError):
            write_json(holder, {"pid": os.getpid(), "host": platform.node(), "since": now})
        yield
    finally:
        lock.release()
