"""The one rule for which quantization is served: the recipe's, or for "auto" the choice of the ladder stage.

In: `ollama.quantization` and the ladder stage's folder. Out: the quantization. Does not choose: the ladder stage does.
"""

from collections.abc import Iterable
from pathlib import Path

from tutor.artifacts.disk import read_json, write_json
from tutor.artifacts.manifest import MANIFEST
from tutor.errors import ArtifactError
from tutor.recipe.quantizations import AUTO

SERVED = "served.json"
"""Name of the file in the ladder stage's folder that holds its choice."""


def resolve(setting: str, chosen: str) -> str:
    """Return the served quantization for a setting, where the ladder stage has chosen `chosen`."""
    return chosen if setting == AUTO else setting


def possible_quantizations(setting: str, quantizations: Iterable[str]) -> list[str]:
    """Return the quantizations that may be served for a setting, before the ladder stage has run.

    "auto" never serves the 16-bit file: the base's would have to be kept for it, on the disk and by Ollama.
    """
    return [*quantizations] if setting == AUTO else [setting]


def served_quantization(setting: str, ladder: Path) -> str:
    """Return the served quantization for a setting; `ladder` is that stage's folder.

    Raises ArtifactError where the setting is "auto" and the stage has not run.
    """
    if setting != AUTO:
        return setting
    if not (ladder / MANIFEST).exists():
        raise ArtifactError(f"{ladder} is not there, and ollama.quantization is {AUTO!r}", "run: tutor ladder")
    chosen = read_json(ladder / SERVED).get("quantization")
    if not isinstance(chosen, str):
        raise ArtifactError(f"{ladder / SERVED} names no quantization", "run: tutor ladder")
    return chosen


def write_served(out: Path, quantization: str) -> None:
    """Write the file that `served_quantization` reads."""
    write_json(out / SERVED, {"quantization": quantization})
