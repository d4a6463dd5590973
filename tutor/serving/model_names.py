"""Names of models: parse `[ENGINE:]NAME` into a ModelChoice.

In: a name as a user writes it. Out: a ModelChoice. Imports only the errors: the help of the command line
uses it.
"""

import re
from dataclasses import dataclass

from tutor.errors import RecipeError

MODELS = ("tutor", "base", "base-as-tutor", "adapter")
ENGINES = ("llamacpp", "ollama", "hf")
KNOWN_NAMES = (
    "tutor, base (as a person asks it), base-as-tutor, adapter, a quantization as Q8_0 or base-Q8_0, hf:tutor, "
    "hf:base, ollama:NAME"
)
"""Forms of a name, for help texts and errors."""

_GGUF_NAME = re.compile(r"(?:(tutor|base|base-as-tutor)-)?([A-Z][A-Z0-9_]*)")


@dataclass(frozen=True)
class ModelChoice:
    """A model and the engine that runs it. `model` is one of MODELS, or with Ollama the name of a model there."""

    model: str
    quantization: str | None = None  # None: the recipe's ollama.quantization
    engine: str = "llamacpp"
    host: str | None = None  # of the Ollama server

    @property
    def weights(self) -> str:
        """Whose weights answer: "base" for both ways to ask the base."""
        return "base" if self.model == "base-as-tutor" and self.engine != "ollama" else self.model

    @property
    def asked(self) -> str:
        """Name of the model for evaluate/asking.py: a model in Ollama is asked as the tutor, whatever its name."""
        return "tutor" if self.engine == "ollama" else self.model

    @property
    def label(self) -> str:
        """Name of the model in tables and folder names."""
        name = f"{self.model}-{self.quantization}" if self.quantization else self.model
        return name if self.engine == "llamacpp" else f"{self.engine}:{name}"


def parse_model(text: str, engine: str = "llamacpp", host: str | None = None) -> ModelChoice:
    """Parse `[ENGINE:]NAME`; `engine` is the default engine. Raises RecipeError for an unknown name."""
    before, _, name = text.partition(":")
    engine, name = (before, name) if before in ENGINES and name else (engine, text)
    if not name:
        raise RecipeError("a model without a name", f"known: {KNOWN_NAMES}")
    if engine == "ollama":
        _check_ollama_name(name)
    if engine == "ollama" or name in MODELS:
        return ModelChoice(name, None, engine, host)
    match = _GGUF_NAME.fullmatch(name)
    if match is None or engine == "hf":
        raise RecipeError(f"no model {name!r}", f"known: {KNOWN_NAMES}")
    return ModelChoice(match[1] or "tutor", match[2], engine, host)


def _check_ollama_name(name: str) -> None:
    """Raise RecipeError for a name that no model in Ollama has."""
    from tutor.recipe.ollama_names import FORMS, NAME

    if not NAME.fullmatch(name):
        raise RecipeError(f"no name of a model in Ollama: {name[:200]!r}", f"it is {FORMS}, and then maybe :TAG")
