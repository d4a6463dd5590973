"""cli/commands/doctor.py: plain lines, JSON, exit codes, and the table at a terminal."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.fakes.machine import Machine
from support.processes.command import ROOT, environment

MAIN = "from tutor.cli.main import main; main()"


def run(*arguments: str | Path, machine: Machine, code: str = MAIN, **env: str) -> "subprocess.CompletedProcess[str]":
    variables = {name: os.environ[name] for name in ("PATH", "HF_HOME", "OLLAMA_HOST")}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment(**{"PYTHONPATH": str(ROOT), **variables, **env}),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def test_doctor_without_torch_and_terminal_prints_plain_lines(machine, tmp_path):
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'numpy', 'gguf'): sys.modules[name] = None\n"
        "from tutor.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "-b", tmp_path],
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 4), done.stderr
    checks, _, conclusions = done.stdout.partition("\n\n")
    states = {line.split()[0] for line in checks.splitlines() if not line.startswith(" ")}
    assert states <= {"ok", "warning", "missing"}
    assert [line.split()[:2] for line in conclusions.splitlines()][-2:] == [["tutor", "run"], ["make", "all"]]
    assert "\x1b" not in done.stdout


def test_doctor_estimates_a_fitting_recipe_by_part_and_stage(machine, recipe_file, tmp_path):
    machine.gpu(24, name="NVIDIA A100")
    done = run("doctor", "-r", recipe_file, "-b", tmp_path, "--json", machine=machine)
    value = json.loads(done.stdout)
    memory = value["recipe"]["memory"]
    assert set(memory["parts"]) == {
        "weights",
        "adapters",
        "optimizer",
        "gradients",
        "activations",
        "workspace",
        "process",
    }
    assert memory["need"] == sum(memory["parts"].values())
    assert (memory["device"], memory["fits"], memory["settings"]) == ("NVIDIA A100", True, {})
    assert set(value["recipe"]["disk"]) == {"base", "train", "merge", "convert", "publish"}
    assert {"train", "merge", "convert", "evaluate"} <= value["recipe"]["seconds"].keys()


@pytest.mark.parametrize("torch", [True, False])
def test_doctor_prints_the_rates_and_labels_a_guess(machine, recipe_file, tmp_path, torch):
    if torch:
        pytest.importorskip("torch")
    hidden = "" if torch else "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
    done = run("doctor", "-r", recipe_file, "-b", tmp_path, machine=machine, code=hidden + MAIN)
    line = next(line for line in done.stdout.splitlines() if line.split()[:1] == ["train"] and "computing" in line)
    assert re.search(r"computing in (bf16|fp32); matrix products: \d+ GFLOP/s in bf16, \d+ GFLOP/s in fp32 \(", line)
    assert line.endswith("(measured now)" if torch else "(a guess: without PyTorch nothing is measured)")


def test_doctor_exits_4_for_a_recipe_that_does_not_fit(machine, based_on, tmp_path):
    machine.gpu(8)
    recipe = based_on(quantization="none")
    done = run("doctor", "-r", recipe.path, "-b", tmp_path, "--json", machine=machine)
    assert done.returncode == 4
    value = json.loads(done.stdout)
    assert (value["ok"], value["recipe"]["memory"]["fits"]) == (False, False)
    assert value["recipe"]["memory"]["settings"] == {"quantization": "nf4"}
    assert done.stderr == f"Error: {value['error']}; {value['hint']}\n"
    assert done.stderr.endswith('; set train.quantization = "nf4"\n')
    lines = run("doctor", "-r", recipe.path, "-b", tmp_path, machine=machine).stdout.splitlines()
    assert any(line.split() == ["total", *line.split()[1:3], "does", "not", "fit"] for line in lines)


def test_doctor_exits_4_for_fp16_without_a_gpu(machine, based_on, tmp_path):
    done = run("doctor", "-r", based_on(precision="fp16").path, "-b", tmp_path, machine=machine)
    assert done.returncode == 4
    assert done.stderr.endswith("Error: fp16 needs a GPU; set train.precision to auto, bf16 or fp32\n")
    assert "Traceback" not in done.stderr


def test_doctor_names_a_base_that_is_unknown_before_the_fetch(machine, based_on, tmp_path):
    recipe = based_on("hub:owner/name@" + "0" * 40)
    done = run("doctor", "-r", recipe.path, "-b", tmp_path, machine=machine)
    assert "unknown before it is fetched, so its memory cannot be estimated" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-r", "none.toml"), "cannot read recipe none.toml"),
        (("-b", "/"), "/ is the root of the file system"),
        (("--nonsense",), "No such option"),
    ],
)
def test_doctor_prints_one_line_for_bad_input(machine, arguments, message):
    done = run("doctor", *arguments, machine=machine)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_doctor_at_a_terminal_prints_a_table(machine, recipe_file, tmp_path):
    outer, inner = pty.openpty()
    code = "from tutor.cli.main import main; main()"
    variables = {name: os.environ[name] for name in ("PATH", "HF_HOME", "OLLAMA_HOST")}
    with subprocess.Popen(
        [sys.executable, "-c", code, "doctor", "-r", recipe_file, "-b", tmp_path],
        env=environment(PYTHONPATH=str(ROOT), TERM="xterm", COLUMNS="100", **variables),
        stdout=inner,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(inner)
        text = b""
        try:
            while piece := os.read(outer, 1 << 16):
                text += piece
        except OSError:  # the other end is closed
            pass
        assert process.wait(60) in (0, 4)
    os.close(outer)
    shown = text.decode()
    assert "\x1b[" in shown
    for part in ("warning", "weights", "total", "Disk", "Time, approximate"):
        assert part in shown
