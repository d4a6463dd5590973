"""Recipe and folders of the convert, modelfile and parity stages, for tests of publishing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.fakes.ollama import write_gguf
from support.files import write_rows
from support.outputs.parity import write_parity
from tutor.artifacts.layout import STAGE_FOLDERS
from tutor.artifacts.manifest import require_stage
from tutor.artifacts.stage_folder import writing
from tutor.pipeline.registry import BY_NAME
from tutor.recipe.settings import OllamaSettings, Recipe
from tutor.stages.modelfile import stage as modelfile

SYSTEM = 'Eres un tutor de TypeScript. Dices "hola", ñandú y 👋.'


def make_recipe(folder: Path) -> Recipe:
    """Return a recipe that serves Q8_0; its file `small.toml` in `folder` is empty."""
    path = folder / "small.toml"
    path.write_text("")
    return Recipe(system=SYSTEM, ollama=OllamaSettings(quantization="Q8_0"), path=path)


def make_stages(recipe: Recipe, build: Path, base: str | None = None, **facts: Any) -> Path:
    """Write the stage folders around a fake GGUF with these properties; return the build folder.

    `base`: the chat template of a GGUF of the untuned base; None for none.
    """
    folder = build / recipe.name
    with writing(folder / "gguf", "convert", {**BY_NAME["convert"].recipe_fields(recipe), **facts}) as (out, _):
        write_gguf(out / "tutor-Q8_0.gguf", **facts)
        if base is not None:
            write_gguf(out / "base-Q8_0.gguf", chat_template=base)
    gguf = require_stage(folder / "gguf", "convert")
    fields = BY_NAME["modelfile"].recipe_fields(recipe)
    with writing(folder / "model", "modelfile", {**fields, "input.convert": gguf.fingerprint}) as (out, _):
        modelfile.run(recipe, {name: folder / STAGE_FOLDERS[name] for name in BY_NAME["modelfile"].needs}, out)
    write_parity(recipe, build)
    return build


def write_data(recipe: Recipe, build: Path, questions: Sequence[str]) -> None:
    """Write the folder of the data stage with these prompts, and training rows of a short and a long answer."""
    prompts = [{"instruction": question, "category": "tipos"} for question in questions]
    with writing(build / recipe.name / "data", "data", BY_NAME["data"].recipe_fields(recipe)) as (out, _):
        write_rows(out / "prompts.jsonl", prompts)
        write_rows(out / "train.jsonl", [{"instruction": "¿?", "response": answer} for answer in ("Sí.", 400 * "x")])
        write_rows(out / "held_out.jsonl", [{"instruction": "¿Cómo?", "response": "Así."}])
