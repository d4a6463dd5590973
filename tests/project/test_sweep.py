"""scripts/sweep.py and sweep_plan.py: every cell is trained once in order, whatever ends it; tables have intervals."""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.models.tiny_models import base_stage
from support.processes.command import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import sweep
import sweep_plan
from sweep_table import best_cells, group_table

BEST = {"all-linear": 1e-3, "attention": 4e-3}
"""Learning rate of lowest loss in the trainings that these tests pretend."""


class Trainings:
    """Stands in for the train stage; ends the process like Ctrl-C in the given cells."""

    def __init__(self, *ends: int) -> None:
        self.cells: list[tuple[str, float, int]] = []
        self.ends = ends

    def train(self, setting: Mapping[str, Any], seed: int, folder: Path) -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        self.cells.append((json.dumps(dict(setting), sort_keys=True), setting["learning_rate"], seed))
        if len(self.cells) in self.ends:
            raise KeyboardInterrupt
        best = BEST["all-linear" if setting["target_modules"] == "all-linear" else "attention"]
        return {"loss": 2 + abs(math.log2(setting["learning_rate"] / best)) + seed / 100, "curve": [], "steps": 7}


def swept(folder: Path, trainings: Trainings, seconds: float = 60) -> sweep.Sweep:
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    made = sweep.Sweep(folder, {"train": {"dropout": 0.0}}, time.monotonic() + seconds)
    made.train = trainings.train  # type: ignore[method-assign]
    return made


def test_killed_sweep_continues_and_trains_no_cell_twice(tmp_path: Path) -> None:
    whole, killed = Trainings(), Trainings(2, 9)
    swept(tmp_path / "whole", whole).run()
    for _ in killed.ends:
        with pytest.raises(KeyboardInterrupt):
            swept(tmp_path / "killed", killed).run()
    with (tmp_path / "killed" / "cells.jsonl").open("a", encoding="utf-8") as file:
        file.write('\n{"name": "cut')
    swept(tmp_path / "killed", killed).run()
    repeated = [killed.cells[number - 1] for number in killed.ends]
    assert Counter(killed.cells) == Counter(whole.cells) + Counter(repeated)
    assert set(Counter(whole.cells).values()) == {1}
    assert [rate for _, rate, _ in whole.cells[:5]] == [*sweep.RATES, 1e-3, 1e-3]


def test_rates_go_on_beyond_the_grid_as_long_as_the_loss_falls(tmp_path: Path) -> None:
    made = swept(tmp_path, Trainings())
    made.run()
    done = made.done(sweep_plan.SHAPES["attention, rank 8"])
    assert {rate: len(cells) for rate, cells in done.items()} == {5e-4: 1, 1e-3: 1, 2e-3: 1, 4e-3: 3, 8e-3: 1}
    table = group_table("Shapes", {name: made.done(each) for name, each in sweep_plan.SHAPES.items()}, sweep.SEEDS)
    assert "| all linear layers, rank 16 | 0.001 | 2.020 ± 0.025 |  |  | 7 | 0 |" in table
    assert "| attention, rank 8 | 0.004 | 2.020 ± 0.025 |" in table
    assert "| attention, rank 8 | 5.010 | 4.010 | 3.010 | 2.010 | 3.010 |" in table


def test_cell_of_another_process_is_left_to_it(tmp_path: Path) -> None:
    mine, others = Trainings(), Trainings()
    made = swept(tmp_path, mine)
    setting, rate, seed = next(iter(made.next_cells()))
    with sweep.FileLock(tmp_path / "locks" / made.key(setting, rate, seed)):
        assert not made.claim(setting, rate, seed)
    assert swept(tmp_path, others).claim(setting, rate, seed)
    assert made.claim(setting, rate, seed)
    assert (len(mine.cells), len(others.cells)) == (0, 1)


def test_sweep_ends_before_a_cell_that_passes_the_hours(tmp_path: Path) -> None:
    trainings = Trainings()
    made = swept(tmp_path, trainings, seconds=-1)
    with pytest.raises(sweep.OutOfTimeError):
        made.run()
    assert not trainings.cells
    assert "| LoRA | | not measured |" in group_table("V", {"LoRA": made.done(sweep.REFERENCE)}, sweep.SEEDS)


def test_failed_seed_is_no_result() -> None:
    cells = {seed: {"loss": None if seed == 3 else 2.0} for seed in (1, 2, 3)}
    assert best_cells({1e-3: cells}, (1, 2, 3)) is None


@pytest.mark.pipeline
@pytest.mark.usefixtures("one_thread")
def test_cell_trains_with_arguments_that_no_recipe_has(tiny: Path, tmp_path: Path) -> None:
    """The schedule reaches the trainer; the base is scored once; nothing is left changed in the stage."""
    from support.models.training import HELD_OUT, ROWS

    from tutor.stages.train import stage

    (tmp_path / "data").mkdir()
    for name, rows in (("train", ROWS), ("held_out", HELD_OUT), ("prompts", HELD_OUT)):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    base_stage(tiny, tmp_path / "base")
    train = {"batch_size": 2, "accumulation": 2, "precision": "fp32", "quantization": "none", "keep": "last"}
    values = {"base": {"source": "tiny"}, "data": {}, "train": train}
    made = sweep.Sweep(tmp_path, values, 0, inputs={name: tmp_path / name for name in ("data", "base")})
    plain = {name: getattr(stage, name) for name in ("training_arguments", "mean_loss")}
    given = {"epochs": 1, "learning_rate": 5e-3, "target_modules": "all-linear"}
    found = [made.train({**given, "lr_scheduler_type": kind}, 1, tmp_path / kind) for kind in ("constant", "linear")]
    assert found[0]["loss"] != found[1]["loss"]
    assert {cell["before"] for cell in found} == {made.before}
    assert {name: getattr(stage, name) for name in plain} == plain
