"""serving/evaluation/compare.py: answers of named models are stored, and two models are compared."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.fakes import ollama as fake
from support.fakes.llamacpp_answers import ENGLISH, SPANISH, read_requests, write_base
from support.files import write_rows
from support.outputs.evaluations import PROMPTS, write_evaluation

from tutor.artifacts.stage_folder import writing
from tutor.cli import verdict_tables
from tutor.errors import ArtifactError, RecipeError, ServiceError
from tutor.pipeline.cleaning import clean
from tutor.pipeline.registry import BY_NAME
from tutor.recipe.settings import Recipe
from tutor.serving.evaluation.compare import compare_models, evaluate_models
from tutor.serving.model_names import parse_model

# Evaluating


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(seed=5).model_copy(update={"path": tmp_path / "small.toml"})


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """A build folder with prompts, and GGUF files with the answers of support/fakes/llamacpp_answers.py."""
    folder = tmp_path / "build" / "small"
    with writing(folder / BY_NAME["data"].folder, "data", {}) as (out, _):
        write_rows(out / "prompts.jsonl", PROMPTS)
        write_rows(out / "train.jsonl", [{"instruction": "¿?", "response": SPANISH, "line": 1}])
    write_base(folder / BY_NAME["base"].folder)
    base = {"text": ENGLISH, "requests": str(tmp_path / "base.requests"), "crashes_on": "", "times": 1}
    tuned = {**base, "text": SPANISH, "requests": str(tmp_path / "tutor.requests")}
    with writing(folder / BY_NAME["convert"].folder, "convert", {}) as (out, _):
        for name, model in (("base-Q4_K_M", base), ("tutor-Q4_K_M", tuned), ("tutor-F16", tuned)):
            (out / f"{name}.gguf").write_text(json.dumps(model), "utf-8")
    return tmp_path / "build"


def answers(build: Path, folder: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((build / "small" / folder / "answers.json").read_text("utf-8"))
    return rows


@pytest.mark.slow
@pytest.mark.usefixtures("llamacpp")
def test_named_models_are_graded_and_compared_with_the_first(recipe: Recipe, build: Path) -> None:
    result = evaluate_models(recipe, build, [parse_model("base"), parse_model("tutor"), parse_model("F16")], parallel=3)
    assert {name: model["all"]["passed"]["n"] for name, model in result["models"].items()} == {
        "base": 0,
        "tutor": 8,
        "tutor-F16": 8,
    }
    assert [(change["before"], change["after"]) for change in result["differences"]] == [
        ("base", "tutor"),
        ("base", "tutor-F16"),
    ]
    assert [row["instruction"] for row in answers(build, "eval-tutor-F16")] == [row["instruction"] for row in PROMPTS]
    assert any("100 % (8/8)" in line for line in verdict_tables.verdict_lines(result))
    assert any("better" in line for line in verdict_tables.verdict_lines(result))
    json.dumps(result, allow_nan=False)


@pytest.mark.usefixtures("llamacpp")
def test_base_is_asked_its_own_way_or_as_the_tutor(recipe: Recipe, build: Path, tmp_path: Path) -> None:
    result = evaluate_models(recipe, build, [parse_model("base"), parse_model("base-as-tutor")])
    own, tutors = (result["models"][name]["asked"] for name in ("base", "base-as-tutor"))
    assert own.startswith("its own chat template, with «Responde en español.»; temperature 0.8, top_p 0.9, top_k 40, ")
    assert tutors == "the tutor's prompt; greedy, repetition penalty 1.15, at most 515 tokens"
    asked = [line["prompt"] for line in read_requests(tmp_path / "base.requests") if line["n_predict"] != 1]
    question = PROMPTS[0]["instruction"]
    assert asked[0] == f"[user] {question}\n\nResponde en español.<fin>[assistant] "
    assert asked[len(PROMPTS)] == f"Instrucción: {question}\nRespuesta:"


@pytest.mark.usefixtures("llamacpp")
def test_stored_answers_are_reused_until_an_input_changes(recipe: Recipe, build: Path, tmp_path: Path) -> None:
    assert evaluate_models(recipe, build, [parse_model("tutor")])["ran"]
    before = len(read_requests(tmp_path / "tutor.requests"))
    assert not evaluate_models(recipe, build, [parse_model("tutor")], parallel=4)["ran"]
    assert len(read_requests(tmp_path / "tutor.requests")) == before
    assert evaluate_models(recipe.model_copy(update={"seed": 6}), build, [parse_model("tutor")])["ran"]


def test_answers_of_a_changed_file_are_refused(recipe: Recipe, build: Path) -> None:
    """Its size is equal: the answers would be stored as those of the file that was made."""
    gguf = build / "small/gguf/tutor-Q4_K_M.gguf"
    gguf.write_bytes(gguf.read_bytes().replace(b"0", b"1"))
    with pytest.raises(ArtifactError, match=r"tutor-Q4_K_M\.gguf has changed since it was made"):
        evaluate_models(recipe, build, [parse_model("tutor")])


@pytest.mark.usefixtures("llamacpp")
def test_damaged_answers_are_asked_again(recipe: Recipe, build: Path) -> None:
    evaluate_models(recipe, build, [parse_model("tutor")])
    kept = build / "small/eval-tutor/answers.json"
    before = kept.read_bytes()
    kept.write_bytes(before.replace(b"true", b"tru2", 1))
    assert evaluate_models(recipe, build, [parse_model("tutor")])["ran"]
    assert json.loads(kept.read_bytes())[0]["answers"]["tutor"]["passed"] is True


@pytest.mark.usefixtures("llamacpp")
def test_clean_evaluate_removes_evaluations_of_single_models(recipe: Recipe, build: Path) -> None:
    evaluate_models(recipe, build, [parse_model("tutor")])
    assert sorted(path.name for path in (build / "small").glob("eval*")) == ["eval-tutor", "eval-tutor.log"]
    clean(recipe, build, ("evaluate",))
    assert not list((build / "small").glob("eval*"))


def test_missing_model_error_names_the_existing_ones(recipe: Recipe, build: Path) -> None:
    with pytest.raises(RecipeError, match="made for tutor: F16, Q4_K_M"):
        evaluate_models(recipe, build, [parse_model("Q8_0")])
    with pytest.raises(ArtifactError, match="run: tutor run --until merge"):
        evaluate_models(recipe, build, [parse_model("hf:tutor")])
    with pytest.raises(RecipeError, match="named twice"):
        evaluate_models(recipe, build, [parse_model("tutor"), parse_model("tutor")])


def test_evaluation_without_the_data_stage_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="run: tutor run --until data"):
        evaluate_models(recipe, tmp_path / "empty", [parse_model("tutor")])


# Comparing


def test_builds_are_compared_over_their_common_prompts(recipe: Recipe, tmp_path: Path) -> None:
    early = write_evaluation(tmp_path / "one", [False] * 6 + [True], PROMPTS[:7], base={"text": "x", "passed": True})
    late = write_evaluation(tmp_path / "two", [True] * 7, PROMPTS[7:0:-1])
    found = compare_models(recipe, tmp_path / "build", str(early), str(late / "eval" / "answers.json"))
    assert (found["n"], found["left_out"]) == (6, {"before": 1, "after": 1})
    assert found["all"]["passed"]["before"]["n"] == 1
    assert found["all"]["passed"]["conclusion"] == "better"
    assert found["better"] == [prompt["instruction"] for prompt in PROMPTS[1:6]]
    assert found["worse"] == []
    lines = verdict_tables.comparison_lines(found)
    assert lines[:3] == [
        f"A: {early}",
        f"B: {late}/eval/answers.json",
        "6 prompts answered by both; 2 answered by only one are left out",
    ]
    row = next(line for line in lines if line.lstrip().startswith("all that was asked "))
    assert " ".join(row.split()) == "all that was asked 17 % (1/6) 100 % (6/6) +83 [+17, +100] better"
    assert lines[-6:] == ["  better in B: 5 of 6", *(f"  » {prompt['instruction']}" for prompt in PROMPTS[1:6])]


def test_overlap_with_the_references_is_compared(recipe: Recipe, tmp_path: Path) -> None:
    asked = [{**prompt, "reference": f"Una forma, {place}."} for place, prompt in enumerate(PROMPTS)]
    folders = [write_evaluation(tmp_path / name, [True] * 8, asked) for name in ("one", "two")]
    for chrf, folder in zip((20.0, 35.0), folders, strict=True):
        path = folder / "eval" / "answers.json"
        stored = json.loads(path.read_text("utf-8"))
        for place, row in enumerate(stored):
            row["answers"]["tutor"]["verdicts"]["chrf"] = chrf + place
        path.write_text(json.dumps(stored), "utf-8")
    found = compare_models(recipe, tmp_path / "build", *map(str, folders))
    assert (found["reference"]["n"], found["reference"]["difference"]) == (8, 15.0)
    lines = [" ".join(line.split()) for line in verdict_tables.comparison_lines(found)]
    assert "chrF to its reference 23.5 38.5 +15.0 [+15.0, +15.0] better" in lines
    assert any("not correctness" in line for line in lines)


def test_build_compared_with_itself_shows_no_difference(recipe: Recipe, tmp_path: Path) -> None:
    same = str(write_evaluation(tmp_path / "one", [True, False] * 4, PROMPTS))
    found = compare_models(recipe, tmp_path, same, same)
    assert {entry["conclusion"] for entry in (*found["all"].values(), *found["categories"].values())} == {
        "no difference shown"
    }
    assert (found["better"], found["worse"]) == ([], [])


@pytest.mark.usefixtures("llamacpp")
def test_build_is_compared_with_a_model_that_runs_now(recipe: Recipe, build: Path, tmp_path: Path) -> None:
    early = write_evaluation(tmp_path / "one", [False] * 8, PROMPTS)
    assert compare_models(recipe, build, str(early), "tutor")["all"]["passed"]["conclusion"] == "better"


@pytest.mark.parametrize("content", ["", "[]", "{}", '[{"answers": {}}]', '[{"answers": {"tutor": {"text": "x"}}}]'])
def test_answers_without_verdicts_are_refused(recipe: Recipe, tmp_path: Path, content: str) -> None:
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(ArtifactError, match="evaluate again: tutor eval"):
        compare_models(recipe, tmp_path, str(tmp_path), str(tmp_path))


def test_builds_without_common_prompts_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    early = str(write_evaluation(tmp_path / "one", [True] * 4, PROMPTS[:4]))
    late = str(write_evaluation(tmp_path / "two", [True] * 4, PROMPTS[4:]))
    with pytest.raises(ArtifactError, match="no prompt in common"):
        compare_models(recipe, tmp_path, early, late)
    with pytest.raises(ArtifactError, match="has no answers; name a build folder"):
        compare_models(recipe, tmp_path, early, str(tmp_path))


def test_folder_named_like_a_model_is_not_taken_for_a_build(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout has a folder `tutor`."""
    (tmp_path / "tutor").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="run: tutor run --until data"):
        compare_models(recipe, tmp_path / "build", "tutor", "tutor")


def test_two_ollama_models_are_run_and_compared(recipe: Recipe, build: Path) -> None:
    with fake.running() as server:
        for name in ("alfa:latest", "beta:latest"):
            facts = {"quantization": "Q8_0", "chat_template": "", "kind": "model", "size": 2000}
            server.models[name] = fake.Model({"model": name}, facts, name)
            server.order.append(name)
            server.blobs[name] = b"GGUF"
        with pytest.raises(ServiceError, match="no model gamma"):
            compare_models(recipe, build, "alfa", "gamma", engine="ollama", host=server.host)
        found = compare_models(recipe, build, "alfa", "ollama:beta", engine="ollama", host=server.host, parallel=2)
    assert (found["before"], found["after"], found["n"]) == ("ollama:alfa", "ollama:beta", 8)
    assert found["all"]["passed"]["conclusion"] == "no difference shown"
