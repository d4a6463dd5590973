"""Training in several processes: equal rows per step and an equal adapter to one process; one writer; one end."""

import json
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models.training import settings
from support.processes import observed
from support.processes.command import ROOT, Done, environment, forked
from support.processes.observed import noting

from tutor.artifacts.manifest import require_stage
from tutor.artifacts.stage_folder import checkpoint_folder
from tutor.errors import HostError
from tutor.pipeline import runner
from tutor.recipe.reading import read_recipe
from tutor.stages.train import checkpoint

torch = pytest.importorskip("torch")
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tutor.engines.hf.loading import load_base, quant_storage
from tutor.stages.train import loop, monitor, trainer
from tutor.stages.train.kernels.chunked_loss import IGNORE_INDEX
from tutor.stages.train.trainer import lora_config

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*autograd kernel was not")]

Steps = dict[int, Any]
LAUNCH = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0")
QUIET = ("--mixed_precision", "no", "--dynamo_backend", "no")  # accelerate logs each one that is not given


def test_required_files_include_each_rank_s_random_state() -> None:
    assert {"rng_state.pth", "optimizer.pt"} < checkpoint.required_files(1)
    assert {"rng_state_0.pth", "rng_state_1.pth"} < checkpoint.required_files(2)
    assert "optimizer.bin" in checkpoint.required_files(2, sharded=True)


