"""Kill a training at random moments, resume it, and compare the adapter with that of an uninterrupted run.

    .venv/bin/python scripts/kill_train.py --kills 100

Runs the train stage on the tiny model, with a checkpoint every other step, and sends SIGKILL, which no program can
catch. Half of the kills wait, after their random time, for a checkpoint that is being saved. Each cycle is a fork after
the imports, which saves ten seconds. Prints counts, and exits 1 when a checkpoint was lost, a run failed, or an adapter
differs from the uninterrupted run's in any byte. Does not test a power cut, in which unsynced writes are lost.
"""

import argparse
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tutor.artifacts.hashing import file_sha256
from tutor.artifacts.manifest import MANIFEST
from tutor.artifacts.stage_folder import checkpoint_folder
from tutor.cli.progress import quiet_libraries
from tutor.pipeline import registry, runner
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe
from tutor.stages.train import checkpoint

ROOT = Path(__file__).parent.parent
RECIPE = """
seed = 7
[data]
train = "{root}/data/tutor.jsonl"
eval = "{root}/data/eval.jsonl"
rows = 24
[base]
source = "tiny"
[train]
epochs = {epochs}
batch_size = 2
accumulation = 2
max_length = 2048
logging_steps = 3
save_steps = 2
"""


SAVING = 0.05
"""Approximate time of saving one checkpoint, in seconds."""


def forked(work: Callable[[], object], log: Path) -> int:
    """Start `work` in a child process that logs into a file; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        logging.basicConfig(filename=log, level=logging.INFO, format="%(message)s", force=True)
        work()
        code = 0
    except BaseException:
        logging.exception("failed")
        raise
    finally:
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """Return the child's exit status when it ends within `seconds`, else None."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.001)


def unsealed(build: Path) -> bool:
    """Return whether there is a checkpoint without a manifest."""
    paths = checkpoint.by_step(checkpoint_folder(build / "killed" / "adapter"))
    return any(not (path / MANIFEST).exists() for path in paths)


def aim(build: Path, dice: random.Random) -> None:
    """Return at a random moment while a checkpoint is saved, or after a second without one."""
    deadline = time.monotonic() + 1
    while not unsealed(build) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(dice.uniform(0, SAVING))


def kill(child: int) -> int:
    """Kill the child; return its exit status."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def intact_steps(build: Path) -> list[int]:
    """Return the steps of the intact checkpoints, the newest first."""
    folder = checkpoint_folder(build / "killed" / "adapter")
    return [
        int(path.name.partition("-")[2]) for path in checkpoint.by_step(folder) if checkpoint.first_damage(path) is None
    ]


def adapter(build: Path) -> str:
    """Return the sha256 of the adapter, or "" when there is none."""
    file = build / "killed" / "adapter" / "adapter_model.safetensors"
    return file_sha256(file) if file.exists() else ""


def train(recipe: Recipe, build: Path) -> Callable[[], object]:
    """Return a function that runs the train stage as `tutor train` does."""
    return lambda: runner.run_one("train", recipe, build)


def prepare(root: Path, epochs: int) -> tuple[Recipe, str, float]:
    """Make data and base; return the recipe, and the adapter's hash and the seconds of an uninterrupted run."""
    path = root / "killed.toml"
    path.write_text(RECIPE.format(root=ROOT, epochs=epochs), "utf-8")
    recipe = read_recipe(path)
    for until, build in (("base", root / "start"), ("train", root / "whole")):
        if until == "train":
            shutil.copytree(root / "start", build)
        began = time.monotonic()
        child = forked(lambda until=until, build=build: runner.run_all(recipe, build, until=until), root / "log")  # type: ignore[misc]
        if ended(child, 600) != 0:
            sys.exit((root / "log").read_text())
    return recipe, adapter(root / "whole"), time.monotonic() - began


def campaign(root: Path, kills: int, epochs: int, span: float, dice: random.Random) -> Counter[str]:
    """Kill trainings `kills` times and let the last one finish; return counts of the events."""
    recipe, wanted, seconds = prepare(root, epochs)
    print(f"uninterrupted: {seconds:.1f} s, adapter {wanted[:16]}", flush=True)
    counts: Counter[str] = Counter()
    build, log = root / "start", root / "log"
    while counts["kills"] < kills or adapter(build) == "":
        if build == root / "start" or adapter(build):
            shutil.rmtree(root / "run", ignore_errors=True)
            build = Path(shutil.copytree(root / "start", root / "run"))
            counts["trainings"] += 1
        before = intact_steps(build)
        log.unlink(missing_ok=True)
        child = forked(train(recipe, build), log)
        last = counts["kills"] >= kills
        status = ended(child, 600 if last else dice.uniform(0, span))
        if status is None:
            if dice.random() < 0.5:
                aim(build, dice)
            status = kill(child)
        logged = log.read_text() if log.exists() else ""
        tally(counts, build, status, logged, before)
        if status == 0:
            counts["equal adapters" if adapter(build) == wanted else "OTHER ADAPTERS"] += 1
            print(f"finished: {dict(counts)}", flush=True)
    return counts


def tally(counts: Counter[str], build: Path, status: int, logged: str, before: list[int]) -> None:
    """Count the events of one cycle."""
    if status not in (0, -signal.SIGKILL):
        counts["FAILED RUNS"] += 1
        print(logged, flush=True)
    if status == -signal.SIGKILL:
        counts["kills"] += 1
        counts["kills while saving"] += unsealed(build)
        counts["kills before the first step"] += "held-out loss before" not in logged
    counts["quarantined"] += logged.count("; kept as ")
    resumed = [int(line.split()[3]) for line in logged.splitlines() if line.startswith("resuming after step ")]
    counts["resumed"] += bool(resumed)
    if before and (resumed or "rows audited" in logged):
        counts["LOST CHECKPOINTS"] += resumed[:1] != before[:1]


def main() -> None:
    """Parse the command line, run the campaign and print the counts."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--epochs", type=int, default=30, help="number of epochs, 5 steps each")
    options.add_argument("--span", type=float, default=4.0, help="maximum seconds before a run is killed")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    quiet_libraries()
    import torch

    torch.set_num_threads(1)  # a thread pool does not survive a fork
    registry.BY_NAME["train"].module  # noqa: B018 - the imports, once
    with tempfile.TemporaryDirectory(prefix="kill-train-") as root:
        counts = campaign(Path(root), chosen.kills, chosen.epochs, chosen.span, random.Random(chosen.seed))  # noqa: S311
    names = ("LOST CHECKPOINTS", "FAILED RUNS", "OTHER ADAPTERS")
    for name, count in sorted(counts.items() | {name: counts[name] for name in names}.items()):
        print(f"{name}: {count}")
    sys.exit(any(counts[name] for name in names))


if __name__ == "__main__":
    main()
