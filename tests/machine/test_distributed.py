"""The processes of a distributed training: environment, rows of each rank, FSDP settings."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.processes.command import ROOT, environment

from tutor.errors import RecipeError
from tutor.machine import distributed


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the environment, from which settle_environment() removes variables."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def launched(monkeypatch: pytest.MonkeyPatch, number: int = 1, count: int = 2, **more: str) -> None:
    given = {"RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "x"}
    for name, value in {**given, **more}.items():
        monkeypatch.setenv(name, value)


def test_one_process_without_launcher_does_not_import_torch() -> None:
    code = "from tutor.machine import distributed as p; import sys; sys.modules['torch'] = None\n"
    code += "with p.process_group():\n"
    code += "    assert p.broadcast(3) == 3 == p.broadcast_result(int, '3') and p.all_gather(3) == [3]; p.barrier()\n"
    code += "found = p.world_size(), p.rank(), p.is_main_process(), p.local_world_size(), p.is_sharded()\n"
    code += "assert found == (1, 0, True, 1, False)"
    env = environment(PYTHONPATH=str(ROOT), WORLD_SIZE="4")  # some batch systems set only this variable
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=30)


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "4"},
        {"RANK": "x"},
        {"LOCAL_RANK": "0"},
        {"LOCAL_RANK": "x", "RANK": "0"},
        {"WORLD_SIZE": "", "RANK": "", "MASTER_ADDR": ""},
        {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "23456"},  # a Kubernetes job of one pod
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
        {"PMI_SIZE": "x"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "x", "SLURM_LOCALID": ""},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
        {"ACCELERATE_USE_DEEPSPEED": "maybe", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "gone.json"},
        {"ACCELERATE_USE_CPU": "maybe"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "inductor"},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "x"},
    ],
    ids=",".join,
)
def test_left_over_variables_train_alone(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    accelerate = pytest.importorskip("accelerate")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (distributed.world_size(), distributed.rank(), distributed.is_sharded()) == (1, 0, False)
    distributed.settle_environment()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    found = accelerate.Accelerator(cpu=True)
    assert (found.num_processes, found.mixed_precision, found.distributed_type) == (1, "no", "NO")
    assert found.gradient_accumulation_steps == 1
    assert found.state.dynamo_plugin.backend == "NO"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "2"}, "RANK is '2'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE is 'x'"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "configured for DEEPSPEED"),
    ],
)
def test_launcher_with_wrong_variables_is_refused(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], expected: str
) -> None:
    launched(monkeypatch, LOCAL_RANK="1", MASTER_PORT="29500")
    distributed.settle_environment()
    launched(monkeypatch, **{"LOCAL_RANK": "1", "MASTER_PORT": "29500", **changed})
    with pytest.raises(RecipeError, match=expected) as caught:
        distributed.settle_environment()
    assert caught.value.hint


def test_launcher_keeps_its_variables_and_not_the_recipe_s(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, LOCAL_RANK="1", MASTER_PORT="29500", ACCELERATE_MIXED_PRECISION="fp8", FSDP_VERSION="2")
    distributed.settle_environment()
    assert os.environ["FSDP_VERSION"] == "2"
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64,roundup_power2_divisions:[256:1,512:2]"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "60"),
        ("HF_HUB_ETAG_TIMEOUT", "5"),
    ],
)
def test_variable_that_ends_a_library_s_import_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, right: str
) -> None:
    monkeypatch.setenv(name, right)
    distributed.settle_environment()
    monkeypatch.setenv(name, "garbage")
    with pytest.raises(RecipeError, match=f"{name} is 'garbage', not "):
        distributed.settle_environment()


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 4))
def test_ranks_share_the_rows_of_one_process_equally(count: int, part: int, world: int) -> None:
    order = list(reversed(range(count)))
    shares = [distributed.rank_rows(order, part * world, number, world) for number in range(world)]
    assert len({len(share) for share in shares}) == 1
    for start in range(0, count, part * world):
        step = [row for share in shares for row in share[start // world : start // world + part]]
        assert sorted(row for row in step if row != count) == sorted(order[start : start + part * world])
        assert step.count(count) < world


def test_sampler_has_its_length_and_follows_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    data_loader = pytest.importorskip("accelerate.data_loader")
    launched(monkeypatch)
    for count in range(1, 14):
        order = data_loader.SeedableRandomSampler(range(count), data_seed=3)
        share = distributed.DistributedStepSampler(order, 4)
        first = list(share)
        assert len(share) == len(first)
        share.set_epoch(5)
        assert list(share) != first or count < 5


def test_shipped_fsdp_configuration_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = ["--config_file", str(ROOT / "data" / "fsdp.yaml"), "tutor", "train"]
    given = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(arguments))[0])
    kept = {name: value for name, value in given.items() if name.startswith(("FSDP_", "ACCELERATE_"))}
    assert kept["FSDP_VERSION"] == "2"
    launched(monkeypatch, **kept)
    assert distributed.is_sharded()
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(RecipeError, match="set fsdp_cpu_ram_efficient_loading: false"):
        distributed.is_sharded()
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(RecipeError, match="set fsdp_version: 2"):
        distributed.is_sharded()
