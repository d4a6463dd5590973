"""The processes of a distributed training: environment, rows of each rank, FSDP settings."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.processes.command import ROOT, environment

from tutor.errors import RecipeError
from tutor.machine import distributed


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
