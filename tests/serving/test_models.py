"""serving/models.py: the precision in which transformers computes. test_compare.py covers the other parts."""

from pathlib import Path
from typing import Any

import pytest

from tutor.artifacts.disk import write_json
from tutor.artifacts.stage_folder import writing
from tutor.machine import device
from tutor.machine.matmul_rate import MatmulRates
from tutor.recipe.settings import Recipe
from tutor.serving.model_names import parse_model
from tutor.serving.models import answer_dependencies, open_engine

SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 32,
}  # fmt: skip


@pytest.fixture
def trained(recipe: Recipe, build: Path) -> Any:
    """A function that writes a merged model, and the train stage's folder with these results."""
    folder = build / recipe.name

    def make(**results: Any) -> Path:
        with writing(folder / "merged", "merge", {}) as (out, _):
            write_json(out / "config.json", SHAPE)
        with writing(folder / "adapter", "train", {}) as (out, found):
            (out / "adapter.txt").write_text("adapter")
            found.update({"quantization": "nf4", **results})
        return build

    return make


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The precisions of models that transformers loads, on a CPU that is faster in fp32."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    precisions: list[str] = []
    monkeypatch.setattr("tutor.engines.hf.loading.load", lambda *_, precision, **__: precisions.append(precision))
    monkeypatch.setattr(device, "find_rates", lambda *_: MatmulRates(1e11, 2e11))
    return precisions


@pytest.mark.parametrize(
    ("setting", "results", "expected"),
    [
        ("auto", {"precision": "bf16", "precision_reason": "rates"}, "bf16"),
        ("auto", {"precision": "bf16", "precision_reason": "GPU"}, "fp32"),
        ("auto", {"precision": "bf16"}, "fp32"),
        ("bf16", {"precision": "fp32", "precision_reason": "rates"}, "bf16"),
    ],
    ids=["as trained", "trained on a GPU", "old record", "of the recipe"],
)
def test_transformers_computes_as_trained_or_measures(setting, results, expected, recipe, trained, loaded):
    chosen = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": setting})})
    with open_engine(chosen, trained(**results), parse_model("hf:tutor")):
        assert loaded == [expected]


def test_answers_depend_on_the_trained_precision(recipe, trained):
    """Answers of another precision are other answers; without a record the setting stands for the choice."""
    one, other, unknown = (
        answer_dependencies(recipe, trained(precision=precision, precision_reason=reason), parse_model("hf:tutor"))
        for precision, reason in (("bf16", "rates"), ("fp32", "memory"), ("bf16", "GPU"))
    )
    assert [found["precision"] for found in (one, other, unknown)] == ["bf16", "fp32", "auto"]
