"""Stage folders are whole or absent whatever happens, and have one writer."""

import errno
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kills import in_child, killed_at

from tutor.artifacts.disk import remove, write_json
from tutor.artifacts.hashing import HASHES, cached_sha256, file_sha256, json_sha256, known_sha256, remember_sha256
from tutor.artifacts.lock import locked
from tutor.artifacts.manifest import find_damage, read_manifest, require_stage
from tutor.artifacts.stage_folder import RESUME, checkpoint_folder, writing
from tutor.errors import ArtifactError, GateError, HostError, LockError, RecipeError


def make(folder: Path, text: str = "new", **fields: Any) -> None:
    """Write a stage folder with one file at its top and one below."""
    with writing(folder, "data", {"text": text, **fields}) as (out, results):
        (out / "top.txt").write_text(text)
        (out / "below").mkdir()
        (out / "below" / "file.txt").write_text(text)
        results["rows"] = 1


def content(folder: Path) -> str:
    """What `make` wrote, after a check that folder and manifest agree to the byte."""
    assert find_damage(folder, content=True) == []
    text = (folder / "top.txt").read_text()
    assert (folder / "below" / "file.txt").read_text() == text
    return text


def beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of one MiB and 24 files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m,nr_inodes=24", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


# Whole or absent


def test_a_folder_is_written_with_a_manifest_that_says_what_made_it(tmp_path, monkeypatch):
    times = iter([1000.0, 1012.3456])
    monkeypatch.setattr(os, "times", lambda: SimpleNamespace(elapsed=next(times)))
    make(tmp_path / "data", number=1)
    manifest = require_stage(tmp_path / "data", "data")
    assert manifest.fields == {"text": "new", "number": 1}
    assert manifest.key == json_sha256(manifest.fields)
    assert sorted(manifest.outputs) == ["below/file.txt", "top.txt"]
    assert manifest.outputs["top.txt"] == {"size": 3, "sha256": file_sha256(tmp_path / "data" / "top.txt")}
    assert manifest.results == {"rows": 1}
    assert manifest.host == platform.node()
    assert manifest.seconds == 12.346
    assert beside(tmp_path / "data") == []


@pytest.mark.slow
@pytest.mark.parametrize("before", [None, "old"])
def test_a_kill_at_any_step_leaves_the_old_folder_or_the_new_and_the_next_run_finishes(tmp_path, before):
    steps = 0
    while True:
        folder = tmp_path / str(steps) / "data"
        folder.parent.mkdir()
        if before:
            make(folder, before)
        killed = killed_at(steps, partial(make, folder))
        if folder.exists():
            assert content(folder) in (before, "new")
        elif before:
            # Between the two renames: both are whole, and the next run begins by giving the name back.
            assert content(folder.with_name("data.old")) == before
            with pytest.raises(GateError), writing(folder, "data", {}):
                raise GateError("no")
            assert content(folder) == before
        make(folder, "newest")
        assert content(folder) == "newest"
        assert beside(folder) == []
        if not killed:
            break
        steps += 1
    assert steps > 10


def test_the_old_folder_can_be_read_until_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "data"
    make(folder, "old")
    with writing(folder, "data", {}) as (out, _):
        (out / "top.txt").write_text("half")
        assert content(folder) == "old"
    assert (folder / "top.txt").read_text() == "half"


@pytest.mark.parametrize("error", [ValueError("a bug"), GateError("no"), KeyboardInterrupt(), SystemExit(143)])
def test_an_error_while_writing_changes_nothing_and_is_not_renamed(tmp_path, error):
    folder = tmp_path / "data"
    make(folder, "old")
    with pytest.raises(type(error)) as caught, writing(folder, "data", {}):
        raise error
    assert caught.value is error
    assert content(folder) == "old"
    assert beside(folder) == []


def test_what_is_written_can_be_read_by_another_user(tmp_path):
    before = os.umask(0o077)
    try:
        make(tmp_path / "data")
    finally:
        os.umask(before)
    modes = {
        path.name: oct(path.stat().st_mode & 0o777) for path in [tmp_path / "data", *(tmp_path / "data").rglob("*")]
    }
    assert modes == {
        "data": "0o755",
        "below": "0o755",
        "file.txt": "0o644",
        "top.txt": "0o644",
        "manifest.json": "0o644",
    }


