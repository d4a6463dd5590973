"""A stage folder is whole or absent after a kill, an error, or a full disk."""

import errno
import os
import platform
import resource
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.outputs.stage_folders import names_beside, read_stage, write_stage
from support.processes.kills import in_child, killed_at

from tutor.artifacts.hashing import HASHES, cached_sha256, file_sha256, json_sha256, known_sha256, remember_sha256
from tutor.artifacts.lock import locked
from tutor.artifacts.manifest import find_damage, require_stage
from tutor.artifacts.stage_folder import RESUME, checkpoint_folder, writing
from tutor.errors import ArtifactError, GateError, HostError, RecipeError

# Whole or absent


def test_writing_leaves_a_manifest_of_fields_and_outputs(tmp_path, monkeypatch):
    times = iter([1000.0, 1012.3456])
    monkeypatch.setattr(os, "times", lambda: SimpleNamespace(elapsed=next(times)))
    write_stage(tmp_path / "data", number=1)
    manifest = require_stage(tmp_path / "data", "data")
    assert manifest.fields == {"text": "new", "number": 1}
    assert manifest.key == json_sha256(manifest.fields)
    assert sorted(manifest.outputs) == ["below/file.txt", "top.txt"]
    assert manifest.outputs["top.txt"] == {"size": 3, "sha256": file_sha256(tmp_path / "data" / "top.txt")}
    assert manifest.results == {"rows": 1}
    assert manifest.host == platform.node()
    assert manifest.seconds == 12.346
    assert names_beside(tmp_path / "data") == []


def test_manifest_of_a_container_names_the_image(tmp_path, monkeypatch):
    monkeypatch.setenv("TUTOR_IMAGE", "tutor-trainer, image id sha256:ab")
    write_stage(tmp_path / "data")
    assert require_stage(tmp_path / "data", "data").host == f"{platform.node()} (tutor-trainer, image id sha256:ab)"


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, "old"])
def test_writing_killed_at_any_step_leaves_old_or_new_folder(tmp_path, before):
    steps = 0
    while True:
        folder = tmp_path / str(steps) / "data"
        folder.parent.mkdir()
        if before:
            write_stage(folder, before)
        killed = killed_at(steps, partial(write_stage, folder))
        if folder.exists():
            assert read_stage(folder) in (before, "new")
        elif before:
            # Between the two renames: both folders are complete, and the next run renames the old one back.
            assert read_stage(folder.with_name("data.replaced")) == before
            with pytest.raises(GateError), writing(folder, "data", {}):
                raise GateError("no")
            assert read_stage(folder) == before
        write_stage(folder, "newest")
        assert read_stage(folder) == "newest"
        assert names_beside(folder) == []
        if not killed:
            break
        steps += 1
    assert steps > 10


def test_writing_keeps_the_old_folder_until_the_new_is_whole(tmp_path):
    folder = tmp_path / "data"
    write_stage(folder, "old")
    with writing(folder, "data", {}) as (out, _):
        (out / "top.txt").write_text("half")
        assert read_stage(folder) == "old"
    assert (folder / "top.txt").read_text() == "half"


@pytest.mark.parametrize("error", [ValueError("a bug"), GateError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_writing_with_an_error_changes_nothing_and_raises_it(tmp_path, error):
    folder = tmp_path / "data"
    write_stage(folder, "old")
    with pytest.raises(type(error)) as caught, writing(folder, "data", {}):
        raise error
    assert caught.value is error
    assert read_stage(folder) == "old"
    assert names_beside(folder) == []


@pytest.mark.parametrize(
    ("mask", "folder", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640), (0o077, 0o700, 0o600)]
)
def test_writing_gives_files_the_permissions_of_new_ones(tmp_path, mask, folder, file):
    """Libraries make some files with 0600, and copy permissions of others."""
    before = os.umask(mask)
    try:
        with writing(tmp_path / "data", "data", {}) as (out, _):
            (out / "below").mkdir(mode=0o700)
            for name, mode in (("library.txt", 0o600), ("copied.txt", 0o666), ("below/new.txt", None)):
                (out / name).touch()
                (out / name).chmod(mode or file)
    finally:
        os.umask(before)
    found = {path: path.stat().st_mode & 0o777 for path in [tmp_path / "data", *(tmp_path / "data").rglob("*")]}
    assert {path.name: oct(mode) for path, mode in found.items()} == {
        path.name: oct(folder if path.is_dir() else file) for path in found
    }
    assert len(found) == 6


def test_writing_over_a_foreign_folder_raises(tmp_path):
    """`--build ..` with a recipe named like the checkout makes data/ itself the folder of the data stage."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "tutor.jsonl").write_text("years of work")
    with pytest.raises(RecipeError, match="was not made by tutor"):
        write_stage(folder)
    assert (folder / "tutor.jsonl").read_text() == "years of work"
    assert names_beside(folder) == []
    (folder / "tutor.jsonl").unlink()
    write_stage(folder)
    assert read_stage(folder) == "new"


def test_writing_over_a_file_raises(tmp_path):
    (tmp_path / "data").write_text("mine")
    with pytest.raises(RecipeError, match="was not made by tutor: it is a file"):
        write_stage(tmp_path / "data")
    assert (tmp_path / "data").read_text() == "mine"


@pytest.mark.parametrize("manifest", ['{"name": "Mi aplicación", "icons": []}', "", "[]", "null"])
def test_writing_keeps_a_folder_that_may_be_the_users(tmp_path, caplog, manifest):
    """Web applications have a manifest.json; an empty one can be a stage's, after the power failed."""
    for number in (1, 2):
        folder = tmp_path / "report"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "index.html").write_text(f"work {number}")
        (folder / "manifest.json").write_text(manifest)
        write_stage(folder)
        assert read_stage(folder) == "new"
    assert (tmp_path / "report.aside" / "index.html").read_text() == "work 1"
    assert (tmp_path / "report.aside.2" / "index.html").read_text() == "work 2"
    assert f"the folder is now {tmp_path}/report.aside.2" in caplog.text


