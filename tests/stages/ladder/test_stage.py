"""stages/ladder/stage.py: the figures and the choice, and (marked llamacpp) real files of a tiny random Llama."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from support.files import write_rows
from support.models.random_llama import llama3_splitter, make_tiny
from support.outputs.quantizations import DEMO, quantization

from tutor.engines.llamacpp.score import Score
from tutor.errors import ArtifactError, HostError
from tutor.recipe.settings import ConvertSettings, GenerateSettings, OllamaSettings, Recipe
from tutor.stages.ladder import stage


@pytest.mark.parametrize(
    ("budget", "chosen"), [(0.001, "F16"), (0.01, "Q8_0"), (0.02, "Q5_K_M"), (0.05, "Q5_K_M"), (0.06, "Q4_K_M")]
)
def test_smallest_file_inside_the_budget_is_chosen(budget: float, chosen: str) -> None:
    assert stage.choose(DEMO, budget) == chosen


@pytest.mark.parametrize("lucky", [quantization(50, -0.1, 0.3), quantization(50, 0.3, 0.001)])
def test_choice_needs_loss_and_kl_inside_the_budget(lucky: dict[str, Any]) -> None:
    """A drifted model may predict these rows better by chance."""
    assert stage.choose({**DEMO, "IQ4_NL": lucky}, 0.01) == "Q8_0"


def test_larger_and_worse_file_is_named_and_never_chosen() -> None:
    """Q5_K_M of the demo, before its Q5_1 tensors were replaced: 112 MB and perplexity 10.91, Q4_K_M's is 9.44."""
    figures = {**DEMO, "Q5_K_M": quantization(112, 0.185, 0.21)}
    assert stage.worse_and_larger(figures) == {"Q5_K_M": "Q4_K_M"}
    assert {stage.choose(figures, budget / 100) for budget in range(1, 100)} == {"Q8_0", "Q4_K_M"}
    assert stage.worse_and_larger(DEMO) == {}


def scored(logprobs: list[float], kl: list[float] | None = None, same: list[bool] | None = None) -> Score:
    return Score(tuple(logprobs), tuple(((0, -0.1),) for _ in logprobs), tuple(kl or ()), tuple(same or ()))


def test_figures_are_means_over_all_tokens_of_all_rows() -> None:
    whole = [scored([-1.0, -2.0]), scored([-3.0])]
    found = stage.against_f16(whole, [scored([-1.5, -2.0], [0.3, 0.1], [True, False]), scored([-4.0], [0.2], [True])])
    assert found["loss"] == pytest.approx(2.5)
    assert found["perplexity"] == pytest.approx(math.exp(2.5))
    assert found["more"] == pytest.approx(0.5)
    assert found["more_error"] == pytest.approx(0.5 / math.sqrt(3))
    assert (found["kl"], found["kl_p99"]) == (pytest.approx(0.2), pytest.approx(0.2))
    assert (found["same"], found["tokens"]) == (pytest.approx(2 / 3), 3)


@pytest.mark.parametrize(
    ("kl", "same"),
    [
        ([], []),
        ([0.1], [True]),
        ([0.1, math.nan], [True, True]),
        ([0.1, math.inf], [True, True]),
        ([0.1, 0.1], []),
    ],
)
def test_divergence_that_is_missing_or_no_number_is_refused(kl: list[float], same: list[bool]) -> None:
    """Without a divergence, every quantization would be inside the budget."""
    with pytest.raises(ArtifactError, match="divergence from F16 is known for"):
        stage.against_f16([scored([-1.0, -2.0])], [scored([-1.0, -2.0], kl, same)])


@pytest.mark.parametrize("logprobs", [[], [math.nan, -1.0], [-math.inf, -1.0], [math.inf, -1.0], [500.0]])
def test_loss_that_is_no_number_is_refused(logprobs: list[float]) -> None:
    with pytest.raises(ArtifactError, match="held-out loss over"):
        stage.perplexity([logprobs])
    with pytest.raises(ArtifactError, match="held-out loss over"):
        stage.perplexity([])


@pytest.mark.parametrize("figures", [(math.nan, 0.0), (0.0, math.nan), (math.inf, 0.0)])
def test_figure_that_is_no_number_is_never_inside_the_budget(figures: tuple[float, float]) -> None:
    spoiled = {**DEMO, "Q4_K_M": quantization(1, *figures)}
    assert stage.choose(spoiled, 0.06) != "Q4_K_M"
    assert stage.choose(DEMO, math.nan) == stage.choose({}, 0.06) == "F16"


def test_f16_against_itself_has_no_loss() -> None:
    whole = [scored([-1.0, -2.0])]
    found = stage.against_f16(whole, whole)
    assert (found["more"], found["kl"], found["same"]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("rows", [[], [[]], [[math.nan]], [[-1e6]], [[-math.inf]]])
def test_loss_that_is_no_number_raises_artifact_error(rows: list[list[float]]) -> None:
    with pytest.raises(ArtifactError, match="held-out loss"):
        stage.perplexity(rows)


def test_sampled_rows_are_equidistant_and_never_empty() -> None:
    rows = [([number], [0] * 10) for number in range(10)]
    assert stage.sample_rows(rows, 1000) == rows
    assert [prompt for prompt, _ in stage.sample_rows(rows, 50)] == [[0], [2], [4], [6], [8]]
    assert stage.sample_rows(rows, 1) == rows[:1]


@pytest.fixture(scope="module")
def inputs(real: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Held-out rows, a tiny base and its files in F16, Q8_0 and Q4_0."""
    from support.models.gguf_bytes import facts
    from transformers import AutoTokenizer

    from tutor.engines.llamacpp.convert import Conversion, quantize, to_gguf
    from tutor.prompt.encoding import adds_bos

    home = tmp_path_factory.mktemp("build")
    data, base, gguf = home / "data", home / "base", home / "gguf"
    for made in (data, base, gguf):
        made.mkdir()
    make_tiny(base / "model", llama3_splitter())
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    found = facts(vocabulary=len(tokenizer), add_bos=adds_bos(tokenizer), **ids)
    (base / "base.json").write_text(json.dumps(asdict(found)), "utf-8")
    row = {"instruction": "¿Qué es una interfaz?", "response": "Una forma de objeto.", "category": "a"}
    write_rows(data / "held_out.jsonl", [{**row, "response": f"{row['response']} {n}"} for n in range(3)])
    to_gguf(Conversion(base / "model", gguf / "tutor-F16.gguf", "llama-bpe"))
    for kind in ("Q8_0", "Q4_0"):
        quantize(gguf / "tutor-F16.gguf", gguf / f"tutor-{kind}.gguf", kind, 1)
    return {"data": data, "base": base, "convert": gguf}


def recipe(*kinds: Any, budget: float = 0.01, served: str = "auto") -> Recipe:
    return Recipe(
        convert=ConvertSettings(quantizations=list(kinds), base=False, budget=budget),
        generate=GenerateSettings(context=256, max_new_tokens=100),
        ollama=OllamaSettings(quantization=served),
    )


@pytest.mark.llamacpp
def test_run_measures_every_file_and_serves_the_choice(inputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "ladder"
    out.mkdir()
    results = stage.run(recipe("Q8_0", "Q4_0", budget=1.0), inputs, out)
    assert {path.name for path in out.iterdir()} == {"ladder.json", "ladder.svg", "served.json"}
    assert (results["chosen"], results["served"]) == ("Q4_0", "Q4_0")
    assert json.loads((out / "served.json").read_text()) == {"quantization": "Q4_0"}
    f16, near, far = (results["quantizations"][kind] for kind in ("F16", "Q8_0", "Q4_0"))
    assert (f16["kl"], f16["more"], f16["same"]) == (0.0, 0.0, 1.0)
    assert 0 < near["kl"] < far["kl"]
    assert all(entry["tokens_per_second"] > 0 and entry["prompt_per_second"] > 0 for entry in (f16, near, far))
    again = tmp_path / "again"
    again.mkdir()
    stage.run(recipe("Q8_0", "Q4_0", budget=1.0), inputs, again)
    for name in ("ladder.json", "ladder.svg", "served.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), "equal bytes from two runs"


@pytest.mark.llamacpp
def test_quantization_named_by_the_recipe_is_served(inputs: dict[str, Path], tmp_path: Path) -> None:
    results = stage.run(recipe("Q8_0", "Q4_0", budget=1e-9, served="Q4_0"), inputs, tmp_path)
    assert (results["chosen"], results["served"]) == ("F16", "Q4_0")


@pytest.mark.llamacpp
def test_auto_without_one_inside_the_budget_serves_the_closest(
    inputs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = stage.run(recipe("Q4_0", "Q8_0", budget=1e-9), inputs, tmp_path)
    assert (results["chosen"], results["served"]) == ("F16", "Q8_0")
    assert json.loads((tmp_path / "served.json").read_text()) == {"quantization": "Q8_0"}
    assert "Q8_0, the closest to F16, is served" in caplog.text


@pytest.mark.llamacpp
def test_missing_file_raises_and_leaves_no_distributions(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tutor-Q6_K\.gguf is missing"):
        stage.run(recipe("Q6_K"), inputs, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_raises_host_error_before_scoring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.models.gguf_bytes import field, whole

    (tmp_path / "a.gguf").write_bytes(whole((field("general.architecture", 8, b"\5\0\0\0\0\0\0\0llama"),)))
    monkeypatch.setattr(stage, "reference_bytes", lambda rows, vocabulary: 1 << 60)
    with pytest.raises(HostError, match="GB free, scoring needs"):
        stage.benchmark({"F16": tmp_path / "a.gguf"}, [([1], [2])], 1, tmp_path)
