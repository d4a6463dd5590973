"""stages/evaluate/stage.py: a run on fake programs, complete and interrupted."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fakes.llamacpp_answers import ENGLISH, SPANISH, read_requests, write_base
from support.files import write_rows

from tutor.artifacts.disk import write_json
from tutor.artifacts.manifest import MANIFEST
from tutor.artifacts.stage_folder import checkpoint_folder
from tutor.engines.llamacpp.server import serve
from tutor.errors import ArtifactError, HostError, ServiceError
from tutor.formats.models.served_quantization import write_served
from tutor.recipe.settings import Recipe
from tutor.stages.evaluate import stage
from tutor.stages.evaluate.stage import run, side_by_side

PROMPTS = [
    {"instruction": f"¿Qué es {name}? Explícamelo.", "category": category, "topic": "t", "code": [], "expect": {}}
    for name, category in (("a", "definicion"), ("b", "ejemplo"), ("c", "definicion"), ("d", "ejemplo"))
]


def test_side_by_side_puts_answers_below_their_prompt() -> None:
    rows = side_by_side(PROMPTS[:1], {"base": [{"error": "x"}], "tutor": [{"text": "y"}]})
    assert rows == [{**PROMPTS[0], "answers": {"base": {"error": "x"}, "tutor": {"text": "y"}}}]


def write_inputs(root: Path, **tutor: Any) -> dict[str, Path]:
    """The folders that the stage reads; `tutor` changes what the tutor's GGUF configures."""
    inputs = {name: root / name for name in ("data", "base", "train", "convert", "ladder")}
    for name in ("data", "convert", "ladder"):
        inputs[name].mkdir()
    rows = [{**prompt, "response": "Sí."} for prompt in PROMPTS[:2]]
    trained = [{"instruction": "¿?", "response": SPANISH, "line": 3}]
    for name, lines in (("prompts", PROMPTS), ("held_out", rows), ("train", trained)):
        write_rows(inputs["data"] / f"{name}.jsonl", lines)
    write_base(inputs["base"])
    base = {"text": ENGLISH, "logprob": -2.0, "requests": str(root / "base.requests"), "crashes_on": "", "times": 1}
    tuned = {**base, "text": SPANISH, "logprob": -1.0, "requests": str(root / "tutor.requests"), **tutor}
    for name, model in (("base-Q4_K_M", base), ("tutor-Q4_K_M", tuned), ("tutor-F16", tuned)):
        (inputs["convert"] / f"{name}.gguf").write_text(json.dumps(model), "utf-8")
    return inputs


def warms_up(request: dict[str, Any]) -> bool:
    return request["n_predict"] == 1


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "eval.partial"
    folder.mkdir()
    return folder


def recipe(folder: Path, **sections: Any) -> Recipe:
    return Recipe.model_validate({"seed": 5, **sections}).model_copy(update={"path": folder / "r.toml"})


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.usefixtures("llamacpp")
def test_run_answers_grades_and_scores_every_model(tmp_path: Path, out: Path) -> None:
    summary = run(recipe(tmp_path), write_inputs(tmp_path), out)
    assert sorted(path.name for path in out.iterdir()) == ["answers.json", "paraphrased.json"]
    answers = read(out / "answers.json")
    assert [entry["instruction"] for entry in answers] == [prompt["instruction"] for prompt in PROMPTS]
    record = answers[0]["answers"]["tutor"]
    assert (record["text"], record["passed"], record["reasons"]) == (SPANISH, True, [])
    assert record["verdicts"]["usual_length"] is True
    assert record["copied"]["line"] == 3
    assert answers[0]["answers"]["base"]["reasons"] == ["its prose is not Spanish (confidence 0.00)"]
    assert (summary["models"]["tutor"]["all"]["passed"]["n"], summary["models"]["base"]["all"]["passed"]["n"]) == (4, 0)
    assert summary["models"]["tutor"]["tokens_per_second"] == 40.0
    changes = [(each["before"], each["after"]) for each in summary["differences"]]
    assert changes == [("base", "tutor"), ("base-as-tutor", "tutor")]
    assert [each["all"]["passed"]["difference"] for each in summary["differences"]] == [1.0, 1.0]
    assert len(summary["differences"][0]["better"]) == 4
    assert summary["copied"]["tutor"]["half_copied"] == 4
    assert summary["paraphrases"] is None
    assert [finding["conclusion"] for finding in summary["findings"]] == ["worse", *["no difference shown"] * 2]
    json.dumps(summary, allow_nan=False)


