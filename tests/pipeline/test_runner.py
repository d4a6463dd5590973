"""Which stages are up to date, why not, and which run, on a build folder where only the data stage has run.

Covers tutor/pipeline/registry.py too.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.files import write_rows

from tutor.artifacts.hashing import json_sha256
from tutor.artifacts.manifest import find_damage, require_stage
from tutor.artifacts.provenance import PACKAGE, SourceTree
from tutor.artifacts.stage_folder import writing
from tutor.errors import ArtifactError, DataError, RecipeError
from tutor.machine import capacity
from tutor.pipeline import runner
from tutor.pipeline.registry import BY_NAME, STAGES
from tutor.pipeline.runner import inspect, run_all, run_one, stale_reasons
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe, Settings
from tutor.stages.data import stage as data_stage


@pytest.fixture
def build(recipe_file: Path, tmp_path: Path) -> Path:
    """A build folder where the data stage has run."""
    assert run_one("data", read_recipe(recipe_file), tmp_path / "build")
    return tmp_path / "build"


def edited(recipe_file: Path, before: str, after: str) -> Recipe:
    text = recipe_file.read_text()
    assert before in text
    recipe_file.write_text(text.replace(before, after))
    return read_recipe(recipe_file)


def state_of(name: str, recipe: Recipe, build: Path, **options: Any) -> runner.State:
    return {state.stage.name: state for state in inspect(recipe, build, **options)}[name]


def conditions(recipe: Recipe, build: Path) -> dict[str, str]:
    return {state.stage.name: state.condition for state in inspect(recipe, build)}


def test_inspect_reports_only_the_stage_that_ran_as_up_to_date(recipe_file, build):
    found = conditions(read_recipe(recipe_file), build)
    assert found.pop("data") == "up to date"
    assert set(found.values()) == {"missing"}
    assert list(conditions(read_recipe(recipe_file), build)) == [stage.name for stage in STAGES]


def test_run_all_again_runs_nothing(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    assert run_all(recipe, tmp_path / "build", until="data") == ["data"]
    made = (tmp_path / "build" / "small" / "data" / "manifest.json").stat()
    assert run_all(recipe, tmp_path / "build", until="data") == []
    assert not run_one("data", recipe, tmp_path / "build")
    assert (tmp_path / "build" / "small" / "data" / "manifest.json").stat() == made


def test_run_all_of_equal_recipe_and_rows_writes_equal_bytes(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    for name in ("one", "two"):
        run_one("data", recipe, tmp_path / name)
    one, two = (require_stage(tmp_path / name / "small" / "data", "data") for name in ("one", "two"))
    assert (one.key, one.outputs) == (two.key, two.outputs)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("held_out = 0.2", "held_out = 0.3", "recipe.held_out: 0.2 -> 0.3"),
        ("[data]", "seed = 43\n[data]", "recipe.seed: 42 -> 43"),
        ("[data]", "[data]\nrows = 9", "recipe.rows: 0 -> 9"),
    ],
)
def test_reasons_name_a_changed_setting_alone(recipe_file, build, before, after, reason):
    recipe = edited(recipe_file, before, after)
    state = state_of("data", recipe, build)
    assert state.condition == "stale"
    assert stale_reasons(state) == [reason]
    assert run_one("data", recipe, build)
    assert stale_reasons(state_of("data", recipe, build)) == []


@pytest.mark.parametrize(
    "after", ["[train]\nrank = 4\n[data]", "system = 'x'\n[data]", "[ollama]\nmodel = 'b'\n[data]"]
)
def test_stage_stays_up_to_date_when_other_settings_change(recipe_file, build, after):
    assert conditions(edited(recipe_file, "[data]", after), build)["data"] == "up to date"


TRACKERS = ("train", "report_to")
"""Receives the losses of a training and changes nothing of it."""
SETTINGS = [("seed",), ("system",)] + [
    (section, name)
    for section, values in Recipe()
    if isinstance(values, Settings)
    for name in type(values).model_fields
    # Files count by their content.
    if (section, name)
    not in {("data", "train"), ("data", "eval"), ("evaluate", "paraphrases"), ("evaluate", "general"), TRACKERS}
]


@pytest.mark.filterwarnings("ignore:Pydantic serializer")
@pytest.mark.parametrize("where", SETTINGS, ids=".".join)
def test_settings_are_each_in_the_key_of_a_stage(where):
    """A setting in no key could change without any stage running again."""
    recipe = Recipe()
    changed: Any = "another value"
    if len(where) == 2:
        changed = getattr(recipe, where[0]).model_copy(update={where[1]: changed})
    other = recipe.model_copy(update={where[0]: changed})
    assert [stage.name for stage in STAGES if stage.settings(recipe) != stage.settings(other)]


# Code


def edited_manifest(build: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = build / "small" / "data" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    manifest["key"] = json_sha256(manifest["fields"])
    path.write_text(json.dumps(manifest))


def test_reasons_name_changed_code_by_its_file(recipe_file, build):
    now = state_of("data", read_recipe(recipe_file), build).sources["stages/data/stage.py"]

    def change(manifest):
        manifest["fields"]["code"] = "0" * 16
        manifest["sources"]["stages/data/stage.py"] = "1" * 16

    edited_manifest(build, change)
    state = state_of("data", read_recipe(recipe_file), build)
    assert state.condition == "stale"
    assert stale_reasons(state) == [f"code.stages/data/stage.py: {'1' * 16} -> {now}"]


def test_stage_stays_up_to_date_when_its_code_moves(recipe_file, build):
    def move(manifest):
        manifest["sources"]["data.py"] = manifest["sources"].pop("stages/data/stage.py")

    edited_manifest(build, move)
    assert state_of("data", read_recipe(recipe_file), build).condition == "up to date"


def test_reasons_name_the_code_of_an_old_manifest(recipe_file, build):
    """Manifests of older versions name their files in the key."""

    def age(manifest):
        del manifest["sources"], manifest["fields"]["code"]
        manifest["fields"]["code.stages/data.py"] = "1" * 16

    edited_manifest(build, age)
    state = state_of("data", read_recipe(recipe_file), build)
    assert state.condition == "stale"
    code = state.fields["code"]
    assert stale_reasons(state) == [f"code: (absent) -> {code}", f"code.stages/data.py: {'1' * 16} -> (absent)"]


def test_checkpoints_have_the_code_fields_of_the_train_stage(recipe_file, build):
    """Both keys are computed from the stage's module, so that they change together."""
    by_name, by_file = "stages/train/stage.py", PACKAGE / BY_NAME["train"].source
    assert SourceTree().provenance(by_name) == SourceTree().provenance(by_file)


