"""stages/parity/gate.py: budgets, the refusal with its cause, the table, and the gate in the pipeline."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.outputs.observations import SUBJECTS, TIGHT, observation, scored
from support.outputs.parity import write_parity
from support.outputs.published import make_recipe, make_stages

from tutor.artifacts.manifest import find_damage, read_manifest
from tutor.cli import summary
from tutor.errors import GateError
from tutor.pipeline import runner
from tutor.pipeline.registry import BY_NAME
from tutor.recipe.quantizations import KINDS
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import BUDGETS, ParitySettings, Recipe
from tutor.stages.parity.compare import Comparison, Observation
from tutor.stages.parity.gate import HandOff, hand_off, note_lines, parity_table, refusal


def compared(kind: Any, other: Observation | None = None, **names: str) -> HandOff:
    sides = ([observation()], [other or observation()])
    return hand_off(kind, (names.get("ours", "a"), names.get("theirs", "b")), sides, TIGHT)


def test_refusal_names_the_first_hand_off_and_its_cause() -> None:
    bad = observation(ids=(5, 6), scored=scored(-3.0, -4.0))
    chain = [compared("merge"), compared("convert", bad, ours="merged", theirs="F16"), compared("quantize", bad)]
    refused = refusal(chain)
    assert refused is not None
    assert refused["message"].startswith(
        "merged -> F16 (convert) diverges in its tokens: «code»: the second lacks the 1"
    )
    assert "add_bos_token" in refused["hint"]
    assert refusal([compared("merge"), compared("convert")]) is None


@pytest.mark.parametrize("kind", ["merge", "convert", "quantize", "publish"])
@pytest.mark.parametrize("check", SUBJECTS)
def test_every_difference_of_every_hand_off_has_a_cause(kind: Any, check: str) -> None:
    refused = refusal([HandOff(kind, "a", "b", (Comparison(check, ok=False, figures={}, what="x"),), TIGHT)])
    assert refused is not None
    assert refused["hint"].startswith("most likely: ")


@pytest.mark.parametrize("kind", ["merge", "convert", "quantize", "publish"])
@pytest.mark.parametrize(
    ("silent", "what"),
    [({"scored": None, "trace": None}, "log-probabilities"), ({"prompt": None, "ids": None, "tokens": None}, "tokens")],
)
def test_hand_off_that_shows_nothing_is_refused(kind: Any, silent: dict[str, Any], what: str) -> None:
    item = compared(kind, observation(**silent))
    assert item.state == "diverges"
    refused = refusal([item])
    assert refused is not None
    assert refused["message"] == f"a -> b ({kind}) is not shown: of its {what} nothing could be compared"
    assert parity_table([item.record()])[1].endswith("<- not shown")
    assert refused["hint"]


def test_hand_off_with_a_number_that_is_none_is_refused() -> None:
    item = compared("quantize", observation(scored=scored(-0.5, math.nan)))
    json.dumps(item.record(), allow_nan=False)
    refused = refusal([item])
    assert refused is not None
    assert "which must be finite" in refused["message"]
    parity_table([item.record()])


def test_no_hand_off_is_refused() -> None:
    refused = refusal([])
    assert refused is not None
    assert "no two engines were compared" in refused["message"]


def test_table_names_what_was_not_compared() -> None:
    item = hand_off(
        "publish", ("a", "b"), ([observation()], [observation(scored=None, trace=None)]), TIGHT, answers=False
    )
    assert item.state == "prompts only", "answers that were not compared are not proven equal"
    assert item.record()["not_compared"] == ["log-probabilities", "greedy answer", "end"]
    assert parity_table([item.record()])[1].endswith("not compared: log-probabilities, greedy answer, end")


def test_table_lists_a_hand_off_that_was_not_checked() -> None:
    missing = HandOff("merge", "base + adapter", "merged", missing="16 GB are needed, 3 GB are free")
    assert missing.state == "not checked"
    text = "\n".join(
        parity_table(
            [missing.record(), compared("convert").record(), compared("quantize", observation(prompt="x")).record()]
        )
    )
    assert "base + adapter -> merged    not checked: 16 GB are needed" in text
    assert text.count("<- diverges") == 1


def test_budget_in_the_recipe_replaces_one_default(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[parity]\nprompts = 1\nbudgets = {Q8_0 = 0.001}\n")
    found = read_recipe(path).parity
    assert found.budgets == {**BUDGETS, "Q8_0": 0.001}
    assert ParitySettings().budgets == BUDGETS


def test_budgets_grow_with_coarser_quantizations() -> None:
    assert set(BUDGETS) == set(KINDS)
    assert list(BUDGETS.values()) == sorted(BUDGETS.values()), "the kinds are ordered from the finest to the coarsest"
    assert max(BUDGETS.values()) < 4, "another model of the same shape is further off"


@pytest.mark.parametrize("text", ["budgets = {Q9 = 0.1}", "budgets = {Q8_0 = 0}", "prompts = -1"])
def test_invalid_budget_is_refused(tmp_path: Path, text: str) -> None:
    from tutor.errors import RecipeError

    path = tmp_path / "a.toml"
    path.write_text(f"[parity]\n{text}\n")
    with pytest.raises(RecipeError, match="parity"):
        read_recipe(path)


REFUSAL = {"message": "F16 -> Q8_0 (quantize) diverges in its tokens: «code»", "hint": "most likely: x"}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path)


@pytest.fixture
def build(recipe: Recipe, tmp_path: Path) -> Path:
    return make_stages(recipe, tmp_path / "build")


def test_refused_gate_refuses_again_and_keeps_its_folder(recipe: Recipe, build: Path) -> None:
    made = write_parity(recipe, build, refused=REFUSAL)
    for _ in range(2):
        with pytest.raises(GateError, match=r"F16 -> Q8_0 .* diverges in its tokens.*most likely") as caught:
            runner.require_gate_passed(made)
    assert (caught.value.code, caught.value.stage) == (8, "parity")
    assert find_damage(made) == []


def test_refused_stage_is_refused_until_its_inputs_change(recipe: Recipe, build: Path) -> None:
    manifest = read_manifest(write_parity(recipe, build, refused=REFUSAL))
    assert manifest is not None
    state = runner.State(BY_NAME["parity"], build / "small/parity", manifest, manifest.fields, ())
    assert state.condition == "refused"
    assert state.condition in runner.NOTHING_TO_DO
    assert runner.stale_reasons(state) == [REFUSAL["message"]]
    assert replace(state, fields={}).condition == "stale", "another input is another question"


def test_summary_shows_the_hand_offs(recipe: Recipe) -> None:
    stages = {"parity": {"hand_offs": [compared("merge").record()]}}
    found = summary.summary_lines({"stages": stages, "examples": []}, "x.toml")
    assert any("a -> b" in line and "6/7" not in line for line in found)


def test_notes_say_where_another_penalty_would_change_the_answer() -> None:
    penalty = {"factor": 1.15, "window": 4096, "departs": {"without a penalty": 2, "over 64 tokens": None}}
    left_out, line = note_lines({"penalty": penalty, "left_out": ["special tokens"]})
    assert left_out == "  not compared: the conversation «special tokens»"
    assert line == (
        "  repetition penalty 1.15 over 4096 tokens: another answer, by more than a near tie, without a penalty "
        "from token 2 on, over 64 tokens never"
    )
    assert note_lines({"penalty": {**penalty, "factor": 1.0}}) == []
