"""Measure settings of a training: a grid of settings, each at its own best learning rate, with several seeds.

    .venv/bin/python scripts/sweep.py WORK [--hours 4] [--recipe data/demo.toml] [--rows 40] [--held-out 0.4]
    .venv/bin/python scripts/sweep.py WORK --table      # trains nothing

Trains with the stages of tutor (data, base, train) in the folder WORK, on the same rows in every cell: one setting,
learning rate and seed. Its result is the held-out loss of the adapter at the end of its schedule. sweep_plan.py has the
order. cells.jsonl gets one line for each cell that is done, which is never trained again: the same command
continues, in the middle of a cell too (from its checkpoint), and a second process with it takes other cells. It ends
before a cell that would pass the hours. Prints tables with 95 % intervals over seeds. Writes no recipe.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import logging
import math
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sweep_plan import GROUPS, LIMITS, PLAN, PRIVATE, RATES, REFERENCE, SEEDS, Setting
from sweep_table import Done, best_rate, group_table

ROOT = Path(__file__).parent.parent
KEPT = ("batch_size", "accumulation", "dropout", "quantization", "warmup", "max_length")
"""Settings of the recipe that all cells have."""


class OutOfTimeError(Exception):
    """The next cell would not end within the hours given."""


@dataclass
class Sweep:
    """The cells of one folder."""

    work: Path
    recipe: dict[str, Any]
    deadline: float  # of time.monotonic
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: dict[str, Path] = field(default_factory=dict)
    identity: str = ""  # of rows and base
    before: float | None = None  # held-out loss of the base, the same in all cells

    def name(self, setting: Setting) -> str:
        """Return the name of a setting on these rows; it depends on all that decides the result, but the code."""
        text = json.dumps([self.recipe["train"] | dict(setting), self.identity], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def key(self, setting: Setting, rate: float, seed: int) -> str:
        """Return the name of a cell, which is that of its folder too."""
        return f"{self.name(setting)}-{rate:g}-{seed}"

    def read(self) -> None:
        """Read the cells that are done, other processes' too; a line that a kill has cut is none."""
        with contextlib.suppress(FileNotFoundError):
            for line in (self.work / "cells.jsonl").read_text("utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    cell = json.loads(line)
                    self.cells[f"{cell['name']}-{cell['rate']:g}-{cell['seed']}"] = cell  # as in `key`

    def done(self, setting: Setting) -> Done:
        """Return a setting's cells that are done, by learning rate and seed."""
        name = self.name(setting)
        found: Done = {}
        for cell in self.cells.values():
            if cell["name"] == name:
                found.setdefault(cell["rate"], {})[cell["seed"]] = cell
        return found

    def missing(self, setting: Setting, *, own_rate: bool) -> list[tuple[float, int]]:
        """Return learning rate and seed of the cells to train next; empty when the setting is measured."""
        done = self.done(setting)
        rate = best_rate(done if own_rate else self.done(REFERENCE), SEEDS[0])
        if own_rate:
            tried = [rate for rate in done if SEEDS[0] in done[rate]]
            beyond = {min(tried): min(tried) / 2, max(tried): max(tried) * 2}.get(rate) if tried else None
            rates = [*RATES, *([beyond] if beyond and set(RATES) <= set(tried) else [])]
            if cells := [(each, SEEDS[0]) for each in rates if each not in tried and LIMITS[0] <= each <= LIMITS[1]]:
                return cells
        return [(rate, seed) for seed in SEEDS if seed not in done.get(rate, {})]

    def next_cells(self) -> Iterator[tuple[Setting, float, int]]:
        """Yield all cells that can be trained now, the most important first."""
        for own_rate, setting in PLAN:
            if own_rate or not self.missing(REFERENCE, own_rate=True):
                for rate, seed in self.missing(setting, own_rate=own_rate):
                    yield setting, rate, seed

    def run(self) -> None:
        """Train until no cell is missing. Raises OutOfTimeError before a cell that would pass the deadline."""
        while True:
            self.read()
            cells = list(self.next_cells())
            if not cells:
                return
            if not any(self.claim(*cell) for cell in cells):
                time.sleep(10)  # other processes train all that can be trained now

    def claim(self, setting: Setting, rate: float, seed: int) -> bool:
        """Train a cell and note its result, unless another process has it."""
        key, began = self.key(setting, rate, seed), time.monotonic()
        folder, lock = self.work / key, FileLock(self.work / "locks" / key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        with contextlib.ExitStack() as stack:
            stack.callback(lock.release)
            self.read()
            if key in self.cells:
                return True
            slowest = max((cell["seconds"] / cell["epochs"] for cell in self.cells.values()), default=0.0)
            epochs = setting["epochs"]
            if began + epochs * slowest > self.deadline:
                raise OutOfTimeError
            logging.info("cell %s: %s, learning rate %g, seed %d", key, dict(setting), rate, seed)
            cell = {"name": self.name(setting), "rate": rate, "seed": seed, "epochs": epochs, "setting": dict(setting)}
            cell |= self.train({**setting, "learning_rate": rate}, seed, folder)
            cell["seconds"] = round(time.monotonic() - began, 1)
            with (self.work / "cells.jsonl").open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(cell))  # behind a line that a kill has cut
            shutil.rmtree(folder)
        return True

    def train(self, setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
        """Run the train stage, from its checkpoint if it has one; return its results."""
        from tutor.errors import ArtifactError
        from tutor.machine.capacity import plan_training

        changes = {name: value for name, value in setting.items() if name not in PRIVATE}
        recipe = make_recipe(self.recipe | {"seed": seed, "train": self.recipe["train"] | changes})
        out = folder / "adapter"
        out.mkdir(parents=True, exist_ok=True)
        with self.private(setting) as stage:
            try:
                found = stage.run(recipe, self.inputs, out, plan_training(recipe, self.inputs))
            except ArtifactError as error:
                if "of another training" in str(error):  # a checkpoint by other code: the cell begins anew
                    shutil.rmtree(folder)
                    return self.train(setting, seed, folder)
                return {"loss": None, "failed": str(error)}  # the loss is NaN, or training diverged
            finally:
                gc.collect()
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
        return {
            "loss": found["held_out"]["loss_after"],
            "before": found["held_out"]["loss_before"],
            "curve": [[line["step"], line["held_out_loss"]] for line in lines if "held_out_loss" in line],
            **{name: found[name] for name in ("rows", "steps", "precision", "quantization", "tokens_per_second")},
        }

    @contextlib.contextmanager
    def private(self, setting: Setting) -> Iterator[Any]:
        """Yield the train stage with the setting's PRIVATE arguments; it scores the untrained base once a process."""
        stage: Any = importlib.import_module("tutor.stages.train.stage")
        plain, score = stage.training_arguments, stage.mean_loss

        def with_private(*given: Any, **named: Any) -> Any:
            arguments = plain(*given, **named)
            for name in PRIVATE:
                if name in setting:
                    setattr(arguments, name, setting[name])
            return arguments

        def score_once(*given: Any) -> float:
            self.before = score(*given) if self.before is None else self.before
            return self.before

        stage.training_arguments, stage.mean_loss = with_private, score_once
        try:
            yield stage
        finally:
            stage.training_arguments, stage.mean_loss = plain, score


def make_recipe(values: Mapping[str, Any]) -> Any:
    """Return the recipe of these values; its files are in data/."""
    from tutor.recipe.settings import Recipe

    return Recipe.model_validate(dict(values)).model_copy(update={"path": ROOT / "data" / "sweep.toml"})


def prepare(sweep: Sweep) -> None:
    """Run the stages data and base, unless an earlier run did."""
    from tutor.stages.base import stage as base
    from tutor.stages.data import stage as data

    recipe = make_recipe(sweep.recipe)
    rows = f"data-{recipe.data.rows}-{recipe.data.held_out:g}"
    (sweep.work / "locks").mkdir(parents=True, exist_ok=True)
    for name, stage in ((rows, data), ("base", base)):
        with FileLock(sweep.work / "locks" / name):
            if not (sweep.work / name).is_dir():
                partial = sweep.work / f"{name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                stage.run(recipe, {}, partial)
                partial.rename(sweep.work / name)
    sweep.inputs = {"data": sweep.work / rows, "base": sweep.work / "base"}
    parts = [(sweep.work / rows / f"{name}.jsonl").read_bytes() for name in ("train", "held_out")]
    sweep.identity = hashlib.sha256(b"".join([*parts, recipe.base.source.encode()])).hexdigest()


def main() -> None:
    """Train the cells that are missing, then print the tables."""
    parser = argparse.ArgumentParser(description="Measure a grid of training settings with several seeds.")
    parser.add_argument("work", type=Path, help="folder of the cells")
    parser.add_argument("--recipe", type=Path, default=ROOT / "data" / "demo.toml")
    parser.add_argument("--rows", type=int, default=40, help="number of rows, the held-out ones included")
    parser.add_argument("--held-out", type=float, default=0.4, help="share of the rows that is held out")
    parser.add_argument("--hours", type=float, default=4)
    parser.add_argument("--table", action="store_true", help="train nothing, print the tables of what is done")
    options = parser.parse_args()
    from tutor.cli.progress import quiet_libraries

    quiet_libraries()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    deadline = time.monotonic() + 3600 * options.hours
    given = tomllib.loads(options.recipe.read_text("utf-8"))
    data = given["data"] | {"rows": options.rows, "held_out": options.held_out}
    # Every cell ends its schedule; what decides no result is left out, so that a changed recipe finds its cells.
    train = {name: given["train"][name] for name in KEPT if name in given["train"]}
    train |= {"keep": "last", "logging_steps": 1000, "evaluations_per_epoch": 0}
    sweep = Sweep(options.work, {"base": given["base"], "data": data, "train": train}, deadline)
    prepare(sweep)
    if not options.table:
        with contextlib.suppress(OutOfTimeError):
            sweep.run()
    sweep.read()
    for title, settings in GROUPS.items():
        print(group_table(title, {name: sweep.done(setting) for name, setting in settings.items()}, SEEDS), end="\n\n")
    seconds = math.fsum(cell["seconds"] for cell in sweep.cells.values())
    print(f"{len(sweep.cells)} cells, {seconds / 60:.0f} minutes of one process")


if __name__ == "__main__":
    main()