def test_a_folder_that_no_stage_made_is_never_replaced(tmp_path):
    """`--build ..` with a recipe named as the checkout makes data/ itself the data stage's folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "tutor.jsonl").write_text("years of work")
    with pytest.raises(RecipeError, match="was not made by tutor"):
        make(folder)
    assert (folder / "tutor.jsonl").read_text() == "years of work"
    assert beside(folder) == []
    (folder / "tutor.jsonl").unlink()
    make(folder)
    assert content(folder) == "new"


def test_a_folder_that_is_a_link_to_another_disk_is_replaced_and_the_disk_left_alone(tmp_path):
    make(tmp_path / "elsewhere", "old")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "data").symlink_to(tmp_path / "elsewhere")
    make(tmp_path / "build" / "data")
    assert content(tmp_path / "build" / "data") == "new"
    assert content(tmp_path / "elsewhere") == "old"


def test_a_scratch_folder_that_is_removed_meanwhile_is_an_artifact_error(tmp_path):
    def write_into(folder: Path) -> None:
        shutil.rmtree(folder)
        (folder / "file").write_text("x")

    for loses in (shutil.rmtree, write_into):
        removed = pytest.raises(ArtifactError, match=r"data\.partial was removed while it was written")
        with removed, writing(tmp_path / "data", "data", {}) as (out, _):
            loses(out)
        assert list(tmp_path.iterdir()) == []


def test_what_a_stage_keeps_beside_survives_an_error_and_goes_when_it_is_complete(tmp_path):
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
    assert beside(folder) == ["adapter.checkpoints"]
    with writing(folder, "train", {}) as (out, _):
        assert (kept / "half").exists()
        (out / "top.txt").touch()
    assert beside(folder) == []


# Going on after a kill


def in_steps(folder: Path, text: str = "new") -> list[str]:
    """Write a folder of three files whose stage goes on where it was; which of them it wrote this time."""
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
def test_a_stage_that_resumes_is_whole_or_absent_after_a_kill_at_any_step(tmp_path, before):
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
        assert beside(folder) == []
        if not killed:
            break
        steps += 1
    assert steps > resumed > 3


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_what_an_interrupted_run_had_done_comes_back_with_the_same_fields_alone(tmp_path, stop):
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
def test_an_error_of_a_stage_that_resumes_leaves_nothing(tmp_path, error):
    def fail():
        with writing(tmp_path / "merged", "merge", {}, resume=True) as (out, _):
            (out / "file").write_text("half")
            raise error

    with pytest.raises((type(error), HostError)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_hash_that_the_stage_took_while_it_wrote_is_the_manifests(tmp_path):
    with writing(tmp_path / "merged", "merge", {}, resume=True) as (out, _):
        for name in ("told", "changed", "unknown"):
            (out / name).write_text(name)
        cache = out / RESUME / HASHES
        remember_sha256(out / "told", cache, "0" * 64)  # so that one sees that it was not read again
        remember_sha256(out / "changed", cache, "0" * 64)
        assert known_sha256(out / "changed", cache) == "0" * 64
        (out / "changed").write_text("since then")
        assert known_sha256(out / "changed", cache) is None
    outputs = require_stage(tmp_path / "merged", "merge").outputs
    assert outputs["told"]["sha256"] == "0" * 64
    assert {name: outputs[name]["sha256"] for name in ("changed", "unknown")} == {
        name: file_sha256(tmp_path / "merged" / name) for name in ("changed", "unknown")
    }


# The disk


@pytest.mark.parametrize("kind", ["bytes", "files", "safetensors", "unnamed"])
def test_a_full_disk_is_the_machines_fault_and_leaves_the_old_folder(small_disk, kind):
    folder = small_disk / "data"
    make(folder, "old")
    no_space = pytest.raises(HostError, match=r"No space left on device; 0\.0 GB are free")
    with no_space as caught, writing(folder, "data", {}) as (out, _):
        fill(out, kind)
    assert caught.value.code == 4
    assert content(folder) == "old"
    assert beside(folder) == []


def fill(out: Path, kind: str) -> None:
    """Write more than there is room for, as different writers meet it."""
    if kind == "bytes":
        (out / "weights").write_bytes(bytes(2_000_000))
    elif kind == "files":
        for number in range(30):
            (out / str(number)).touch()
    elif kind == "safetensors":
        numpy = pytest.importorskip("safetensors.numpy")
        import numpy as np

        numpy.save_file({"weight": np.zeros(500_000, dtype=np.float32)}, out / "model.safetensors")
    else:  # torch.save says "unexpected pos 576 vs 534"
        try:
            (out / "weights").write_bytes(bytes(2_000_000))
        except OSError:
            raise RuntimeError("unexpected pos") from None


def test_a_full_disk_can_still_be_cleaned_and_looked_at(small_disk):
    (small_disk / "filler").write_bytes(bytes((1 << 20) - 4096 * 8))
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filler").write_bytes(bytes(2_000_000))
    with locked(small_disk):
        assert cached_sha256(Path(__file__), small_disk / ".hashes.json") == file_sha256(Path(__file__))


def test_a_read_only_disk_is_the_machines_fault_before_any_work(small_disk):
    make(small_disk / "data")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(HostError, match="Read-only file system"), locked(small_disk):
        pytest.fail("ran without the lock")
    with pytest.raises(HostError, match="Read-only file system"):
        make(small_disk / "data")
    assert cached_sha256(Path(__file__), small_disk / ".hashes.json") == file_sha256(Path(__file__))
    assert content(small_disk / "data") == "new"


def test_a_build_folder_on_a_disk_of_its_own_is_never_left_for_another(small_disk):
    """The scratch folder lies beside the final one: a rename across file systems (EXDEV) cannot happen."""
    make(small_disk / "data")
    make(small_disk / "data", "newer")
    assert content(small_disk / "data") == "newer"


def test_a_file_that_is_too_large_for_the_file_system_is_the_machines_fault(tmp_path):
    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with writing(tmp_path / "data", "data", {}) as (out, _):
            (out / "weights").write_bytes(bytes(3000))

    assert in_child(run) == HostError.code
    assert list(tmp_path.iterdir()) == []


def test_another_faults_number_is_not_taken_for_the_disks(tmp_path):
    refused = OSError(errno.ECONNREFUSED, "Connection refused")
    with pytest.raises(ConnectionRefusedError), writing(tmp_path / "data", "data", {}):
        raise refused


# Manifests


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"key"', '"kee"'),
        lambda text: text.replace('"stage"', '"older": 1, "stage"'),
        lambda text: json.dumps({**json.loads(text), "outputs": []}),
        lambda text: json.dumps({**json.loads(text), "fields": None}),
        lambda text: "\ufffd" * 1000,
    ],
)
def test_a_damaged_manifest_is_an_artifact_error_that_says_how_to_go_on(tmp_path, damage):
    make(tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ArtifactError, match=f"{path} is damaged; rm -r {tmp_path}/data and run again"):
        read_manifest(tmp_path / "data")


def test_check_sees_what_is_missing_cut_or_flipped(tmp_path):
    folder = tmp_path / "data"
    make(folder)
    (folder / "top.txt").write_text("NEW")
    assert find_damage(folder) == []
    assert find_damage(folder, content=True) == [f"{folder}/top.txt has another content than when it was made"]
    (folder / "top.txt").write_text("ne")
    assert find_damage(folder) == [f"{folder}/top.txt has 2 bytes instead of 3"]
    (folder / "top.txt").unlink()
    assert find_damage(folder) == [f"{folder}/top.txt is missing"]
    (folder / "manifest.json").unlink()
    assert find_damage(folder) == [f"{folder}/manifest.json is missing"]
    assert read_manifest(folder) is None


def test_require_names_a_command_that_makes_the_folder(tmp_path):
    with pytest.raises(ArtifactError, match="is not there; run: tutor run --until train"):
        require_stage(tmp_path / "adapter", "train")
    make(tmp_path / "adapter")
    (tmp_path / "adapter" / "top.txt").write_text("")
    with pytest.raises(ArtifactError, match="has 0 bytes instead of 3; run: tutor run --until train"):
        require_stage(tmp_path / "adapter", "train")


def test_equal_content_has_an_equal_fingerprint_whoever_made_it(tmp_path):
    make(tmp_path / "a", "same", version=1)
    make(tmp_path / "b", "same", version=2)
    make(tmp_path / "c", "other", version=1)
    a, b, c = (require_stage(tmp_path / name, "data") for name in "abc")
    assert a.key != b.key
    assert a.fingerprint == b.fingerprint != c.fingerprint


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(), json_values))
def test_a_digest_depends_on_the_values_and_not_on_their_order(value):
    assert json_sha256(dict(reversed(value.items()))) == json_sha256(value)
    assert json_sha256({**value, "more": 1}) != json_sha256({**value, "more": 2})


@given(value=json_values)
def test_what_write_json_writes_comes_back(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert json.loads(path.read_text("utf-8")) == value


def test_write_json_writes_all_or_nothing(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"name": os.fsdecode(b"ma\xf1ana")})  # a file's name need not be UTF-8
    assert json.loads(path.read_text("utf-8"))["name"] == os.fsdecode(b"ma\xf1ana")
    with pytest.raises(ValueError, match="nan"):
        write_json(path, float("nan"))
    assert "ma" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


# Hashes of inputs


def test_a_hash_is_looked_up_and_made_again_when_the_file_changes(tmp_path):
    file, cache = tmp_path / "weights", tmp_path / "new" / "hashes.json"
    file.write_text("one")
    first = cached_sha256(file, cache)
    write_json(cache, json.loads(cache.read_text().replace(first, "0" * 64)))
    assert cached_sha256(file, cache) == "0" * 64  # so it was not read again
    os.utime(file, (0, 0))
    assert cached_sha256(file, cache) == first
    file.write_text("two")
    assert cached_sha256(file, cache) == file_sha256(file) != first
    second = tmp_path / "second"
    second.write_text("six")
    os.utime(second, ns=(0, file.stat().st_mtime_ns))
    second.replace(file)
    assert cached_sha256(file, cache) == file_sha256(file)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"FILE": 5}', '{"FILE": {}}', '{"FILE": {"seen": "SEEN"}}'])
def test_a_damaged_cache_of_hashes_is_made_again(tmp_path, text):
    file, cache = tmp_path / "rows", tmp_path / "hashes.json"
    file.write_text("one")
    stat = file.stat()
    seen = f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"
    cache.write_text(text.replace("FILE", str(file)).replace("SEEN", seen))
    assert cached_sha256(file, cache) == file_sha256(file)
    assert file_sha256(file) in cache.read_text()


def test_an_unreadable_file_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="cannot read"):
        file_sha256(tmp_path)


# Locks

HOLD = """
import sys, time
from pathlib import Path
from tutor.artifacts.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(start: Any, tmp_path: Path) -> "subprocess.Popen[str]":
    """Another process that holds the lock of `tmp_path/build`."""
    process: subprocess.Popen[str] = start(sys.executable, "-c", HOLD, tmp_path / "build")
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_without_waiting_with_the_holder(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"it waits {seconds} s for the lock"))
    with pytest.raises(LockError) as caught, locked(tmp_path / "build"):
        pytest.fail("both have it")
    assert holder.poll() is None
    assert caught.value.code == 7
    assert f"is in use by process {holder.pid} on {platform.node()} since 20" in caught.value.message


def test_a_killed_holder_blocks_nobody(tmp_path, holder):
    holder.kill()
    holder.wait()
    with locked(tmp_path / "build"):
        assert json.loads((tmp_path / "build" / ".lock.json").read_text())["pid"] == os.getpid()


def test_a_lock_is_freed_by_an_error_and_does_not_rename_it(tmp_path):
    for error in (PermissionError(errno.EACCES, "no"), KeyboardInterrupt(), ArtifactError("no")):
        with pytest.raises(type(error)) as caught, locked(tmp_path):
            raise error
        assert caught.value is error
    assert in_child(lambda: locked(tmp_path).__enter__()) == 0


def test_a_build_folder_that_cannot_be_made_is_the_machines_fault(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match="Not a directory"), locked(tmp_path / "file" / "build"):
        pytest.fail("locked a file")


def test_remove_takes_a_folder_and_leaves_what_a_link_names(tmp_path):
    make(tmp_path / "target")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    remove(tmp_path / "link")
    assert content(tmp_path / "target") == "new"
    remove(tmp_path / "target")
    remove(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []
