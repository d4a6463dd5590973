"""stages/train/checkpoint.py: intact checkpoints of this training are resumed from, others are quarantined or refused.

docs/facts.md, 6, has the reasons.
"""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.processes.kills import killed_at

from tutor.artifacts.disk import remove
from tutor.artifacts.provenance import Provenance
from tutor.errors import ArtifactError, HostError
from tutor.prompt.encoding import Encoded
from tutor.recipe.settings import TrainSettings
from tutor.stages.train import checkpoint
from tutor.stages.train.checkpoint import (
    Progress,
    TrainingRun,
    first_damage,
    newest_checkpoint,
    resume,
    seal,
    training_fields,
)

CODE = Provenance({"stages/train/stage.py": "0" * 16}, {"torch": "2.13"}, frozenset(), code="1" * 16)
FILES = sorted(checkpoint.required_files(1))
ROWS = {"train": [Encoded([1, 5, 6, 2], [0, 0, 1, 1]), Encoded([1, 7, 2], [0, 1, 1])], "held_out": []}


def progress(step: int) -> Progress:
    return Progress(step, steps=12, seconds=1.5, loss=0.1 + step, logged=step - 1, batch_size=2, accumulation=4)


def fields(**changes: Any) -> dict[str, Any]:
    return training_fields(
        TrainSettings().model_dump() | changes, ROWS, CODE, seed=1, base="b" * 64, precision="fp32", device="cpu"
    )


@pytest.fixture
def training(tmp_path: Path) -> TrainingRun:
    """A training run with one line of metrics."""
    (tmp_path / "adapter.partial").mkdir()
    (tmp_path / "adapter.partial" / "metrics.jsonl").write_text('{"step": 1}\n')
    return TrainingRun(tmp_path / "adapter.partial", {"rows.train": "a", "version.torch": "2.13"})


def write(training: TrainingRun, step: int) -> Path:
    """Write the files that a trainer saves; without a manifest they are no checkpoint."""
    folder = training.folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in (*FILES, "adapter_config.json"):
        (folder / name).write_bytes(f"{name} of step {step}".encode() * 3)
    return folder


def save(training: TrainingRun, step: int) -> Path:
    write(training, step)
    return seal(training, progress(step))


def quarantined(training: TrainingRun) -> list[str]:
    place = training.folder / "quarantine"
    return sorted(path.name for path in place.iterdir()) if place.exists() else []


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# --- intact checkpoints ----------------------------------------------------------------------------------------------


def test_resume_restores_the_stage_files_of_the_checkpoint(training: TrainingRun) -> None:
    assert resume(training) is None
    saved = save(training, 4)
    (training.out / "metrics.jsonl").unlink()
    assert resume(training) == (saved, progress(4))
    assert (training.out / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert quarantined(training) == []
    assert (
        checkpoint.size(saved)
        == sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        - (saved / "manifest.json").stat().st_size
    )


def test_newest_checkpoint_has_highest_step_not_latest_time(training: TrainingRun) -> None:
    for step, day in ((9, 5), (10, 1)):
        for path in (*save(training, step).rglob("*"), training.folder / f"checkpoint-{step}"):
            os.utime(path, (86_400 * day, 86_400 * day))
    assert newest_checkpoint(training) == (training.folder / "checkpoint-10", progress(10))


def test_seal_keeps_two_checkpoints_and_removes_older_ones(training: TrainingRun) -> None:
    for step in (8, 9, 10, 11):
        save(training, step)
    assert sorted(path.name for path in training.folder.iterdir()) == ["checkpoint-10", "checkpoint-11"]


def test_seal_with_missing_trainer_file_raises_error(training: TrainingRun) -> None:
    (write(training, 4) / "optimizer.pt").unlink()
    with pytest.raises(ArtifactError, match=r"checkpoint-4 without optimizer\.pt"):
        seal(training, progress(4))


def test_stage_files_are_no_second_adapter_for_the_trainer(training: TrainingRun) -> None:
    (training.out / "adapter_model.safetensors").write_bytes(b"the best so far")
    saved = save(training, 4)
    # transformers loads every adapter in a folder directly below a checkpoint.
    assert not list(saved.glob("*/adapter_model.safetensors"))
    assert newest_checkpoint(training) == (saved, progress(4))


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path, place: int = 5, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda folder: [path.unlink() for path in folder.rglob("*") if path.is_file()],
    "a file in its place": lambda folder: (remove(folder), folder.touch()),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: cut(folder / "manifest.json"),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "a manifest of nothing": lambda folder: (folder / "manifest.json").write_text("{}"),
    "a manifest of strange text": lambda folder: edit(
        folder / "manifest.json", lambda value: value["fields"].update(x="\ud800")
    ),
    "a manifest of another step": lambda folder: edit(
        folder / "manifest.json", lambda value: value["results"].update(step=9)
    ),
    "another step's folder": lambda folder: (
        remove(folder),
        (folder.parent / "checkpoint-4").rename(folder),
        save(TrainingRun(folder.parent.with_name("adapter.partial"), {"rows.train": "a", "version.torch": "2.13"}), 4),
    ),
    "a strange pickle": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"\x80\x04."),
    "a strange file below": lambda folder: (folder / "stage" / "adapter_model.bin").touch(),
    "metrics changed": lambda folder: flip(folder / checkpoint.STAGE_FILES / "metrics.jsonl"),
    **{f"no {name}": partial(lambda name, folder: (folder / name).unlink(), name) for name in FILES},
    **{f"{name} cut": partial(lambda name, folder: cut(folder / name), name) for name in FILES},
    **{f"{name} empty": partial(lambda name, folder: (folder / name).write_bytes(b""), name) for name in FILES},
    **{f"{name} flipped": partial(lambda name, folder: flip(folder / name), name) for name in FILES},
    "adapter_config.json cut": lambda folder: cut(folder / "adapter_config.json"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_is_quarantined_and_older_one_used(
    kind: str, training: TrainingRun, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(training, 4), save(training, 8)
    DAMAGES[kind](newer)
    assert newest_checkpoint(training) == (older, progress(4))
    assert quarantined(training) == ["checkpoint-8"]
    assert not newer.exists()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "checkpoint-8" in warnings[0]
    assert warnings[0].endswith(f"kept as {training.folder}/quarantine/checkpoint-8")


@pytest.mark.parametrize("left", [1, 2])
def test_no_intact_checkpoint_starts_from_beginning_and_logs(
    left: int, training: TrainingRun, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (4, 8)[:left]:
        flip(save(training, step) / "optimizer.pt")
    assert resume(training) is None
    assert len(quarantined(training)) == left
    assert "training starts from the beginning" in caplog.text
    assert resume(training) is None  # and the message is not repeated


def test_quarantine_of_the_same_step_twice_keeps_both(training: TrainingRun) -> None:
    for _ in range(3):
        flip(save(training, 4) / "optimizer.pt")
        assert newest_checkpoint(training) is None
    assert quarantined(training) == ["checkpoint-4", "checkpoint-4.2", "checkpoint-4.3"]


def test_foreign_files_in_checkpoint_folders_are_ignored(training: TrainingRun) -> None:
    saved = save(training, 4)
    (saved / ".nfs0001").touch()
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-0", "checkpoint-04", "README.md"):
        (training.folder / name).mkdir()
    assert newest_checkpoint(training) == (saved, progress(4))
    assert quarantined(training) == []


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_manifest_bit_never_changes_the_training(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("flipped") / "adapter.partial"
    out.mkdir()
    (out / "metrics.jsonl").write_text("{}\n")
    training = TrainingRun(out, {"rows.train": "a", "target": ["q", "ñ"], "rate": 0.1})
    older, newer = save(training, 4), save(training, 8)
    path = data.draw(st.sampled_from(sorted(path for path in newer.rglob("*") if path.is_file())), "file")
    place = data.draw(st.integers(0, path.stat().st_size - 1), "byte")
    flip(path, place, data.draw(st.integers(0, 7), "bit"))
    # A flip in an unused field (the manifest's date and host) may pass; it changes nothing.
    assert newest_checkpoint(training) in ((older, progress(4)), (newer, progress(8)))
    assert path.name == "manifest.json" or quarantined(training) == ["checkpoint-8"]


# --- killed during a save --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_at_any_step_of_seal_loses_no_checkpoint(tmp_path: Path) -> None:
    steps = 0
    while True:
        out = tmp_path / str(steps) / "adapter.partial"
        out.mkdir(parents=True)
        (out / "metrics.jsonl").touch()
        training = TrainingRun(out, {"rows.train": "a"})
        for step in (4, 8):
            save(training, step)
        killed = killed_at(steps, partial(save, training, 12))
        latest = training.folder / "checkpoint-12"
        sealed = (latest / "manifest.json").exists()
        if sealed:
            assert first_damage(latest) is None  # the manifest is written last
        left = quarantined(training)
        assert left == []
        found = newest_checkpoint(training)
        assert found == ((latest, progress(12)) if sealed else (training.folder / "checkpoint-8", progress(8)))
        # Never the state of a checkpoint that was removed because it was old.
        assert quarantined(training) in ([], ["checkpoint-12"])
        again = 12 if not sealed else 16
        save(training, again)
        assert newest_checkpoint(training) == (training.folder / f"checkpoint-{again}", progress(again))
        if not killed:
            break
        steps += 1
    assert steps > 20


def test_kill_during_quarantine_loses_no_checkpoint(tmp_path: Path) -> None:
    for steps in range(6):
        out = tmp_path / str(steps) / "adapter.partial"
        out.mkdir(parents=True)
        training = TrainingRun(out, {})
        save(training, 4)
        flip(save(training, 8) / "optimizer.pt")
        killed_at(steps, partial(newest_checkpoint, training))
        assert newest_checkpoint(training) == (training.folder / "checkpoint-4", progress(4))
        assert quarantined(training) == ["checkpoint-8"]


def test_discard_unfinished_removes_only_unsealed_checkpoints(training: TrainingRun) -> None:
    saved = save(training, 4)
    write(training, 8)
    checkpoint.discard_unfinished(training)
    assert [path.name for path in training.folder.iterdir()] == [saved.name]


# --- checkpoints of another training ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"learning_rate": 1e-3}, "train.learning_rate: 0.0002 -> 0.001"),
        ({"rank": 4}, "train.rank: 8 -> 4"),
        ({"max_length": 512}, "train.max_length: 1024 -> 512"),
        (
            {"target_modules": ["q_proj"]},
            r"train.target_modules: \['q_proj', 'k_proj', 'v_proj', 'o_proj'\] -> \['q_proj'\]",
        ),
        ({"batch_size": 2}, "batch_size x accumulation: 10 -> 20"),
        ({"epochs": 7, "alpha": 8}, "train.alpha: 16 -> 8; train.epochs: 6 -> 7"),
    ],
)
def test_changed_setting_is_refused_with_its_name(
    changed: dict[str, Any], expected: str, training: TrainingRun
) -> None:
    save(replace(training, fields=fields()), 4)
    with pytest.raises(
        ArtifactError, match=rf"checkpoint-4 \(of 12 steps\) is of another training: {expected}"
    ) as caught:
        newest_checkpoint(replace(training, fields=fields(**changed)))
    assert caught.value.code == 5
    assert "tutor clean train" in str(caught.value)
    assert quarantined(training) == []  # it is intact, and the user may want to go back to it
    assert newest_checkpoint(replace(training, fields=fields())) is not None


@pytest.mark.parametrize(
    "name", ["rows.train", "rows.held_out", "seed", "base", "precision", "device", "version.torch"]
)
def test_changed_rows_base_machine_or_version_is_refused(name: str, training: TrainingRun) -> None:
    save(replace(training, fields=fields()), 4)
    assert name in fields()
    with pytest.raises(ArtifactError, match=f"is of another training: {name}: "):
        newest_checkpoint(replace(training, fields=fields() | {name: "other"}))


def test_saved_precision_is_of_the_newest_readable_checkpoint(training: TrainingRun) -> None:
    assert checkpoint.saved_precision(training.folder) is None
    save(replace(training, fields=fields() | {"precision": "bf16"}), 8)
    (save(replace(training, fields=fields()), 12) / "manifest.json").write_text("{")
    write(training, 16)  # killed before its manifest
    assert checkpoint.saved_precision(training.folder) == "bf16"


def test_saved_precision_of_a_damaged_checkpoint_is_none(training: TrainingRun) -> None:
    save(replace(training, fields={"device": "cpu"}), 4)
    assert checkpoint.saved_precision(training.folder) is None


def test_saved_precision_of_a_gpu_is_not_kept(training: TrainingRun) -> None:
    save(replace(training, fields=fields() | {"device": "cuda", "precision": "fp16"}), 4)
    assert checkpoint.saved_precision(training.folder) is None


def test_many_differences_are_cut_to_one_short_line(training: TrainingRun) -> None:
    save(replace(training, fields=fields()), 4)
    with pytest.raises(ArtifactError, match=r"and \d+ more; undo that") as caught:
        newest_checkpoint(training)
    assert len(caught.value.message) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"logging_steps": 1},
        {"save_steps": 5, "save_minutes": 1},
        {"batch_size": 2, "accumulation": 5},
        {"packing": False},
        {"pass_tokens": 99},
    ],
)
def test_changeable_settings_may_change_before_a_resume(changed: dict[str, Any], training: TrainingRun) -> None:
    assert fields(**changed) == fields()


def test_every_setting_but_changeable_ones_is_a_field() -> None:
    for name, value in TrainSettings().model_dump().items():
        if name not in checkpoint.CHANGEABLE:
            assert fields(**{name: "other"})[f"train.{name}"] != value


def test_rows_sha256_depends_on_ids_masks_and_order() -> None:
    one, two = ROWS["train"]
    other_mask, other_ids = Encoded(one.ids, [0, 1, 1, 1]), Encoded([1, 5, 9, 2], one.mask)
    cases = ([], [one], [one, two], [two, one], [other_mask], [other_ids])
    assert len({checkpoint.rows_sha256(rows) for rows in cases}) == 6
    assert checkpoint.rows_sha256([Encoded([*one.ids], [*one.mask])]) == checkpoint.rows_sha256([one])


# --- the disk --------------------------------------------------------------------------------------------------------


def test_full_disk_error_has_needed_and_free_megabytes(training: TrainingRun) -> None:
    checkpoint.require_disk_space(training, 1000)
    with pytest.raises(HostError, match=r"1,000,000,000,000\.0 MB are needed, [0-9,.]+ MB are free in") as caught:
        checkpoint.require_disk_space(training, 10**18)
    assert caught.value.code == 4
