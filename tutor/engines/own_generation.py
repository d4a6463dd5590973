"""Sampling with which a person asks the base: what its files state, else Ollama's defaults.

In: the base stage's folder, a recipe. Out: the settings of a generation. Generates nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import read_json_object
from tutor.engines.answer_limit import max_new_tokens
from tutor.engines.protocol import TOP_K, Generation
from tutor.formats.models.model_folder import read_facts

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

DEFAULTS = {"temperature": 0.8, "top_p": 0.9, "top_k": TOP_K, "repetition_penalty": 1.0}
"""Ollama's sampling (api/types.go, 0.33), for what a base does not state."""
ANSWER_TOKENS = 1024
"""Minimum room for an answer in tokens: a model that was not tuned on the rows answers at more length than they do."""
THOUGHT_TOKENS = 2048
"""Room for a thought in tokens, for a base whose template knows thoughts."""


def own_generation(base: Path, recipe: "Recipe", *, thinks: bool) -> Generation:
    """Return the settings with which the base is asked its own way, with the recipe's seed.

    `thinks`: its template knows thoughts, which get room.
    generation_config.json states sampling unless it has `do_sample` false; a value that it lacks is Ollama's. The
    recipe went through `with_answer_limit`. Raises ArtifactError without the base stage.
    """
    found = read_json_object(read_facts(base)[1] / "generation_config.json") or {}
    stated = DEFAULTS if found.get("do_sample") is False else {**DEFAULTS, **_numbers(found)}
    return Generation(
        max_new_tokens=max(max_new_tokens(recipe.generate), ANSWER_TOKENS) + (THOUGHT_TOKENS if thinks else 0),
        temperature=stated["temperature"],
        top_p=stated["top_p"],
        repetition_penalty=stated["repetition_penalty"],
        seed=recipe.seed,
        stops=(),
        top_k=int(stated["top_k"]),
        repeatable=True,
    )


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The sampling that a file states, as numbers."""
    return {name: values[name] for name in DEFAULTS if type(values.get(name)) in (int, float)}
