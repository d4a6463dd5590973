"""stages/report/stage.py and `tutor report`: what makes the page stale, the command, and real browsers."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.outputs.report import (
    LADDER,
)

from tutor.artifacts.stage_folder import writing
from tutor.pipeline.registry import BY_NAME
from tutor.pipeline.runner import State, inspect, run_one
from tutor.recipe.reading import read_recipe
from tutor.stages.report.prompts import prompts
from tutor.stages.report.stage import page
from tutor.stages.report.view import StageOutputs


@pytest.fixture
def build(recipe_file: Path, tmp_path: Path, outputs: StageOutputs) -> Path:
    """A build folder where the data stage has run, with an evaluation for the report."""
    recipe, folder = read_recipe(recipe_file), tmp_path / "build"
    run_one("data", recipe, folder)
    with writing(folder / "small" / "eval", "evaluate", {}) as (out, results):
        results.update(outputs.manifests["eval"].results)
        (out / "answers.json").write_text(json.dumps(outputs.answers))
    return folder


def state(recipe_file: Path, build: Path) -> State:
    return {each.stage.name: each for each in inspect(read_recipe(recipe_file), build)}["report"]


def test_report_is_stale_after_another_stage_has_run(recipe_file: Path, build: Path) -> None:
    recipe = read_recipe(recipe_file)
    assert run_one("report", recipe, build)
    outputs = state(recipe_file, build)
    assert outputs.condition == "up to date"
    assert outputs.manifest
    assert outputs.manifest.results["prompts"] == 9
    assert set(outputs.manifest.outputs) == {"report.html", "README.md"}
    assert "the verdicts and answers" not in outputs.manifest.results["missing"]
    assert not run_one("report", recipe, build)
    with writing(build / "small" / "ladder", "ladder", {}) as (_, results):
        results.update(LADDER)
    assert state(recipe_file, build).condition == "stale"
    assert run_one("report", recipe, build)


def test_report_is_up_to_date_after_a_change_of_train(recipe_file: Path, build: Path) -> None:
    run_one("report", read_recipe(recipe_file), build)
    recipe_file.write_text(recipe_file.read_text() + "[train]\nrank = 4\n")
    assert state(recipe_file, build).condition == "up to date"


def test_report_is_last_and_reads_all_other_stages() -> None:
    assert list(BY_NAME)[-1] == "report"
    assert set(BY_NAME["report"].reads) >= {stage.folder for stage in BY_NAME.values()} - {"data", "model", "report"}


def test_command_prints_the_path_of_the_page(tutor: Any, recipe_file: Path, build: Path) -> None:
    done = tutor("report", "-r", recipe_file, "-b", build)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.splitlines()[0])
    assert path == build / "small" / "report" / "report.html"
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert "the training" in done.stdout
    found = json.loads(tutor("report", "-r", recipe_file, "-b", build, "--json").stdout)
    assert found["page"] == str(path)
    assert found["ran"] is False


def test_option_open_starts_the_browser(tutor: Any, recipe_file: Path, build: Path, tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/shown\n')
    browser.chmod(0o755)
    done = tutor("report", "--open", "-r", recipe_file, "-b", build, env={"BROWSER": f"{browser} %s"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shown").read_text().strip() == (build / "small/report/report.html").resolve().as_uri()


def test_damaged_answers_raise_artifact_error(tutor: Any, recipe_file: Path, build: Path) -> None:
    (build / "small" / "eval" / "answers.json").write_text("{")
    done = tutor("report", "-r", recipe_file, "-b", build)
    assert done.returncode == 5
    assert "answers.json" in done.stderr
    assert "tutor eval" in done.stderr


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


FRAME = '<iframe id="f" src="report.html" style="width:390px;height:900px;border:0"></iframe>'


PHONE = f'<!doctype html><body style="margin:0">{FRAME}'


PROBE = """<script>addEventListener('load', () => { const seen = f.contentDocument, root = seen.documentElement;
const shown = () => [...seen.querySelectorAll('#prompts .prompt')].filter(each => each.offsetParent).length;
const counts = [...seen.querySelectorAll('input')].map(one => { one.checked = true; const n = shown();
seen.getElementById(one.name === 'kind' ? 'show-kinds' : 'show-verdicts').checked = true; return [one.id, n]; });
const ground = getComputedStyle(seen.body).backgroundColor;
document.title = JSON.stringify({width: root.scrollWidth, counts, ground}); });
</script>"""


def browse(tmp_path: Path, page_file: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--v=0", "--allow-file-access-from-files", *options, page_file.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=90, check=False)


def probed(tmp_path: Path, *options: str) -> dict[str, Any]:
    """The values that a script reads from the page in a frame of 390 pixels."""
    (tmp_path / "probe.html").write_text(PHONE + PROBE)
    done = browse(
        tmp_path, tmp_path / "probe.html", "--dump-dom", "--hide-scrollbars", "--window-size=800,1000", *options
    )
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found, done.stderr
    value: dict[str, Any] = json.loads(found[1])
    return value


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_browser_shows_the_page_without_console_messages(outputs: StageOutputs, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page(outputs), "utf-8")
    done = browse(
        tmp_path, tmp_path / "report.html", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,2000"
    )
    assert "CONSOLE" not in done.stderr
    assert (tmp_path / "page.png").stat().st_size > 50_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_filters_and_width_on_a_phone(outputs: StageOutputs, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page(outputs), "utf-8")
    light, dark = (probed(tmp_path, f"--blink-settings=preferredColorScheme={scheme}") for scheme in (1, 0))
    assert light["width"] == 390
    listed = prompts(outputs.answers)
    wanted = {f"show-{each['class']}": each["count"] for each in (*listed["kinds"], *listed["verdicts"])}
    assert dict(light["counts"]) == {"show-kinds": 9, "show-verdicts": 9, **wanted}
    assert light["ground"] != dark["ground"]
