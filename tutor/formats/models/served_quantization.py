"""Which quantization is served: what the recipe says, or with "auto" what the ladder stage chose."""

from pathlib import Path

from tutor.artifacts.disk import write_json
from tutor.artifacts.manifest import MANIFEST
from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import read_json
from tutor.recipe.quantizations import AUTO

SERVED = "served.json"


def served_quantization(setting: str, ladder: Path) -> str:
    """The quantization that `ollama.quantization` comes to; `ladder` is that stage's folder.

    Raises ArtifactError where the ladder has to say and has not run.
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
    """Write what `served_quantization` reads."""
    write_json(out / SERVED, {"quantization": quantization})
