"""Every path below the build folder.

In: a build folder and a recipe's name, a stage's name, the name of a model or a build. Out: paths. Creates nothing,
reads nothing, and imports no recipe: tutor.recipe is above this package.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from tutor.artifacts.hashing import HASHES

STAGE_FOLDERS = {
    "data": "data",
    "base": "base",
    "train": "adapter",
    "merge": "merged",
    "convert": "gguf",
    "ladder": "ladder",
    "parity": "parity",
    "modelfile": "model",
    "forgetting": "forgetting",
    "evaluate": "eval",
    "report": "report",
}
"""Folder of each stage, in the order of the stages."""

PUBLISHED = "published.json"
"""Record of the last publishing, beside the Modelfile."""

LORA = "lora"
"""Folder of the adapter as a GGUF on the converted base."""

OLLAMA_PARITY = "parity-ollama"
"""Folder of the comparison with the published model."""

SERVED = "served"
"""Folder of the records of published builds, one folder a build."""

SERVER_LOG = "server.log"
"""Log of a llama-server that no stage started."""

OWNER = ".recipe.json"
"""File of a recipe's folder that names the recipe file."""

SERVICE_LOGS = "logs"
"""Folder of the logs of the containers."""

OLLAMA = "ollama"
"""Label of the published model among evaluated models."""


PUBLISHED_MERGED = f"{STAGE_FOLDERS['modelfile']}/{PUBLISHED}"
"""Record of the last publishing of the merged model, below the recipe's folder."""

OLLAMA_EVALUATION = f"{STAGE_FOLDERS['evaluate']}-{OLLAMA}"
"""Folder of the answers of the published model."""

BASELINES = f"{STAGE_FOLDERS['evaluate']}-baselines"
"""Folder of the comparison with ways to get an answer without training."""


PUBLISHED_EVALUATION = f"{STAGE_FOLDERS['evaluate']}-published"
"""Folder of the comparison of base and tutor in Ollama."""


def gguf_name(model: str, quantization: str) -> str:
    """File name of a GGUF; `model` is tutor or base."""
    return f"{model}-{quantization}.gguf"


@dataclass(frozen=True)
class BuildFolder:
    """The folder of one recipe below the build folder."""

    build: Path
    recipe: str  # its name

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.build / self.recipe

    @property
    def hashes(self) -> Path:
        """File with the remembered hashes."""
        return self.path / HASHES

    @property
    def owner(self) -> Path:
        """File that names the recipe file that the folder belongs to."""
        return self.path / OWNER

    @property
    def server_log(self) -> Path:
        """Log of a llama-server that no stage started."""
        return self.path / SERVER_LOG

    @property
    def service_logs(self) -> Path:
        """Folder of the logs of the containers."""
        return self.path / SERVICE_LOGS

    def stage(self, name: str) -> Path:
        """Folder of a stage."""
        return self.path / STAGE_FOLDERS[name]

    def gguf(self, model: str, quantization: str) -> Path:
        """A GGUF that the convert stage makes."""
        return self.stage("convert") / gguf_name(model, quantization)

    def published(self, *, adapter: bool = False) -> Path:
        """Record of the last publishing: of the merged model, or of base and adapter."""
        return self.lora / PUBLISHED if adapter else self.path / PUBLISHED_MERGED

    @property
    def lora(self) -> Path:
        """Folder of the adapter as a GGUF."""
        return self.path / LORA

    @property
    def ollama_parity(self) -> Path:
        """Folder of the comparison with the published model."""
        return self.path / OLLAMA_PARITY

    def evaluation(self, label: str) -> Path:
        """Folder of the answers of a model that `tutor eval` was given by name."""
        return self.path / evaluation_name(label)

    def served(self, build: str) -> Path:
        """Folder of the record of a published build, by its hash."""
        return self.path / SERVED / build


def evaluation_name(label: str) -> str:
    """Folder name of the answers of a model."""
    return f"{STAGE_FOLDERS['evaluate']}-{re.sub(r'[^A-Za-z0-9_.-]+', '-', label)}"