def test_other_commands_refuse_several_processes() -> None:
    env = environment(PYTHONPATH=str(ROOT), RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost")
    command = [sys.executable, "-c", "from tutor.cli.main import main; main()", "run"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: only tutor train runs in several processes, and this is tutor run; ")
    assert done.stderr.count("\n") == 1


# --- two processes through accelerate's own launcher -----------------------------------------------------------------

RECIPE = """
seed = 7
[data]
train = "{data}/tutor.jsonl"
eval = "{data}/eval.jsonl"
rows = 22
prompts = 5
held_out = 0.2
[base]
source = "path:{base}"
[train]
epochs = 2
batch_size = 2
accumulation = 2
learning_rate = 5e-3
max_length = 2048
logging_steps = 1
save_steps = 3
dropout = 0.0
precision = "fp32"
quantization = "none"
"""
"""17 rows in steps of four: the last step of an epoch has one row, and rank 1 has none."""


@pytest.fixture(scope="module")
def build(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a build folder with finished data and base stages."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "small.toml").write_text(RECIPE.format(data=ROOT / "data", base=tiny), "utf-8")
    runner.run_all(read_recipe(folder / "small.toml"), folder / "build", until="base")
    return folder


@pytest.fixture(scope="module")
def alone(build: Path) -> tuple[Path, Steps]:
    """The adapter of one process, and the rows and tokens of its steps."""
    noted: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "compute_loss", noting(trainer.Trainer.compute_loss, noted.append))
        runner.run_one("train", read_recipe(build / "small.toml"), build / "build")
    folder = build / "build" / "small" / "adapter"
    return folder.rename(build / "alone"), by_step(noted)


def by_step(notes: list[dict[str, Any]]) -> Steps:
    """Return the supervised rows of each step, sorted, and its number of tokens."""
    found: dict[int, tuple[list[Any], set[int]]] = defaultdict(lambda: ([], set()))
    for note in notes:
        held, tokens = found[note["step"]]
        held.extend([list(ids), list(labels)] for ids, labels in note["rows"] if set(labels) != {IGNORE_INDEX})
        tokens.add(note["tokens"])
    return {step: (sorted(held), tokens) for step, (held, tokens) in found.items()}


Ran = tuple["Done[str]", list[list[dict[str, Any]]]]


@pytest.fixture
def launched_by_accelerate(build: Path, tmp_path: Path) -> Callable[..., Ran]:
    """Run `accelerate launch tutor train` in two processes, with a signal; return outputs and notes."""

    def run(**end: Any) -> Ran:
        launcher = Path(sys.executable).with_name("accelerate")
        script = [observed.__file__, "train", "-r", "small.toml", "-b", "build"]
        # One thread, like `alone`: the order of a sum depends on the number of threads.
        notes = {"NOTES": str(tmp_path / "notes"), "END": json.dumps(end), "OMP_NUM_THREADS": "1"}
        env = environment(PYTHONPATH=str(ROOT), **notes)
        command = [launcher, "launch", *LAUNCH, *QUIET, *script]
        done = subprocess.run(command, cwd=build, env=env, capture_output=True, text=True, timeout=120, check=False)
        return done, notes_of(tmp_path / "notes")

    return run


def notes_of(path: Path) -> list[list[dict[str, Any]]]:
    """Return the notes of both ranks, and remove them."""
    paths = [path.with_name(f"{path.name}.{rank}") for rank in range(2)]
    notes = [[json.loads(line) for line in each.read_text().splitlines()] for each in paths]
    for each in paths:
        each.unlink()
    return notes


@pytest.fixture
def together(build: Path, tmp_path: Path) -> Callable[..., tuple[list["Done[str]"], list[list[dict[str, Any]]]]]:
    """Run `tutor train` in two processes as a launcher does; return outputs, exit codes and notes."""

    def run(**end: Any) -> tuple[list["Done[str]"], list[list[dict[str, Any]]]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = []
        for rank in range(2):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
            env |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
            # One thread, like `alone`: the order of a sum depends on the number of threads.
            env |= {"NOTES": tmp_path / "notes", "END": json.dumps(end), "OMP_NUM_THREADS": 1}
            given = {name: str(value) for name, value in env.items()}
            where = ("-r", "small.toml", "-b", "build")
            scratch = tmp_path / f"rank{rank}"
            ranks.append(forked("train", *where, scratch=scratch, env=given, cwd=build, entry=observed.main))
        return [each.finish() for each in ranks], notes_of(tmp_path / "notes")

    return run


def checkpoints(build: Path) -> list[str]:
    found = checkpoint.by_step(checkpoint_folder(build / "build" / "small" / "adapter"))
    assert [checkpoint.first_damage(path) for path in found] == [None] * len(found)
    return [path.name for path in found]


def ours(stderr: str) -> list[str]:
    """Return tutor's lines: those of the launcher's report are indented or have another beginning."""
    return [line for line in stderr.splitlines() if line.startswith(("train:", "Error:"))]


@pytest.mark.pipeline
def test_two_processes_interrupted_make_one_process_adapter(
    build: Path, alone: tuple[Path, Steps], together: Callable[..., Any], launched_by_accelerate: Callable[..., Ran]
) -> None:
    adapter, steps = alone
    assert [len(held) for held, _ in steps.values()] == [4, 4, 4, 4, 1] * 2

    # Rank 1 is killed: rank 0 ends with an error, and the checkpoint before is intact.
    (first, second), notes = together(rank=1, step=5, signal=signal.SIGKILL, to="self")
    assert (first.returncode, second.returncode) == (HostError.code, -signal.SIGKILL)
    assert max(note["step"] for part in notes for note in part if "step" in note) == 5
    assert checkpoints(build) == ["checkpoint-3"]
    assert [line for line in ours(first.stderr) if line.startswith("Error:")] == [
        "Error: another process of this training ended; its own error or the launcher's report has the reason; "
        "run again: training continues from the last checkpoint",
    ]  # fmt: skip
    found = by_step([note for part in notes for note in part if "step" in note])
    assert [found[step] for step in range(1, 5)] == [steps[step] for step in range(1, 5)]

    # The launcher receives a signal: both ranks finish the step and save.
    ended, notes = launched_by_accelerate(rank=0, step=7, signal=signal.SIGTERM, to="parent")
    assert ended.returncode != 0
    assert "resuming after step 3 of 10" in ended.stderr
    assert ours(ended.stderr)[-2:] == [
        "train: checkpoint of step 7 saved",
        "train: warning: ended after step 7 of 10: run the same command again to resume",
    ]
    assert checkpoints(build) == ["checkpoint-7", "checkpoint-6"]

    # The run resumes in the second epoch, with its rows.
    (first, second), notes = together()
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert "resuming after step 7 of 10" in first.stderr
    assert first.stderr.count("resuming") == first.stdout.count("loss_after") == 1
    assert [line for line in first.stderr.splitlines() if not line.startswith("train: ")] == []
    assert (second.stdout, second.stderr) == ("", "")
    found = by_step([note for part in notes for note in part if "step" in note])
    assert found == {step: steps[step] for step in (8, 9, 10)}
    assert_close(build / "build" / "small" / "adapter", adapter)
    assert_one_wrote(build, *notes)


def assert_close(found: Path, wanted: Path) -> None:
    """Compare two adapters up to rounding, and their figures.

    As a whole: Adam moves a weight by the sign of its gradient, and one whose gradient is nearly 0 another way.
    """
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (wanted, found))
    assert one.keys() == two.keys()
    # B starts at 0, so it is the training's result. A row too many or too few in one of ten steps changes it by 1/10.
    for name in (name for name in one if "lora_B" in name):
        assert (one[name].float() - two[name].float()).norm() < 0.01 * one[name].float().norm(), name
    before, after = (require_stage(folder, "train").results for folder in (wanted, found))
    assert after["held_out"]["loss_before"] == pytest.approx(before["held_out"]["loss_before"], rel=1e-12)
    assert after["held_out"]["loss_after"] == pytest.approx(before["held_out"]["loss_after"], rel=1e-5)
    assert set(after) == set(before)


def assert_one_wrote(build: Path, first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    """Check that only rank 0 wrote files; PyTorch's native code writes rank 1's random state."""
    inside = [
        {note["wrote"] for note in part if note.get("wrote", "").startswith(str(build))} for part in (first, second)
    ]
    assert len(inside[0]) > 10
    assert inside[1] == set()


# --- FSDP without GPUs -----------------------------------------------------------------------------------------------


def test_sharded_4_bit_weights_are_stored_in_compute_dtype(tiny: Path) -> None:
    stored = {torch.uint8: load_base(tiny, "nf4", "bf16")}
    stored[torch.bfloat16] = load_base(tiny, "nf4", "bf16", sharded=True)
    for dtype, model in stored.items():
        assert model.model.layers[0].self_attn.q_proj.weight.dtype == dtype
        assert quant_storage("bf16", sharded=dtype != torch.uint8) == dtype
    assert not hasattr(stored[torch.bfloat16], "hf_device_map")


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A device mesh of this process, on the CPU."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_adapter_is_saved_and_restored_in_full(tiny: Path, mesh: Any, tmp_path: Path) -> None:
    from peft import get_peft_model
    from torch.distributed.fsdp import fully_shard

    def model() -> Any:
        torch.manual_seed(1)
        made = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), lora_config(settings()))
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        return made

    plain, parts = model(), model()
    for layer in parts.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    assert all(hasattr(weight, "full_tensor") for weight in parts.get_base_model().model.layers.parameters())
    for each, name in ((plain, "plain"), (parts, "parts")):
        monitor.save_trainable(each, tmp_path / monitor.BEST, 4, 1.0)
        with torch.no_grad():
            for weight in each.parameters():
                weight.mul_(0.5)
        assert monitor.restore_best(each, tmp_path, [{"held_out_loss": 2.0, "step": 8}]) == 4
        loop.round_adapter(each)
        loop.save_adapter(each, "tiny", tmp_path / name)
    assert (tmp_path / "plain" / "adapter_model.safetensors").stat().st_size > 10_000
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