# Inputs


def test_stage_stays_up_to_date_when_a_file_is_touched(recipe_file, build):
    recipe = read_recipe(recipe_file)
    for when in (0, 2_000_000_000):
        for path in (*recipe_file.parent.glob("*.jsonl"), *(build / "small" / "data").iterdir()):
            os.utime(path, (when, when))
        assert run_all(recipe, build, until="data") == []


def test_stage_is_stale_when_a_row_is_edited(recipe_file, build):
    rows = recipe_file.with_name("tutor.jsonl")
    rows.write_text(rows.read_text().replace("El número 3.", "El número tres."))
    state = state_of("data", read_recipe(recipe_file), build)
    assert state.condition == "stale"
    (reason,) = stale_reasons(state)
    assert reason.startswith("file.train: ")
    assert len(reason) < 60


def test_stage_stays_up_to_date_when_its_rows_move(recipe_file, build, tmp_path):
    recipe_file.with_name("tutor.jsonl").rename(tmp_path / "filas españolas.jsonl")
    recipe = edited(recipe_file, "[data]", "[data]\ntrain = 'filas españolas.jsonl'")
    assert conditions(recipe, build)["data"] == "up to date"


def test_stage_stays_up_to_date_when_an_input_is_made_equal(recipe_file, build):
    """Keys hash content: another version of the data stage with equal output does not train for hours again."""

    def fields_of_train() -> Any:
        return state_of("train", read_recipe(recipe_file), build).fields

    def again(name: str, text: str, version: int) -> None:
        with writing(build / "small" / name, name, {"version": version}) as (out, _):
            (out / "file").write_text(text)

    again("data", "rows", 1), again("base", "weights", 1)
    before = fields_of_train()
    again("data", "rows", 2)
    assert fields_of_train() == before
    again("data", "other rows", 2)
    assert fields_of_train() != before


# Damage


def test_run_all_makes_a_damaged_stage_again(recipe_file, build):
    recipe = read_recipe(recipe_file)
    file = build / "small" / "data" / "train.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    assert state_of("data", recipe, build).condition == "up to date"  # by size
    state = state_of("data", recipe, build, content=True)
    assert state.condition == "damaged"
    assert stale_reasons(state) == [f"{file} has changed since it was made"]
    file.write_bytes(whole[:-1])
    assert state_of("data", recipe, build).condition == "damaged"
    assert run_all(recipe, build, until="data") == ["data"]
    assert file.read_bytes() == whole


@pytest.mark.parametrize("damage", [lambda text: text[:99], lambda _: "", lambda _: "[]", lambda _: '{"name": "x"}'])
def test_run_all_makes_a_stage_with_a_damaged_manifest_again(recipe_file, build, caplog, damage):
    recipe, folder = read_recipe(recipe_file), build / "small" / "data"
    manifest = folder / "manifest.json"
    manifest.write_text(damage(manifest.read_text()))
    state = state_of("data", recipe, build)
    assert state.condition == "damaged"
    assert stale_reasons(state) == [f"{manifest} is damaged"]
    assert run_all(recipe, build, until="data") == ["data"]
    assert f"{manifest} is damaged: making {folder} again" in caplog.text
    assert state_of("data", recipe, build).condition == "up to date"


def test_reasons_after_a_damaged_stage_name_that_stage(recipe_file, build):
    recipe = read_recipe(recipe_file)
    shutil.copytree(build / "small" / "data", build / "small" / "adapter")
    (build / "small" / "data" / "train.jsonl").unlink()
    assert stale_reasons(state_of("train", recipe, build)) == ["needs data, base first"]
    with pytest.raises(ArtifactError, match=r"train\.jsonl is missing; run: tutor run --until data"):
        run_one("train", recipe, build)


@pytest.mark.parametrize("name", [stage.name for stage in STAGES if stage.needs])
def test_run_one_without_input_names_the_command_to_run(recipe_file, tmp_path, name):
    with pytest.raises(ArtifactError) as caught:
        run_one(name, read_recipe(recipe_file), tmp_path / "build")
    need = BY_NAME[name].needs[0]
    assert str(caught.value).endswith(f"is not there; run: tutor run --until {need}")
    assert not list((tmp_path / "build" / "small").glob("*.partial"))


def test_run_one_with_a_stale_input_warns(recipe_file, build, caplog):
    for name in ("base", "adapter", "gguf", "ladder"):
        shutil.copytree(build / "small" / "data", build / "small" / name)
    with caplog.at_level(logging.WARNING), pytest.raises(ArtifactError, match=r"\.gguf is not there"):
        run_one("modelfile", read_recipe(recipe_file), build)
    assert "base is out of date with the recipe or its inputs; for the reason: tutor why base" in caplog.text


@pytest.fixture
def trains(build, monkeypatch) -> tuple[list[Any], list[Any]]:
    """A train stage that can run: what its plan is made from, and the plans that it gets."""
    asked, given = [], []
    with writing(build / "small" / "base", "base", {}) as (out, _):
        (out / "model.txt").write_text("weights")

    def plan_training(recipe: Recipe, inputs: dict[str, Path], saved_precision: str | None) -> str:
        asked.append((sorted(inputs), saved_precision))
        return "the plan"

    def run(recipe: Recipe, inputs: dict[str, Path], out: Path, plan: object) -> dict[str, Any]:
        given.append(plan)
        out.mkdir(exist_ok=True)
        (out / "adapter.txt").write_text("adapter")
        return {}

    monkeypatch.setattr(capacity, "plan_training", plan_training)
    monkeypatch.setattr(type(BY_NAME["train"]), "module", SimpleNamespace(run=run))
    return asked, given


def test_run_one_hands_the_train_stage_one_plan(recipe_file, build, trains):
    """The plan is made once, from the folders of its inputs; the stage gets that object."""
    assert run_one("train", read_recipe(recipe_file), build)
    assert trains == ([(["base", "data"], None)], ["the plan"])


