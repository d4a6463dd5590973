"""cli/commands/run.py: a stage that a signal ends, a second run, publishing after the stages, clean."""

import json
import platform
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.fakes.ollama import running as running_ollama
from support.files import write_rows, write_text
from support.processes.command import TUTOR
from support.processes.waiting import wait_for

from tutor.cli.commands.run import run_command
from tutor.engines.ollama.protocol import UnreachableError
from tutor.errors import GateError, ServiceError
from tutor.pipeline import runner
from tutor.recipe.reading import read_recipe
from tutor.serving import promote


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


# Publishing after the stages


@pytest.fixture
def published(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `tutor run --publish` where rows and a report are made and no other stage is to do."""
    build = tmp_path / "build"
    for stage in ("data", "report"):
        runner.run_one(stage, read_recipe(recipe_file), build)
    monkeypatch.setattr(runner, "run_all", lambda *_, **__: [])

    def run(*options: str, host: str) -> Any:
        command = ["--publish", *options, "-r", str(recipe_file), "-b", str(build)]
        return CliRunner().invoke(run_command, command, obj={"quiet": True}, env={"OLLAMA_HOST": host})

    return run


def test_publish_without_ollama_prints_so_and_the_report(published: Any, tmp_path: Path) -> None:
    done = published(host="127.0.0.1:1")
    assert done.exit_code == 0
    reason = "no Ollama at http://127.0.0.1:1 (Connection refused)"
    lines = done.stdout.splitlines()
    assert "Nothing to do: every stage is up to date." in lines
    assert f"Not published: {reason}" in lines
    assert f"{tmp_path}/build/small/report/report.html" in lines
    result = json.loads(published("--json", host="127.0.0.1:1").stdout)
    assert result["published"] == {"published": False, "why": reason}
    assert result["ran"] == []


def test_publish_to_an_unknown_host_is_a_service_error(published: Any) -> None:
    done = published(host="host.invalid")
    assert isinstance(done.exception, ServiceError)
    assert done.exception.code == 6


def test_server_that_ends_during_publishing_is_no_absence(published: Any, monkeypatch: Any) -> None:
    def end(*_: Any, **__: Any) -> None:
        raise UnreachableError("no Ollama")

    monkeypatch.setattr(promote, "publish_and_promote", end)
    with running_ollama() as server:
        done = published(host=server.host)
    assert isinstance(done.exception, UnreachableError)


def test_publish_to_ollama_updates_the_report(published: Any, tmp_path: Path, monkeypatch: Any) -> None:
    record = tmp_path / "build" / "small" / "model" / "published.json"
    page = tmp_path / "build" / "small" / "report" / "manifest.json"

    def publish(*_: Any, **options: Any) -> dict[str, Any]:
        assert options == {"wait": 0}
        record.parent.mkdir()
        record.write_text("{}")
        return {"published": False, "tag": "tutor:1", "host": "H", "version": "0.30", "model": "tutor"}

    monkeypatch.setattr(promote, "publish_and_promote", publish)
    before = page.read_bytes()
    with running_ollama() as server:
        done = published(host=server.host)
    assert "Nothing to do: tutor:1 at H (Ollama 0.30) is already served as tutor." in done.stdout
    assert page.read_bytes() != before


def test_publish_that_a_gate_refuses_prints_the_summary(published: Any, monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise GateError("worse than latest")

    monkeypatch.setattr(promote, "publish_and_promote", refuse)
    with running_ollama() as server:
        done = published(host=server.host)
    assert isinstance(done.exception, GateError)
    assert "Everything on one page" in done.stdout


def test_publish_of_some_stages_is_refused(published: Any) -> None:
    done = published("--until", "data", host="127.0.0.1:1")
    assert done.exit_code == 2
    assert "remove --until" in done.output
