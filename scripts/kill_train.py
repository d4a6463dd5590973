"""Kill a training at random moments until it has been killed often enough, and compare what comes out.

    .venv/bin/python scripts/kill_train.py --kills 100

The whole train stage on the tiny model, with a checkpoint every other step; nothing can catch SIGKILL. Every second
kill waits, after its random time, for a checkpoint that is being saved. Each cycle is a fork after the imports: seconds
instead of ten more. Prints what happened and exits 1 when a checkpoint was lost, a run failed, or an adapter is not
the uninterrupted run's, byte for byte.
A kill is not a power cut: what the disk had not written by then is not tried here.
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
from tutor.pipeline import registry as chain
from tutor.pipeline import runner as pipeline
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
"""Seconds that one of these checkpoints takes, about."""


def forked(work: Callable[[], object], log: Path) -> int:
    """Start `work` in a child whose log is a file; its process id."""
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
    """The child's exit status when it ends within `seconds`, else None."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.001)


def unsealed(build: Path) -> bool:
    """Whether a checkpoint is there that does not count."""
    paths = checkpoint.by_step(checkpoint_folder(build / "killed" / "adapter"))
    return any(not (path / MANIFEST).exists() for path in paths)


def aim(build: Path, dice: random.Random) -> None:
    """Return at a random moment while a checkpoint is saved, or after a second without one."""
    deadline = time.monotonic() + 1
    while not unsealed(build) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(dice.uniform(0, SAVING))


def kill(child: int) -> int:
    """Kill it; its exit status."""
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole_steps(build: Path) -> list[int]:
    """Of the checkpoints that count, the newest first."""
    folder = checkpoint_folder(build / "killed" / "adapter")
    return [
        int(path.name.partition("-")[2]) for path in checkpoint.by_step(folder) if checkpoint.first_damage(path) is None
    ]


def adapter(build: Path) -> str:
    """The hash of what was trained, where it was."""
    file = build / "killed" / "adapter" / "adapter_model.safetensors"
    return file_sha256(file) if file.exists() else ""


def train(recipe: Recipe, build: Path) -> Callable[[], object]:
    """The train stage, as `tutor train` runs it."""
    return lambda: pipeline.run_one("train", recipe, build)


def prepare(root: Path, epochs: int) -> tuple[Recipe, str, float]:
    """A recipe with data and base made, the uninterrupted run's adapter, and that run's seconds."""
    path = root / "killed.toml"
    path.write_text(RECIPE.format(root=ROOT, epochs=epochs), "utf-8")
    recipe = read_recipe(path)
    for until, build in (("base", root / "start"), ("train", root / "whole")):
        if until == "train":
            shutil.copytree(root / "start", build)
        began = time.monotonic()
        child = forked(lambda until=until, build=build: pipeline.run_all(recipe, build, until=until), root / "log")  # type: ignore[misc]
        if ended(child, 600) != 0:
            sys.exit((root / "log").read_text())
    return recipe, adapter(root / "whole"), time.monotonic() - began


def campaign(root: Path, kills: int, epochs: int, span: float, dice: random.Random) -> Counter[str]:
    """Kill until `kills` times, and let the last training finish; what happened, counted."""
    recipe, wanted, seconds = prepare(root, epochs)
    print(f"uninterrupted: {seconds:.1f} s, adapter {wanted[:16]}", flush=True)
    counts: Counter[str] = Counter()
    build, log = root / "start", root / "log"
    while counts["kills"] < kills or adapter(build) == "":
        if build == root / "start" or adapter(build):
            shutil.rmtree(root / "run", ignore_errors=True)
            build = Path(shutil.copytree(root / "start", root / "run"))
            counts["trainings"] += 1
        before = whole_steps(build)
        log.unlink(missing_ok=True)
        child = forked(train(recipe, build), log)
        last = counts["kills"] >= kills
        status = ended(child, 600 if last else dice.uniform(0, span))
        if status is None:
            if dice.random() < 0.5:
                aim(build, dice)
            status = kill(child)
        said = log.read_text() if log.exists() else ""
        tally(counts, build, status, said, before)
        if status == 0:
            counts["equal adapters" if adapter(build) == wanted else "OTHER ADAPTERS"] += 1
            print(f"finished: {dict(counts)}", flush=True)
    return counts


def tally(counts: Counter[str], build: Path, status: int, said: str, before: list[int]) -> None:
    """Count what one cycle did."""
    if status not in (0, -signal.SIGKILL):
        counts["FAILED RUNS"] += 1
        print(said, flush=True)
    if status == -signal.SIGKILL:
        counts["kills"] += 1
        counts["kills while saving"] += unsealed(build)
        counts["kills before the first step"] += "held-out loss before" not in said
    counts["quarantined"] += said.count("; kept as ")
    resumed = [int(line.split()[3]) for line in said.splitlines() if line.startswith("resuming after step ")]
    counts["resumed"] += bool(resumed)
    if before and (resumed or "rows audited" in said):
        counts["LOST CHECKPOINTS"] += resumed[:1] != before[:1]


def main() -> None:
    """The command."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--epochs", type=int, default=30, help="the training's length: 5 steps an epoch")
    options.add_argument("--span", type=float, default=4.0, help="seconds a run lives at most before it is killed")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    quiet_libraries()
    import torch

    torch.set_num_threads(1)  # a thread pool does not survive a fork
    chain.BY_NAME["train"].module  # noqa: B018 - the imports, once
    with tempfile.TemporaryDirectory(prefix="kill-train-") as root:
        counts = campaign(Path(root), chosen.kills, chosen.epochs, chosen.span, random.Random(chosen.seed))  # noqa: S311
    names = ("LOST CHECKPOINTS", "FAILED RUNS", "OTHER ADAPTERS")
    for name, count in sorted(counts.items() | {name: counts[name] for name in names}.items()):
        print(f"{name}: {count}")
    sys.exit(any(counts[name] for name in names))


if __name__ == "__main__":
    main()
