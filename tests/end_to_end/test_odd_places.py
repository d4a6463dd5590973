"""The whole chain from one file of French rows, in folders with odd names, on a base in a folder of its own.

It works twice, and no published file names a path.

Run alone with: .venv/bin/pytest tests/end_to_end/test_odd_places.py
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.files import read_rows, write_rows
from support.processes.command import ROOT, forked, in_process
from support.shared import copied, linked, shared

from tutor.artifacts.layout import BuildFolder
from tutor.engines.llamacpp.build import build_folder, is_built
from tutor.recipe.reading import read_recipe
from tutor.serving.adapter import lora_folder

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.llamacpp,
    pytest.mark.skipif(not is_built(build_folder()), reason="the pinned llama.cpp is not built"),
]

PLACE = "mi tutor ñ'$(x)\";&"
"""Folder of the recipe, its rows, the build and llama.cpp."""
PRIVATE = "proyecto-secreto"
"""Folder of the base: its name must be in no published file."""
RECIPE = f"""
seed = 7
[data]
language = "fr"
held_out = 0.3
[base]
source = "path:../{PRIVATE}/{PRIVATE}-7B"
[train]
epochs = 1
batch_size = 2
accumulation = 2
max_length = 1024
[convert]
quantizations = ["Q8_0"]
[parity]
prompts = 1
[generate]
max_new_tokens = 8
context = 2048
[ollama]
quantization = "Q8_0"
"""
PUBLISHED = ("adapter", "merged", "gguf", "model", "lora", "report")
"""Folders whose files are given to others."""


def make(tiny: Path) -> Callable[[Path], None]:
    """Return a function that runs the chain in a folder, on a copy of the tiny model with all that can name a path."""

    def fill(folder: Path) -> None:
        place, base = folder / PLACE, folder / PRIVATE / f"{PRIVATE}-7B"
        place.mkdir()
        base.parent.mkdir()
        linked(tiny, base)
        for name, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "name_or_path")):
            values = json.loads((base / name).read_text("utf-8"))
            (base / name).unlink()
            (base / name).write_text(json.dumps({**values, key: str(base)}), "utf-8")
        (base / "README.md").write_text(f"---\nbase_model: {base}\nmodel_name: {PRIVATE}\n---\n", "utf-8")
        write_rows(place / "tutor.jsonl", read_rows(ROOT / "tests" / "support" / "cooking.jsonl")[::5])
        recipe = place / "mi receta $1.toml"
        recipe.write_text(RECIPE, "utf-8")
        llamacpp = folder / f"llama.cpp {PLACE}"
        llamacpp.symlink_to(build_folder())
        where = ("--recipe", recipe, "--build", place / "build")
        env = {"TUTOR_LLAMACPP": str(llamacpp)}
        # Without parity and evaluation: they publish nothing, and their programs are those of the ladder.
        for command in (("run", "--until", "ladder"), ("modelfile",), ("report",)):
            done = forked(*command, *where, scratch=folder / "run", env=env).finish(250)
            assert done.returncode == 0, done.stderr
        lora_folder(read_recipe(recipe), BuildFolder(place / "build", "mi receta $1"))

    return fill


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished chain."""
    return shared(tmp_path_factory, "odd places", make(tiny))


def test_chain_in_a_folder_with_an_odd_name_works_twice(made: Path, tmp_path: Path) -> None:
    place = copied(made / PLACE, tmp_path / PLACE)
    linked(made / PRIVATE, tmp_path / PRIVATE)
    where = ("--recipe", place / "mi receta $1.toml", "--build", place / "build")
    answer = in_process("ask", "¿Qué es una interfaz?", *where)
    assert answer.returncode == 0, answer.stderr
    assert "Nothing to do" in in_process("run", "--until", "ladder", *where).stdout


def test_published_files_name_no_path(made: Path) -> None:
    words = {PRIVATE, str(made), "/home/"}
    found = [
        (path.relative_to(made).as_posix(), word)
        for folder in PUBLISHED
        for path in sorted((made / PLACE / "build" / "mi receta $1" / folder).rglob("*"))
        if path.is_file() and path.name != "manifest.json"
        for word in words
        if word.encode() in path.read_bytes()
    ]
    assert found == []
