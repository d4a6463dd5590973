"""serving/model_names.py: names of models. tests/serving/test_compare.py covers serving/models.py."""

import pytest

from tutor.errors import RecipeError
from tutor.serving.model_names import ModelChoice, parse_model


@pytest.mark.parametrize(
    ("text", "engine", "choice", "label"),
    [
        ("tutor", "llamacpp", ModelChoice("tutor"), "tutor"),
        ("base", "llamacpp", ModelChoice("base"), "base"),
        ("adapter", "llamacpp", ModelChoice("adapter"), "adapter"),
        ("Q8_0", "llamacpp", ModelChoice("tutor", "Q8_0"), "tutor-Q8_0"),
        ("base-F16", "llamacpp", ModelChoice("base", "F16"), "base-F16"),
        ("hf:tutor", "llamacpp", ModelChoice("tutor", None, "hf"), "hf:tutor"),
        ("base", "hf", ModelChoice("base", None, "hf"), "hf:base"),
        ("ollama:llama3.1:8b", "llamacpp", ModelChoice("llama3.1:8b", None, "ollama"), "ollama:llama3.1:8b"),
        ("ollama:user/tutor", "llamacpp", ModelChoice("user/tutor", None, "ollama"), "ollama:user/tutor"),
        ("h:5000/n/m:t", "ollama", ModelChoice("h:5000/n/m:t", None, "ollama"), "ollama:h:5000/n/m:t"),
        ("tutor:latest", "ollama", ModelChoice("tutor:latest", None, "ollama"), "ollama:tutor:latest"),
        ("llamacpp:Q8_0", "ollama", ModelChoice("tutor", "Q8_0"), "tutor-Q8_0"),
    ],
)
def test_model_name_is_parsed_with_or_without_an_engine(
    text: str, engine: str, choice: ModelChoice, label: str
) -> None:
    assert parse_model(text, engine) == choice
    assert choice.label == label


def test_name_that_ollama_cannot_have_is_refused() -> None:
    for name in ("ollama:a b", "ollama:../x", "ollama:tutor:"):
        with pytest.raises(RecipeError, match=r"no name of a model in Ollama: .*NAMESPACE/"):
            parse_model(name)


@pytest.mark.parametrize("text", ["", "hf:", "nada", "q8_0", "tutor-", "hf:Q8_0", "base-q4", "../gguf"])
def test_unknown_model_name_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(RecipeError, match=r"known: tutor, base \(as a person asks it\), base-as-tutor"):
        parse_model(text)