def test_plan_of_a_resumed_training_gets_its_precision(recipe_file, build, trains):
    saved = build / "small" / "adapter.checkpoints" / "checkpoint-5"
    with writing(saved, "train", {"device": "cpu", "precision": "bf16"}) as (out, _):
        (out / "trainer_state.json").write_text("{}")
    assert run_one("train", read_recipe(recipe_file), build)
    assert trains[0] == [(["base", "data"], "bf16")]


def test_other_ranks_train_with_the_plan_of_rank_0(recipe_file, build, trains, monkeypatch):
    """One rank measures and decides: another may find other rates."""
    sent = ({}, build / "small" / "adapter.partial", {"plan": "rank 0's plan"})
    monkeypatch.setattr(runner.distributed, "is_main_process", lambda: False)
    monkeypatch.setattr(runner.distributed, "broadcast", lambda value=None: sent)
    assert run_one("train", read_recipe(recipe_file), build)
    assert trains == ([], ["rank 0's plan"])


def test_run_one_ignores_damage_of_a_stage_it_does_not_need(recipe_file, tmp_path):
    recipe = edited(recipe_file, '"tiny"', '"package:no_such_package_of_ours/model.gguf"')
    assert run_one("data", recipe, tmp_path / "build")
    assert run_all(recipe, tmp_path / "build", until="data") == []


def test_run_one_refuses_rows_that_change_while_they_are_read(recipe_file, build, monkeypatch):
    recipe = edited(recipe_file, "held_out = 0.2", "held_out = 0.3")
    before = require_stage(build / "small/data", "data")
    run, rows = data_stage.run, recipe.resolve(recipe.data.train)

    def run_and_edit(*args):
        rows.write_text(rows.read_text() + "\n")
        return run(*args)

    monkeypatch.setattr(data_stage, "run", run_and_edit)
    with pytest.raises(ArtifactError, match=f"{rows.name} changed while the data stage read it") as caught:
        run_one("data", recipe, build)
    assert caught.value.code == 5
    assert require_stage(build / "small/data", "data") == before
    monkeypatch.undo()
    assert run_one("data", recipe, build)


def test_run_one_with_a_wrong_row_leaves_the_last_split(recipe_file, build):
    before = require_stage(build / "small" / "data", "data")
    write_rows(recipe_file.with_name("tutor.jsonl"), [{"instruction": "sin respuesta"}])
    with pytest.raises(DataError) as caught:
        run_one("data", read_recipe(recipe_file), build)
    assert caught.value.problems[0].startswith(f"{recipe_file.parent}/tutor.jsonl:1: ")
    assert require_stage(build / "small" / "data", "data") == before
    assert find_damage(build / "small" / "data", content=True) == []
    assert not list((build / "small").glob("*.partial"))


@pytest.mark.parametrize("system", ["con \\u00a0 dentro", "nulo \\u0000", '\\"\\"\\"\\nfin'])
def test_run_all_refuses_a_system_text_that_ollama_cannot_keep(recipe_file, tmp_path, system):
    recipe = edited(recipe_file, "[data]", f'system = "{system}"\n[data]')
    with pytest.raises(RecipeError, match=r"small\.toml: system has"):
        run_all(recipe, tmp_path / "build", until="data")
    assert not (tmp_path / "build").exists()


# Files left over


def test_run_all_removes_checkpoints_left_by_a_kill(recipe_file, build):
    """A stage removes them last, after its folder has its name."""
    recipe = read_recipe(recipe_file)
    left = build / "small" / "data.checkpoints"
    for run in (lambda: run_one("data", recipe, build), lambda: run_all(recipe, build, until="data")):
        left.mkdir()
        assert not run()
        assert not left.exists()


def test_manifest_names_fields_and_code_and_holds_no_path(recipe_file, build):
    """A build folder can be moved, and holds nothing about the machine but its name."""
    text = (build / "small" / "data" / "manifest.json").read_text()
    assert str(recipe_file.parent) not in text
    fields = json.loads(text)["fields"]
    assert {"recipe.seed", "recipe.held_out", "file.train", "file.eval", "code"} <= set(fields)
    assert "stages/data/stage.py" in json.loads(text)["sources"]
    build.rename(build.with_name("moved"))
    assert conditions(read_recipe(recipe_file), build.with_name("moved"))["data"] == "up to date"
