"""cli/summary.py and cli/model_lines.py: tables of the stages that have run, also when some have not."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tutor.artifacts.stage_folder import writing
from tutor.cli import summary, verdict_tables
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe
from tutor.stages.forgetting.stage import drift

VERDICTS = ("passed", "language", "stopped", "code_block", "no_loop")
MODEL = {"all": {"n": 5, **{name: {"n": 4, "share": 0.8} for name in VERDICTS}}, "tokens_per_second": 95.2}
TRAIN = {
    "rows": 19,
    "samples_per_second": 1.5,
    "quantization": "nf4",
    "precision": "bf16",
    "held_out": {
        "rows": 5,
        "loss_before": 3.5,
        "loss_after": 1.25,
        "perplexity_before": 33.1,
        "perplexity_after": 3.49,
    },
}
FIGURES = {"size": 271_000_000, "perplexity": 4.5, "more": 0.0, "kl": 0.0, "kl_p99": 0.0, "same": 1.0, "memory": None}
FIGURES |= {"prompt_per_second": 300.0, "tokens_per_second": 95.0}
LADDER = {
    "quantizations": {"F16": FIGURES},
    "budget": 0.01,
    "chosen": "F16",
    "served": "F16",
    "perplexity": {"tutor-F16": {"perplexity": 4.5}},
}
FILES = {"tutor-F16.gguf": {"size": 271_000_000}, "tutor-Q4_K_M.gguf": {"size": 105_000_000}}


def made(folder: Path, stage: str, results: dict[str, Any], **files: Any) -> None:
    with writing(folder, stage, {}) as (out, found):
        found.update(results)
        for name, value in files.items():
            (out / f"{name}.json").write_text(json.dumps(value))


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return read_recipe(recipe_file)


def test_summary_of_an_empty_build_is_empty(recipe, tmp_path):
    found = summary.collect(recipe, tmp_path / "build")
    assert found == {"recipe": str(recipe.path), "stages": {}, "unchecked": [], "examples": []}
    assert summary.summary_lines(found, str(recipe.path)) == []


def test_summary_has_lines_for_each_stage_that_ran(recipe, tmp_path):
    folder = tmp_path / "build" / "small"
    made(folder / "adapter", "train", TRAIN)
    text = "\n".join(summary.summary_lines(summary.collect(recipe, tmp_path / "build"), "r.toml"))
    assert "Trained on 19 rows in 0 s (1.50 samples/s, nf4, bf16); 5 rows held out" in text
    assert ["held-out", "loss", "3.500", "1.250"] in [line.split() for line in text.splitlines()]
    assert "make chat" not in text
    made(folder / "gguf", "convert", {"files": FILES})
    text = "\n".join(summary.summary_lines(summary.collect(recipe, tmp_path / "build"), "r.toml"))
    assert text.index("tutor-F16.gguf") < text.index("tutor-Q4_K_M.gguf")
    assert "105.0 MB\n" in text
    assert "tutor ask -r r.toml" in text


def test_summary_shows_spread_answers_and_marks_cut_ones(recipe, tmp_path):
    folder = tmp_path / "build" / "small"
    answers = [
        {
            "instruction": f"¿Pregunta {number}?",
            "answers": {
                "base": {"text": " Hello\n\nmore", "finish": "length", "tokens": 24},
                "tutor": {"text": f" Respuesta {number}.\n\n```ts\n```", "finish": "stop", "tokens": 9},
            },
        }
        for number in range(9)
    ]
    models = {"base-F16": {**MODEL, "tokens_per_second": None}, "tutor-F16": MODEL}
    made(folder / "gguf", "convert", {"files": FILES})
    made(folder / "ladder", "ladder", LADDER)
    made(folder / "eval", "evaluate", {"models": models, "language": "es"}, answers=answers)
    lines = summary.summary_lines(summary.collect(recipe, tmp_path / "build"), "r.toml")
    assert [line for line in lines if line.startswith("»")] == ["» ¿Pregunta 0?", "» ¿Pregunta 3?", "» ¿Pregunta 6?"]
    assert "  base: Hello […cut at 24 tokens]" in lines
    assert "  tutor: Respuesta 3." in lines
    split = [line.split() for line in lines]
    assert ["5", "held-out", "prompts", "base-F16", "tutor-F16"] in split
    assert ["in", "Spanish", "80", "%", "(4/5)", "80", "%", "(4/5)"] in split
    assert ["tokens", "per", "second", "0", "95"] in split
    assert ["tutor-F16.gguf", "271.0", "MB", "4.50"] in split


def test_failed_answer_is_shown_with_its_error(recipe, tmp_path):
    failed = {"instruction": "¿?", "answers": {"tutor": {"error": "timed out"}}}
    made(tmp_path / "build" / "small" / "eval", "evaluate", {"models": {"tutor": MODEL}}, answers=[failed])
    lines = summary.summary_lines(summary.collect(recipe, tmp_path / "build"), "r.toml")
    assert "  tutor: (timed out)" in lines


def test_example_shows_its_turn_and_the_length_of_the_thought(recipe, tmp_path):
    earlier = [{"role": "user", "content": "¿A?"}, {"role": "assistant", "content": "B"}]
    given = {"thought": "a b c", "text": "", "finish": "length", "tokens": 9}
    example = {"instruction": "¿Y?", "history": earlier, "answers": {"tutor": given}}
    made(tmp_path / "build" / "small" / "eval", "evaluate", {"models": {"tutor": MODEL}}, answers=[example])
    lines = summary.summary_lines(summary.collect(recipe, tmp_path / "build"), "r.toml")
    assert "» (turn 2) ¿Y?" in lines
    assert "  tutor: (thought of 3 words) (no answer) […cut at 9 tokens]" in lines


def test_general_texts_are_listed_by_language_and_kind():
    texts = [{"language": "pt", "kind": "poem"}] * 6 + [{"language": "xx"}]
    general = drift({"base": [1.0] * 7, "tutor": [1.1] * 7}, texts, 1)
    lines = summary.forgetting_lines(general)
    assert [" ".join(line.split()) for line in lines[-5:]] == [
        "general texts: perplexity texts before after change (95 %)",
        "all 7 2.72 3.00 +10.5 % (+10.5 to +10.5) worse",
        "Portuguese 6 2.72 3.00 +10.5 % (+10.5 to +10.5) worse",
        "xx 1 2.72 3.00 +10.5 % no difference shown",
        "poem 6 2.72 3.00 +10.5 % (+10.5 to +10.5) worse",
    ]


def test_worse_findings_are_marked_below_the_table():
    found = [{"conclusion": "worse", "text": "general texts: …"}, {"conclusion": "better", "text": "in Spanish: …"}]
    lines = verdict_tables.verdict_lines({"models": {"tutor": MODEL}, "findings": found})
    assert lines[-2:] == ["  WORSE: general texts: …", "  in Spanish: …"]


def test_overlap_is_shown_with_its_control_and_limits():
    change = {
        "n": 8,
        "before": 12.5,
        "after": 30.0,
        "difference": 17.5,
        "low": 9.0,
        "high": 22.0,
        "conclusion": "better",
    }
    overlap = {"n": 8, "mean": 30.0, "low": 25.0, "high": 35.0, "control": change}
    entry = {
        "n": 5,
        "before": MODEL["all"]["passed"],
        "after": MODEL["all"]["passed"],
        "difference": 0.0,
        "low": None,
        "high": None,
        "conclusion": "better",
    }
    changed = {"before": "base", "after": "tutor", "all": {"passed": entry}, "categories": {}, "reference": change}
    model = {**MODEL, "reference": overlap}
    lines = verdict_tables.verdict_lines({"models": {"base": model, "tutor": model}, "differences": [changed]})
    plain = [" ".join(line.split()) for line in lines]
    assert "chrF to its reference 30.0 [25, 35] 30.0 [25, 35]" in plain
    assert "chrF to another's 12.5 12.5" in plain
    assert "chrF to its reference 12.5 30.0 +17.5 [+9.0, +22.0] better" in plain
    assert any(line.startswith("No prompt states what an answer must contain") for line in plain)
    assert any(line.startswith("chrF is the overlap of letter sequences") for line in plain)


def test_kinds_have_counts_and_changes_have_intervals():
    def rate(n: int) -> dict[str, Any]:
        return {"n": n, "share": n / 8, "low": 0.0, "high": 1.0}

    entry = {
        "n": 8,
        "before": rate(0),
        "after": rate(8),
        "difference": 1.0,
        "low": 0.375,
        "high": 1.0,
        "conclusion": "better",
    }
    kinds = {kind: {"n": 8, "passed": rate(count)} for kind, count in (("definicion", 2), ("ejemplo", 6))}
    change = {"before": "base", "after": "tutor", "all": {"passed": entry}, "categories": {"definicion": entry}}
    lines = verdict_tables.verdict_lines({"models": {"base": MODEL, "tutor": MODEL}, "differences": [change]})
    assert "definicion 0 % (0/8) 100 % (8/8) +100 [+38, +100] better" in [" ".join(line.split()) for line in lines]
    alone = verdict_tables.verdict_lines({"models": {"tutor": {**MODEL, "categories": kinds}}})
    assert "ejemplo 75 % (6/8)" in [" ".join(line.split()) for line in alone]


def test_larger_and_less_accurate_quantization_is_marked():
    figures = {kind: {**FIGURES, "size": size} for kind, size in (("F16", 9e6), ("Q5_1", 5e6), ("Q5_0", 4e6))}
    found = {
        "quantizations": figures,
        "budget": 0.01,
        "chosen": "Q5_0",
        "served": "Q5_0",
        "worse_and_larger": {"Q5_1": "Q5_0"},
    }
    lines = summary.ladder_lines(found)
    assert [line[2:15].strip() for line in lines[2:5]] == ["F16", "Q5_1 !", "Q5_0 *"]
    assert lines[-1] == "  ! Q5_1 is larger and less accurate than Q5_0: remove it from convert.quantizations"
    assert len({len(line) for line in lines[1:5]}) == 1


@pytest.mark.parametrize("name", ["con blanco", "it's", 'a"b', "$(touch x)"])
def test_next_commands_of_the_summary_can_be_pasted(name: str, tmp_path: Path) -> None:
    stages = {"report": {}, "convert": {"files": FILES}}
    recipe = str(tmp_path / name / "r.toml")
    lines = [line for line in summary.summary_lines({"stages": stages, "examples": []}, recipe) if " -r " in line]
    for line in lines:
        words = shlex.split(line)
        assert words[words.index("-r") + 1] == recipe
    assert len(lines) == 2