def test_writing_replaces_a_folder_whose_manifest_is_cut(tmp_path):
    write_stage(tmp_path / "data")
    text = (tmp_path / "data" / "manifest.json").read_text()
    (tmp_path / "data" / "manifest.json").write_text(text[:50])
    write_stage(tmp_path / "data", "newer")
    assert read_stage(tmp_path / "data") == "newer"
    assert names_beside(tmp_path / "data") == []


def test_writing_replaces_a_link_and_leaves_its_target(tmp_path):
    write_stage(tmp_path / "elsewhere", "old")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "data").symlink_to(tmp_path / "elsewhere")
    write_stage(tmp_path / "build" / "data")
    assert read_stage(tmp_path / "build" / "data") == "new"
    assert read_stage(tmp_path / "elsewhere") == "old"


def test_writing_whose_scratch_folder_vanishes_raises(tmp_path):
    def write_into(folder: Path) -> None:
        shutil.rmtree(folder)
        (folder / "file").write_text("x")

    for loses in (shutil.rmtree, write_into):
        removed = pytest.raises(ArtifactError, match=r"data\.partial was removed while it was written")
        with removed, writing(tmp_path / "data", "data", {}) as (out, _):
            loses(out)
        assert list(tmp_path.iterdir()) == []


def test_checkpoint_folder_survives_an_error_until_completion(tmp_path):
    folder = tmp_path / "adapter"
    kept = checkpoint_folder(folder)

    def stop_half_way() -> None:
        with writing(folder, "train", {}) as (out, _):
            assert checkpoint_folder(out) == kept
            kept.mkdir()
            (kept / "half").touch()
            raise GateError("no")

    with pytest.raises(GateError):
        stop_half_way()
    assert names_beside(folder) == ["adapter.checkpoints"]
    with writing(folder, "train", {}) as (out, _):
        assert (kept / "half").exists()
        (out / "top.txt").touch()
    assert names_beside(folder) == []


# Resuming after a kill


def in_steps(folder: Path, text: str = "new") -> list[str]:
    """Write a folder of three files by a stage that resumes; return the files that it wrote this time."""
    wrote = []
    with writing(folder, "merge", {"text": text}, resume=True) as (out, results):
        for name in ("a", "b", "c"):
            done = out / RESUME / name
            if not done.exists():
                (out / name).write_text(text + name)
                done.touch()
                wrote.append(name)
        results["wrote"] = len(wrote)
    assert find_damage(folder, content=True) == []
    assert [path.read_text() for path in sorted(folder.iterdir())[:3]] == [text + name for name in "abc"]
    assert len([*folder.iterdir()]) == 4
    return wrote


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, "old"])
def test_resumed_writing_killed_at_any_step_is_whole_or_absent(tmp_path, before):
    steps, resumed = 0, 0
    while True:
        folder = tmp_path / str(steps) / "merged"
        folder.parent.mkdir()
        if before:
            in_steps(folder, before)
        killed = killed_at(steps, partial(in_steps, folder))
        if folder.exists():
            assert find_damage(folder, content=True) == []
            assert (folder / "a").read_text() in ("olda", "newa")
        resumed += len(in_steps(folder)) < 3
        assert names_beside(folder) == []
        if not killed:
            break
        steps += 1
    assert steps > resumed > 3


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_resumed_writing_reuses_files_of_equal_fields_alone(tmp_path, stop):
    def interrupted(number, content=None, **options):
        """Whether the file was there when the run began; it is written and the run stopped."""
        with writing(tmp_path / "merged", "merge", {"number": number}, **options) as (out, _):
            found.append(sorted(path.name for path in out.iterdir()))
            if content:
                (out / "file").write_text(content)
            raise stop

    found = []
    for number in (1, 1, 2):
        with pytest.raises(type(stop)):
            interrupted(number, "half", resume=True)
        with pytest.raises(type(stop)):
            interrupted(1, resume=True)
    with pytest.raises(type(stop)):
        interrupted(1)
    kept, fresh = [RESUME, "file"], [RESUME]
    assert found == [fresh, kept, kept, kept, fresh, fresh, []]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ArtifactError("no"), ValueError("a bug"), OSError(errno.ENOSPC, "full")])