@pytest.mark.usefixtures("llamacpp")
def test_answers_are_compared_with_the_references(tmp_path: Path, out: Path) -> None:
    inputs = write_inputs(tmp_path)
    references = [SPANISH, *(f"{SPANISH} Un ejemplo es {name}." for name in "bcdefg")]
    asked = [{**PROMPTS[0], "instruction": f"¿{number}?", "reference": text} for number, text in enumerate(references)]
    write_rows(inputs["data"] / "prompts.jsonl", asked)
    summary = run(recipe(tmp_path), inputs, out)
    record = read(out / "answers.json")[0]["answers"]["tutor"]
    assert record["verdicts"]["chrf"] == 100.0 > record["verdicts"]["chrf_other"]
    assert (record["verdicts"]["own_words"], record["passed"]) == (False, True)
    overlap = summary["models"]["tutor"]["reference"]
    assert (overlap["n"], overlap["control"]["n"]) == (7, 7)
    assert overlap["low"] < overlap["mean"] < overlap["high"]
    change = summary["differences"][0]
    assert change["reference"]["after"] == overlap["mean"]
    assert change["reference"]["conclusion"] == "better"
    texts = [finding["text"] for finding in summary["findings"]]
    assert any(text.startswith("base to tutor, chrF to its reference: ") for text in texts)
    assert any(
        text.startswith("tutor, chrF with the references of other prompts, and with its own: ") for text in texts
    )
    assert not any(text.startswith("base, chrF") for text in texts)


@pytest.mark.usefixtures("llamacpp")
def test_run_is_greedy_with_the_seed(tmp_path: Path, out: Path) -> None:
    run(recipe(tmp_path), write_inputs(tmp_path), out)
    requests = read_requests(tmp_path / "tutor.requests")
    assert all((line["temperature"], line["seed"]) == (0.0, 5) for line in requests)
    assert [line["n_predict"] for line in requests if not warms_up(line)] == [515] * 4


@pytest.mark.usefixtures("llamacpp")
def test_base_is_asked_its_own_way_and_as_the_tutor(tmp_path: Path, out: Path) -> None:
    summary = run(recipe(tmp_path), write_inputs(tmp_path), out)
    assert list(summary["models"]) == ["base", "base-as-tutor", "tutor"]
    assert {model["file"] for name, model in summary["models"].items() if name != "tutor"} == {"base-Q4_K_M"}
    requests = [line for line in read_requests(tmp_path / "base.requests") if not warms_up(line)]
    own, tutors = requests[:4], requests[4:]
    assert {line["prompt"] for line in own} == {
        f"[user] {prompt['instruction']}\n\nResponde en español.<fin>[assistant] " for prompt in PROMPTS
    }
    assert {(line["temperature"], line["seed"], line["n_predict"], line["cache_prompt"]) for line in own} == {
        (0.8, 5, 1024, False)
    }
    assert {line["prompt"] for line in tutors} == {
        f"Instrucción: {prompt['instruction']}\nRespuesta:" for prompt in PROMPTS
    }
    assert {(line["temperature"], line["n_predict"]) for line in tutors} == {(0.0, 515)}
    assert summary["models"]["base"]["asked"].startswith("its own chat template, with «Responde en español.»; ")


@pytest.mark.usefixtures("llamacpp")
def test_thought_of_the_base_is_no_part_of_its_answer(tmp_path: Path, out: Path) -> None:
    inputs = write_inputs(tmp_path)
    (inputs["convert"] / "base-Q4_K_M.gguf").write_text(
        json.dumps({"text": f"<think>{ENGLISH}</think>\n\n{SPANISH}", "logprob": -1.0, "crashes_on": "", "times": 1,
                    "requests": str(tmp_path / "base.requests")}), "utf-8"
    )  # fmt: skip
    run(recipe(tmp_path, data={"language": "any"}), inputs, out)
    record = read(out / "answers.json")[0]["answers"]
    assert (record["base"]["thought"], record["base"]["text"], record["base"]["passed"]) == (
        ENGLISH.strip(),
        SPANISH,
        True,
    )
    assert record["base-as-tutor"]["reasons"] == ["it shows template text, a thinking tag or a special token"], (
        "the tutor's prompt has no thoughts"
    )


@pytest.mark.usefixtures("llamacpp")
def test_paraphrases_are_compared_with_their_originals(tmp_path: Path, out: Path) -> None:
    rows = [
        {"original": "¿Qué es c? Explícamelo.", "instruction": "Explícame qué es c, por favor."},
        {"original": "¿Qué es de otro conjunto?", "instruction": "No se pregunta."},
    ]
    write_rows(tmp_path / "words.jsonl", rows)
    summary = run(recipe(tmp_path, evaluate={"paraphrases": "words.jsonl"}), write_inputs(tmp_path), out)
    (row,) = read(out / "paraphrased.json")
    assert (row["original"], row["category"]) == (rows[0]["original"], "definicion")
    assert list(row["answers"]) == ["tutor"]
    assert (summary["paraphrases"]["n"], summary["paraphrases"]["difference"]) == (1, 0.0)
    assert summary["models"]["tutor"]["all"]["n"] == 4, "they are no prompts of their own"
    for name, count in (("base", 8), ("tutor", 5)):
        assert sum(not warms_up(line) for line in read_requests(tmp_path / f"{name}.requests")) == count


