"""The forgetting stage: how well base and tutor predict general texts, about other subjects than the training rows.

In: base/ (its tokenizer), gguf/ (base and tutor), ladder/ (the served quantization), the file of the recipe's
evaluate.general. Out, in the manifest's results: `general` (the change of the loss; None without such a file or without
a base) and `findings` (that change as a sentence). Asks nothing, and writes no other file.
"""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.layout import gguf_name
from tutor.engines.llamacpp.score import score
from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import load_tokenizer, read_facts
from tutor.formats.models.served_quantization import served_quantization
from tutor.formats.rows.evaluation_texts import GENERAL_KEYS, KIND, read_texts
from tutor.formats.rows.recipe_files import general_files
from tutor.graders.intervals import conclude, paired_values
from tutor.machine.host import usable_cores

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Score the texts with both models; return the results listed above.

    Raises ArtifactError when a GGUF is missing or gives no probabilities, DataError for the file of texts.
    """
    del out
    named = general_files(recipe)
    lacks = "evaluate.general is not set" if not named else "" if recipe.convert.base else "convert.base = false"
    if lacks:
        log.info("what tuning made the model forget is not measured: %s", lacks)
        return {"general": None, "findings": []}
    (path,) = named.values()
    texts = read_texts(path, GENERAL_KEYS)
    served = served_quantization(recipe.ollama.quantization, inputs["ladder"])
    files = {name: inputs["convert"] / gguf_name(name, served) for name in ("base", "tutor")}
    for gguf in files.values():
        if not gguf.is_file():
            raise ArtifactError(f"{gguf} is missing", "run: tutor convert")
    tokenizer = load_tokenizer(read_facts(inputs["base"])[1])
    ids = [list(tokenizer(row["text"])["input_ids"]) for row in texts]
    tokens = sum(map(len, ids))
    log.info("scoring %d general texts of %d tokens with the base and the tutor", len(texts), tokens)
    rows = [(each[:1], each[1:]) for each in ids]
    scores = {name: score(gguf, rows, threads=usable_cores()) for name, gguf in files.items()}
    losses = {name: [-statistics.fmean(item.logprobs) for item in found] for name, found in scores.items()}
    general = {"tokens": tokens, **drift(losses, texts, recipe.seed)}
    return {"general": general, "findings": [finding(general)]}


def drift(losses: Mapping[str, Sequence[float]], texts: Sequence[Mapping[str, str]], seed: int) -> dict[str, Any]:
    """Return how well the `base` and the `tutor` predict general texts, over all, by language and by kind.

    `losses` are the mean loss of each text, in nats a token. Every text has the same weight: a model's perplexity is
    the exponential of its mean loss, and `difference` is the mean change of the loss with its interval, paired by text.
    A higher loss is worse. `kinds` is empty where no text has a kind.
    """

    def change(places: Sequence[int]) -> dict[str, Any]:
        chosen = {name: [values[at] for at in places] for name, values in losses.items()}
        found = paired_values(chosen["base"], chosen["tutor"], seed)
        return {
            "n": found.n,
            "perplexity": {name: _perplexity(values) for name, values in chosen.items()},
            "difference": round(found.mean, 4),
            "low": None if found.low is None else round(found.low, 4),
            "high": None if found.high is None else round(found.high, 4),
            "conclusion": conclude(found, more_is_better=False),
        }

    def groups(key: str) -> dict[str, dict[str, Any]]:
        names = sorted({row[key] for row in texts if key in row})
        return {name: change([at for at, row in enumerate(texts) if row.get(key) == name]) for name in names}

    return {**change(range(len(texts))), "languages": groups("language"), "kinds": groups(KIND)}


def _perplexity(losses: Sequence[float]) -> float:
    return round(math.exp(min(statistics.fmean(losses), 700.0)), 4)  # e^710 is no float


def finding(general: Mapping[str, Any]) -> dict[str, str]:
    """Return the change as a sentence: `conclusion` (better, worse, no difference shown) and `text`."""
    before, after = general["perplexity"]["base"], general["perplexity"]["tutor"]
    text = f"general texts: perplexity {before:.2f} before and {after:.2f} after tuning ({general['n']} texts)"
    conclusion = general["conclusion"]
    return {"conclusion": conclusion, "text": f"{text}: {conclusion}"}
