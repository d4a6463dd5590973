"""Damaged files of a build folder need no `rm`: the command that is run again makes them again, or does without."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.processes.command import in_process

from tutor.artifacts.hashing import HASHES
from tutor.artifacts.manifest import find_damage
from tutor.artifacts.source import CACHE_KEY
from tutor.artifacts.stage_folder import writing
from tutor.errors import ArtifactError
from tutor.formats.rows.split_files import TRAIN, read_split
from tutor.machine import capacity
from tutor.pipeline import repair, runner
from tutor.pipeline.registry import Stage
from tutor.recipe.reading import read_recipe


@pytest.fixture
def build(recipe_file: Path, tmp_path: Path) -> Path:
    """A build folder where the data stage has run."""
    assert runner.run_one("data", read_recipe(recipe_file), tmp_path / "build")
    return tmp_path / "build"


TEXTS = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "list": lambda text: "[]",
    "numbers": lambda text: json.dumps(dict.fromkeys(json.loads(text), 1)),
    "empty objects": lambda text: json.dumps({key: {} for key in json.loads(text)}),
    "noise": lambda text: "\x00\ufffd" * 500,
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("file", ["data/manifest.json", HASHES, ".recipe.json", ".lock.json", ".lock"])
def test_damaged_state_file_needs_no_rm(recipe_file, build, file, name):
    path = build / "small" / file
    path.write_text(TEXTS[name](path.read_text("utf-8") or "{}"), "utf-8")
    where = ("-r", recipe_file, "-b", build)
    status = in_process("status", "--json", *where)
    damaged = "manifest" in file
    assert status.returncode == (5 if damaged else 0), status.stderr
    assert json.loads(status.stdout)[0]["condition"] == ("damaged" if damaged else "up to date")
    why = in_process("why", "data", *where)
    assert ("manifest.json is damaged" if damaged else "data is up to date") in why.stdout
    done = in_process("run", "--until", "data", "--json", *where)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ran"] == (["data"] if damaged else [])
    assert find_damage(build / "small" / "data", content=True) == []


def test_damaged_cache_of_sources_is_read_again(recipe_file, build):
    path = build / "small" / HASHES
    whole = json.loads(path.read_text("utf-8"))
    reader = whole[CACHE_KEY]["reader"]
    for files in (None, [], {}, {"x": 1}, {name: {} for name in whole[CACHE_KEY]["files"]}):
        path.write_text(json.dumps({CACHE_KEY: {"reader": reader, "files": files}}), "utf-8")
        assert in_process("status", "-r", recipe_file, "-b", build).returncode == 0


def test_run_all_makes_an_input_with_other_content_again(recipe_file, build, monkeypatch, caplog):
    """A power failure leaves files of the right size full of zeros: their size is all that a run looks at."""
    seen = []

    def train(recipe: Any, inputs: dict[str, Path], out: Path, **_: Any) -> dict[str, Any]:
        seen.append(len(read_split(inputs["data"], TRAIN)))
        (out / "adapter.txt").write_text("adapter")
        return {}

    plain = Stage.module.fget
    module = property(lambda stage: SimpleNamespace(run=train) if stage.name == "train" else plain(stage))
    monkeypatch.setattr(Stage, "module", module)
    monkeypatch.setattr(capacity, "plan_training", lambda *_: None)
    monkeypatch.setattr(capacity, "refuse_stages", lambda *_: True)
    recipe = read_recipe(recipe_file)
    state = {found.stage.name: found for found in runner.inspect(recipe, build)}["base"]
    with writing(build / "small" / "base", "base", state.fields, sources=state.sources) as (out, _):
        (out / "base.json").write_text("{}")
    rows = build / "small" / "data" / TRAIN
    rows.write_bytes(bytes(rows.stat().st_size))
    assert repair.run_all(recipe, build, until="train") == ["data", "train"]
    assert f"{rows} has changed since it was made: making {rows.parent} again" in caplog.text
    assert seen == [10]


def test_run_all_with_whole_inputs_raises_the_stages_error(recipe_file, build, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise ArtifactError("the base is of another kind")

    calls: list[int] = []
    monkeypatch.setattr(runner, "run_all", refuse)
    with pytest.raises(ArtifactError, match="of another kind"):
        repair.run_all(read_recipe(recipe_file), build, until="data")
    assert calls == [1]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"parity": 1}', '{"parity": {}}', '{"parity": {"state": []}}', "\ufffd"]
)
def test_report_does_without_a_damaged_record_of_publishing(recipe_file, build, text):
    record = build / "small" / "model" / "published.json"
    record.parent.mkdir()
    record.write_text(text, "utf-8")
    for folder in ("parity-ollama", "eval-ollama", "parity"):
        (build / "small" / folder).mkdir()
        (build / "small" / folder / "manifest.json").write_text(text, "utf-8")
    done = in_process("report", "-r", recipe_file, "-b", build)
    assert done.returncode == 0, done.stderr