@pytest.mark.usefixtures("llamacpp")
def test_servers_share_the_cores_and_keep_their_logs(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    @contextlib.contextmanager
    def recorded(*arguments: Any, **options: Any) -> Iterator[Any]:
        given.append((options["threads"], options["log"].name))
        with serve(*arguments, **options) as server:
            yield server

    monkeypatch.setattr(stage, "serve", recorded)
    monkeypatch.setattr(stage, "usable_cores", lambda: 4)
    run(recipe(tmp_path), write_inputs(tmp_path), out)
    assert {threads for threads, _ in given} == {2}
    assert {name for _, name in given} >= {"base-1.log", "tutor-1.log"}
    assert len({name for _, name in given}) == len(given)


@pytest.mark.usefixtures("llamacpp")
def test_server_that_crashes_once_loses_no_answer(tmp_path: Path, out: Path) -> None:
    summary = run(recipe(tmp_path), write_inputs(tmp_path, crashes_on="¿Qué es c?"), out)
    assert (tmp_path / "tutor.requests.crashes").exists()
    assert summary["models"]["tutor"]["all"]["errors"] == 0
    assert summary["models"]["tutor"]["all"]["stopped"]["n"] == 4


@pytest.mark.usefixtures("llamacpp")
def test_prompt_that_crashes_every_server_fails_alone(tmp_path: Path, out: Path) -> None:
    summary = run(recipe(tmp_path), write_inputs(tmp_path, crashes_on="¿Qué es c?", times=99), out)
    assert summary["models"]["tutor"]["all"]["errors"] == 1
    assert summary["models"]["tutor"]["all"]["passed"]["n"] == 3
    assert read(out / "answers.json")[2]["answers"]["tutor"]["reasons"] == [
        "no answer: the engine crashed 2 times on this prompt"
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("llamacpp")
def test_failed_run_keeps_its_answers_for_the_next_run(tmp_path: Path, out: Path) -> None:
    inputs = write_inputs(tmp_path, crashes_on="¿Qué es", times=6)
    with pytest.raises(ServiceError, match="crashed on 3 prompts in a row"):
        run(recipe(tmp_path), inputs, out)
    assert sorted(path.name for path in checkpoint_folder(out).iterdir()) == [
        "base-as-tutor.jsonl",
        "base.jsonl",
        "tutor.jsonl",
    ]
    before = len(read_requests(tmp_path / "base.requests"))
    assert run(recipe(tmp_path), inputs, out)["models"]["tutor"]["all"]["errors"] == 0
    since = [line for line in read_requests(tmp_path / "base.requests")[before:] if "n_predict" in line]
    assert since == [], "the base's answers were kept"


@pytest.mark.usefixtures("llamacpp")
def test_recipe_without_base_evaluates_only_the_tutor(tmp_path: Path, out: Path) -> None:
    inputs = write_inputs(tmp_path)
    (inputs["convert"] / "base-Q4_K_M.gguf").unlink()
    with pytest.raises(ArtifactError, match=r"base-Q4_K_M\.gguf is missing; run: tutor convert"):
        run(recipe(tmp_path), inputs, out)
    summary = run(recipe(tmp_path, convert={"base": False}), inputs, out)
    assert (list(summary["models"]), summary["differences"]) == (["tutor"], [])


@pytest.mark.usefixtures("llamacpp")
def test_auto_evaluates_the_quantization_of_the_ladder(tmp_path: Path, out: Path) -> None:
    inputs = write_inputs(tmp_path)
    (inputs["convert"] / "tutor-Q4_K_M.gguf").unlink()
    chosen = recipe(tmp_path, convert={"base": False}, ollama={"quantization": "auto"})
    with pytest.raises(ArtifactError, match="run: tutor ladder"):
        run(chosen, inputs, out)
    write_served(inputs["ladder"], "F16")
    write_json(inputs["ladder"] / MANIFEST, {})
    assert run(chosen, inputs, out)["models"]["tutor"]["file"] == "tutor-F16"


@pytest.mark.usefixtures("llamacpp")
def test_missing_compiler_raises_before_any_answer(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path / "nowhere"))
    inputs = write_inputs(tmp_path)
    write_rows(inputs["data"] / "prompts.jsonl", [{**PROMPTS[0], "expect": {"code": True}}])
    with pytest.raises(HostError):
        run(recipe(tmp_path), inputs, out)
    assert not (tmp_path / "base.requests").exists()
