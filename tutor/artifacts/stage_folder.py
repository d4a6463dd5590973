"""Write a stage folder so that it is whole or absent.

In: a folder, the fields of its key, a `with` block that fills a scratch folder. Out: the folder under its final name;
`manifest.json` is written last, everything is synced, then one rename. A killed run leaves `.partial` and, for a stage
with checkpoints, `.checkpoints`, which stays until the stage is complete. Does not lock: tutor.artifacts.lock does.
"""

import contextlib
import datetime
import itertools
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import disk_fault, open_to_users, read_json_object, remove, sync, write_json
from tutor.artifacts.hashing import HASHES, file_sha256, json_sha256, known_sha256
from tutor.artifacts.manifest import MANIFEST, Manifest, is_ours
from tutor.errors import RecipeError

log = logging.getLogger(__name__)

PARTIAL = ".partial"
OLD = ".replaced"
"""Suffix of the former folder between the two renames of a swap."""
ASIDE = ".aside"
"""Suffix of a folder whose manifest is not readable as tutor's: it is kept, because it may be the user's."""
CHECKPOINTS = ".checkpoints"
LOG = ".log"
LOG_FILES = re.compile(r".*\.log|metrics\.jsonl|events\.out\.tfevents\..*")
"""Names of the files that stages write into their log folders."""
RESUME = ".resume"
"""Subfolder of the scratch folder with what a killed run resumes from; never part of the finished folder."""


def refuse_foreign(folder: Path) -> None:
    """Raise RecipeError for a file, and for a folder that no stage made: replacing it would delete the user's files."""
    if folder.is_symlink() or not folder.exists():
        return
    if not folder.is_dir():
        raise RecipeError(f"{folder} was not made by tutor: it is a file", "give another --build, or move it away")
    if not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise RecipeError(
            f"{folder} was not made by tutor: it holds files and no {MANIFEST}", "give another --build, or move it away"
        )


@contextlib.contextmanager
def writing(
    folder: Path,
    stage: str,
    fields: Mapping[str, Any],
    *,
    sources: Mapping[str, str] | None = None,
    resume: bool = False,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a scratch folder and a dict for the results; on a clean exit both become `folder`, else nothing changes.

    `sources` names the files behind the key field "code". With `resume` the scratch folder of a killed or interrupted
    run with equal fields is used again. An error other than an interrupt still removes the scratch folder.
    Raises HostError when the disk is full or cannot be written, RecipeError when no stage made `folder`, ArtifactError
    when the scratch folder is removed meanwhile.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    key = json_sha256(dict(fields))
    started = datetime.datetime.now(datetime.UTC)
    clock = _Clock()
    refuse_foreign(folder)
    try:
        if not resume or (read_json_object(partial / RESUME / "key.json") or {}).get("key") != key:
            remove(partial)
        _finish_interrupted_swap(folder)
        partial.mkdir(parents=True, exist_ok=True)
        if resume:
            (partial / RESUME).mkdir(exist_ok=True)
            write_json(partial / RESUME / "key.json", {"key": key})
        results: dict[str, Any] = {}
        yield partial, results
        outputs = seal_outputs(partial)
        remove(partial / RESUME)
        manifest = Manifest(
            stage=stage,
            key=key,
            fields=dict(fields),
            outputs=outputs,
            results=results,
            started=started.isoformat(timespec="seconds"),
            seconds=round(clock.seconds(), 3),
            host=_host(),
            sources=dict(sources or {}),
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


def _host() -> str:
    """Name of this machine; in a container of the stack the image too, because the container's name is random."""
    image = os.environ.get("TUTOR_IMAGE")
    return f"{platform.node()} ({image})" if image else platform.node()


class _Clock:
    """Seconds since creation, by a clock that no change of the date affects."""

    def __init__(self) -> None:
        self._start = os.times().elapsed

    def seconds(self) -> float:
        return os.times().elapsed - self._start


def seal_outputs(partial: Path) -> dict[str, dict[str, Any]]:
    """Give every file the permissions of a new one (safetensors writes 0600), and sync it.

    Return size and hash by relative path.
    """
    outputs = {}
    open_to_users(partial)
    for path in sorted(partial.rglob("*")):
        if path.is_relative_to(partial / RESUME):
            continue
        sha256 = known_sha256(path, partial / RESUME / HASHES)  # before chmod, which changes the file's state
        open_to_users(path)
        sync(path)
        if not path.is_dir():
            name = path.relative_to(partial).as_posix()
            sha256 = sha256 or file_sha256(path)
            outputs[name] = {"size": path.stat().st_size, "sha256": sha256}
    return outputs


def _swap(partial: Path, folder: Path) -> None:
    """Replace the old folder by the new one; between the two renames the name is absent, never half written."""
    sync(partial)
    old = folder.with_name(folder.name + OLD)
    if folder.is_symlink() or is_ours(folder):
        folder.rename(old)
    elif folder.exists() and any(folder.iterdir()):
        aside = free_path(folder.with_name(folder.name + ASIDE))
        folder.rename(aside)
        log.warning("the %s of %s is not tutor's, or damaged: the folder is now %s", MANIFEST, folder, aside)
    partial.rename(folder)
    sync(folder.parent)
    remove(old)
    remove(checkpoint_folder(folder))


def free_path(path: Path) -> Path:
    """The first of `path`, `path.2`, `path.3` ... that does not exist."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return next(found for found in itertools.chain([path], numbered) if not os.path.lexists(found))


def checkpoint_folder(folder: Path) -> Path:
    """Folder for what the stage must keep after a kill; removed once the stage is complete."""
    return folder.with_name(folder.name.removesuffix(PARTIAL) + CHECKPOINTS)


def _finish_interrupted_swap(folder: Path) -> None:
    """Rename what a kill between the two renames leaves back to the folder's name."""
    old = folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():
        old.rename(folder)
    remove(old)


def is_log(name: str) -> bool:
    """Whether a file in a log folder has a name that stages give."""
    return LOG_FILES.fullmatch(name) is not None


def remove_logs(folder: Path) -> None:
    """Remove the logs of a former run; other files stay."""
    for path in folder.rglob("*"):
        if is_log(path.name) and not path.is_dir():
            path.unlink()


def log_folder(partial: Path) -> Path:
    """Folder for the logs of a stage that writes `partial`; in no manifest, and kept when the stage fails."""
    return partial.with_name(partial.name.removesuffix(PARTIAL) + LOG)