def test_resumed_writing_with_an_error_leaves_nothing(tmp_path, error):
    def fail():
        with writing(tmp_path / "merged", "merge", {}, resume=True) as (out, _):
            (out / "file").write_text("half")
            raise error

    with pytest.raises((type(error), HostError)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_seal_outputs_takes_hashes_that_the_stage_remembered(tmp_path):
    with writing(tmp_path / "merged", "merge", {}, resume=True) as (out, _):
        for name in ("remembered", "changed", "unknown"):
            (out / name).write_text(name)
        cache = out / RESUME / HASHES
        remember_sha256(out / "remembered", cache, "0" * 64)  # a hash that only the cache can give
        remember_sha256(out / "changed", cache, "0" * 64)
        assert known_sha256(out / "changed", cache) == "0" * 64
        (out / "changed").write_text("since then")
        assert known_sha256(out / "changed", cache) is None
    outputs = require_stage(tmp_path / "merged", "merge").outputs
    assert outputs["remembered"]["sha256"] == "0" * 64
    assert {name: outputs[name]["sha256"] for name in ("changed", "unknown")} == {
        name: file_sha256(tmp_path / "merged" / name) for name in ("changed", "unknown")
    }


# The disk


@pytest.mark.parametrize("kind", ["bytes", "files", "safetensors", "unnamed"])
def test_writing_on_a_full_disk_raises_and_keeps_the_old_folder(small_disk, kind):
    folder = small_disk / "data"
    write_stage(folder, "old")
    no_space = pytest.raises(HostError, match=r"No space left on device; 0\.0 GB are free")
    with no_space as caught, writing(folder, "data", {}) as (out, _):
        fill(out, kind)
    assert caught.value.code == 4
    assert read_stage(folder) == "old"
    assert names_beside(folder) == []


def fill(out: Path, kind: str) -> None:
    """Write more than the disk holds, by writers with different errors."""
    if kind == "bytes":
        (out / "weights").write_bytes(bytes(2_000_000))
    elif kind == "files":
        for number in range(30):
            (out / str(number)).touch()
    elif kind == "safetensors":
        numpy = pytest.importorskip("safetensors.numpy")
        import numpy as np

        numpy.save_file({"weight": np.zeros(500_000, dtype=np.float32)}, out / "model.safetensors")
    else:  # torch.save raises "unexpected pos 576 vs 534"
        try:
            (out / "weights").write_bytes(bytes(2_000_000))
        except OSError:
            raise RuntimeError("unexpected pos") from None


def test_full_disk_allows_locking_and_hashing(small_disk):
    (small_disk / "filler").write_bytes(bytes((1 << 20) - 4096 * 8))
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filler").write_bytes(bytes(2_000_000))
    with locked(small_disk):
        assert cached_sha256(Path(__file__), small_disk / ".hashes.json") == file_sha256(Path(__file__))


def test_writing_on_a_read_only_disk_raises_before_any_work(small_disk):
    write_stage(small_disk / "data")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(HostError, match="Read-only file system"), locked(small_disk):
        pytest.fail("ran without the lock")
    with pytest.raises(HostError, match="Read-only file system"):
        write_stage(small_disk / "data")
    assert cached_sha256(Path(__file__), small_disk / ".hashes.json") == file_sha256(Path(__file__))
    assert read_stage(small_disk / "data") == "new"


def test_writing_stays_on_the_disk_of_the_build_folder(small_disk):
    """The scratch folder is beside the final one: no rename crosses file systems (EXDEV)."""
    write_stage(small_disk / "data")
    write_stage(small_disk / "data", "newer")
    assert read_stage(small_disk / "data") == "newer"


def test_writing_a_file_too_large_raises_host_error(tmp_path):
    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with writing(tmp_path / "data", "data", {}) as (out, _):
            (out / "weights").write_bytes(bytes(3000))

    assert in_child(run) == HostError.code
    assert list(tmp_path.iterdir()) == []


def test_writing_passes_on_errors_of_other_causes(tmp_path):
    refused = OSError(errno.ECONNREFUSED, "Connection refused")
    with pytest.raises(ConnectionRefusedError), writing(tmp_path / "data", "data", {}):
        raise refused
