"""How each model is asked: the base as a person asks it, the base as the tutor is asked, the tutor.

In: a recipe, the base stage's folder. Out: an `Asking` by the name of a model. Asks no model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tutor.engines.own_generation import own_generation
from tutor.engines.protocol import Generation, greedy
from tutor.formats.models.own_prompt import read_own_prompt
from tutor.formats.models.prompt_format import read_format
from tutor.prompt.format import PromptFormat
from tutor.prompt.own_format import OwnFormat
from tutor.recipe.language_lines import language_line

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

BASE = "base"
"""The untuned base as a person asks it."""
BASE_AS_TUTOR = "base-as-tutor"
"""The untuned base, asked exactly as the tutor is."""
TUTOR_MODEL = "tutor"
"""The tuned model."""


@dataclass(frozen=True)
class Asking:
    """One way to ask a model."""

    prompt: PromptFormat
    generation: Generation
    system: str = ""  # text before a conversation without one of its own
    line: str = ""  # last paragraph of every question

    @property
    def text(self) -> str:
        """The way in words, for tables."""
        parts = [_template(self.prompt)]
        parts += ["with the recipe's system text"] if self.system else []
        parts += [f"with «{self.line}»"] if self.line else []
        return f"{', '.join(parts)}; {_sampling(self.generation)}"


def asking(recipe: "Recipe", base: Path, model: str) -> Asking:
    """Return how a model is asked; every name but BASE is asked as the tutor.

    `base` is the folder of the base stage; the recipe went through `with_answer_limit`. Raises ArtifactError where the
    base's template is not known, or cannot be used.
    """
    if model == BASE:
        own = read_own_prompt(base)
        generation = own_generation(base, recipe, thinks=own.thinks)
        return Asking(own, generation, line=language_line(recipe.data.language))
    prompt = read_format(recipe, base)
    return Asking(prompt, greedy(recipe.generate, recipe.seed, prompt.stops), recipe.system)


def _template(prompt: PromptFormat) -> str:
    if isinstance(prompt, OwnFormat):
        return "its own chat template" if prompt.template else "the plain question, because it has no chat template"
    return "the tutor's prompt" if prompt.kind == "tutor" else "the tutor's prompt (the base's template, fixed)"


def _sampling(generation: Generation) -> str:
    """The sampling of a generation in words."""
    drawn = "greedy"
    if generation.temperature:
        drawn = f"temperature {generation.temperature:g}, top_p {generation.top_p:g}, top_k {generation.top_k}"
    penalty = generation.repetition_penalty
    penalised = "no repetition penalty" if penalty == 1 else f"repetition penalty {penalty:g}"
    return f"{drawn}, {penalised}, at most {generation.max_new_tokens} tokens"
