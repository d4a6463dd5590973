"""A fake machine: nvidia-smi and docker as small programs on PATH, and GPUs that a test adds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tutor.machine.host import MIB
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe

DEFAULT = "hub:deepseek-ai/DeepSeek-R1-Distill-Llama-8B@6a6f4aa4197940add57724a7707d069478df56b1"


HEADING = "| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05   CUDA Version: 13.0     |\n"


NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *--query-gpu*) cat "{folder}/gpus"; exit "$(cat "{folder}/code")";;
  *--query-compute-apps*) cat "{folder}/apps";;
  *--list-gpus*) echo "GPU 0: a card (UUID: GPU-1)";;
  *) cat "{folder}/heading";;
esac
"""


class Machine:
    """A folder on PATH with nvidia-smi, and the GPUs that a test adds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[str] = []
        for name, text in (("gpus", ""), ("apps", ""), ("heading", HEADING), ("code", "0")):
            (folder / name).write_text(text)

    def program(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def gpu(
        self, gigabytes: float = 24, free: float | None = None, capability: str = "8.9", name: str = "a card"
    ) -> None:
        """Add a GPU; the first one adds nvidia-smi."""
        number = len(self.rows)
        total, left = (round(size * 1e9 / MIB) for size in (gigabytes, gigabytes if free is None else free))
        self.rows.append(f"{number}, GPU-{number}aaaa-0, {name}, 580.95.05, {capability}, {total}, {left}")
        (self.folder / "gpus").write_text("\n".join(self.rows) + "\n")
        self.program("nvidia-smi", NVIDIA_SMI.format(folder=self.folder))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine without a GPU, without environment variables that tutor reads."""
    for name in ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE", "TUTOR_GPU", "TUTOR_RECIPE", "TUTOR_BUILD"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    made = Machine(folder)
    made.program("docker", "#!/bin/sh\nexit 1\n")  # whatever this machine has
    return made


@pytest.fixture
def based_on(recipe_file: Path) -> Callable[..., Recipe]:
    """A function that returns the small recipe with another base and other settings."""

    def make(source: str = DEFAULT, **train: Any) -> Recipe:
        settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in train.items())
        text = recipe_file.read_text().replace('source = "tiny"', f'source = "{source}"')
        recipe_file.write_text(text.partition("[train]")[0] + f"[train]\n{settings}")
        return read_recipe(recipe_file)

    return make
