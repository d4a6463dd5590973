"""cli/commands/run.py: a stage that a signal ends, a second run, clean."""

import json
import platform
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from support.files import write_rows, write_text
from support.processes.command import TUTOR
from support.processes.waiting import wait_for


@pytest.fixture
def running(start: Any, tmp_path: Path) -> Any:
    """A running `tutor data split` that writes for seconds."""
    (tmp_path / "long").mkdir()
    answer = "```ts\nlet x = 1;\n```\n" * 20
    rows = [{"instruction": f"¿Qué es {number}?", "response": answer} for number in range(20_000)]
    write_rows(tmp_path / "long" / "tutor.jsonl", rows)
    write_rows(tmp_path / "long" / "eval.jsonl", [{"instruction": "¿Y?"}])
    recipe = write_text(tmp_path / "long" / "long.toml", '[base]\nsource = "tiny"\n')
    process = start(TUTOR, "data", "split", "-r", recipe, "-b", tmp_path / "build")
    wait_for((tmp_path / "build" / "long" / "data.partial").exists)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_during_a_stage_leaves_no_partial_folder(running, tutor, tmp_path, number, code):
    running.send_signal(number)
    assert running.wait(30) == code
    assert sorted(path.name for path in (tmp_path / "build" / "long").iterdir() if path.is_dir()) == []
    assert "Traceback" not in running.stderr.read()


def test_second_run_is_refused_until_the_first_is_killed(running, tutor, tmp_path):
    where = ("-r", tmp_path / "long" / "long.toml", "-b", tmp_path / "build")
    running.send_signal(signal.SIGSTOP)  # it never releases the lock: a second run that waits for it would never end
    done = tutor("run", "--json", *where)
    assert running.poll() is None
    assert done.returncode == 7
    error = json.loads(done.stdout)["error"]
    holder = f"in use by process {running.pid} on {platform.node()} since "
    assert re.search(re.escape(holder) + r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d", error)
    assert json.loads(tutor("status", "--json", *where).stdout)[0]["condition"] == "missing"
    running.kill()
    running.wait()
    assert tutor("clean", *where).stdout == f"removed {tmp_path}/build/long/data.partial\n"
