"""The stages in their order: what each needs, which settings and files it reads.

In: nothing. Out: `STAGES`. Imports no stage's module: some import torch. Runs nothing: pipeline/runner.py does.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutor.artifacts.layout import (
    BASELINES,
    LORA,
    OLLAMA_EVALUATION,
    OLLAMA_PARITY,
    PUBLISHED_EVALUATION,
    PUBLISHED_MERGED,
    STAGE_FOLDERS,
)
from tutor.artifacts.manifest import recipe_fields
from tutor.formats.models.base_source import source_files
from tutor.formats.rows.recipe_files import data_files, general_files, paraphrase_files
from tutor.recipe.settings import Recipe
from tutor.stages.convert.lineage import TOOLS, recipe_hash


@dataclass(frozen=True)
class Stage:
    """One stage and what its key is made of; the code that it depends on is computed (artifacts/provenance.py)."""

    name: str
    about: str
    needs: tuple[str, ...]  # names of the stages whose folders it reads
    settings: Callable[[Recipe], dict[str, Any]]  # the part of the recipe that it reads
    files: Callable[[Recipe], Mapping[str, Path]] = lambda _: {}  # the user's files that it reads
    recorded: tuple[str, ...] = ()  # packages whose versions it writes into its result
    derived: str = ""  # glob of sibling folders that other commands make of its folder; `tutor clean` removes them
    resumes: bool = False  # whether it continues after a kill from its scratch folder
    reads: tuple[str, ...] = ()  # folders and files of the build folder that it reads when they exist
    takes_plan: bool = False  # whether its run takes the TrainingPlan that the runner makes

    @property
    def folder(self) -> str:
        """The folder's name below the build folder."""
        return STAGE_FOLDERS[self.name]

    def recipe_fields(self, recipe: Recipe) -> dict[str, Any]:
        """The settings that the stage reads, as key fields."""
        return recipe_fields(self.settings(recipe))

    @property
    def source(self) -> str:
        """The stage's module as a path below tutor/."""
        return f"stages/{self.name}/stage.py"

    @property
    def module(self) -> Any:
        """The stage's module, imported now."""
        return importlib.import_module(f"tutor.stages.{self.name}.stage")


def _data(recipe: Recipe) -> dict[str, Any]:
    split = recipe.data.model_dump(exclude={"train", "eval", "loss", "language"})
    return {**split, "prompt": recipe.prompt, "reasoning": recipe.reasoning, "seed": recipe.seed}


def _base(recipe: Recipe) -> dict[str, Any]:
    made_here = {"seed": recipe.seed} if recipe.base.source == "tiny" else {}
    served = {"prompt": recipe.prompt, "reasoning": recipe.reasoning, "system": bool(recipe.system)}
    return {"source": recipe.base.source, **(served if recipe.prompt == "base" else {}), **made_here}


def _train(recipe: Recipe) -> dict[str, Any]:
    return {
        **recipe.train.model_dump(exclude={"report_to"}),
        "system": recipe.system,
        "loss": recipe.data.loss,
        "seed": recipe.seed,
    }


def _merge(recipe: Recipe) -> dict[str, Any]:
    return recipe.merge.model_dump()


def _convert(recipe: Recipe) -> dict[str, Any]:
    made = recipe.convert.model_dump(exclude={"budget"})
    text = {"system": recipe.system} if recipe.convert.imatrix else {}
    return {**made, **text, "served": recipe.ollama.quantization, "lineage": recipe_hash(recipe)}


def _ladder(recipe: Recipe) -> dict[str, Any]:
    chosen_from = {"quantizations": recipe.convert.quantizations, "base": recipe.convert.base}
    how = {"budget": recipe.convert.budget, "context": recipe.generate.context, "system": recipe.system}
    return {**chosen_from, **how, "loss": recipe.data.loss, "served": recipe.ollama.quantization}


def _parity(recipe: Recipe) -> dict[str, Any]:
    names = ("context", "repetition_penalty")
    answered = {name: getattr(recipe.generate, name) for name in names}
    served = {"served": recipe.ollama.quantization, **answered}
    return {**recipe.parity.model_dump(), **served, "system": recipe.system}


def _modelfile(recipe: Recipe) -> dict[str, Any]:
    served = {"generate": recipe.generate.model_dump(), "ollama": recipe.ollama.model_dump()}
    return {**served, "system": recipe.system, "seed": recipe.seed}


def _forgetting(recipe: Recipe) -> dict[str, Any]:
    return {"base": recipe.convert.base, "served": recipe.ollama.quantization, "seed": recipe.seed}


def _evaluate(recipe: Recipe) -> dict[str, Any]:
    names = ("max_new_tokens", "context", "repetition_penalty")
    greedy = {name: getattr(recipe.generate, name) for name in names}
    graded = {"language": recipe.data.language}
    return {**greedy, **graded, "served": recipe.ollama.quantization, "system": recipe.system, "seed": recipe.seed}


def _report(recipe: Recipe) -> dict[str, Any]:
    shown = {"name": recipe.name, "model": recipe.ollama.model, "language": recipe.data.language}
    return {**shown, "system": recipe.system, "loss": recipe.data.loss}


STAGES = (
    Stage(
        "data",
        "check the rows and split them",
        needs=(),
        settings=_data,
        files=data_files,
    ),
    Stage(
        "base",
        "fetch or make the base model and check it",
        needs=(),
        settings=_base,
        files=source_files,
    ),
    Stage(
        "train",
        "train the LoRA adapter",
        needs=("data", "base"),
        settings=_train,
        derived=f"{LORA}*",
        takes_plan=True,
    ),
    Stage(
        "merge",
        "merge the adapter into the 16-bit base",
        needs=("base", "train"),
        settings=_merge,
        resumes=True,
    ),
    Stage(
        "convert",
        "convert to GGUF and quantize",
        needs=("data", "base", "train", "merge"),
        settings=_convert,
        recorded=("tutor", *TOOLS),
    ),
    Stage(
        "ladder",
        "measure what each quantization loses",
        needs=("data", "base", "convert"),
        settings=_ladder,
    ),
    Stage(
        "parity",
        "compare the answers of the model in all engines",
        needs=("data", "base", "train", "merge", "convert", "ladder"),
        settings=_parity,
        derived=f"{STAGE_FOLDERS['parity']}-*",
    ),
    Stage(
        "modelfile",
        "render the Modelfile",
        needs=("base", "train", "convert", "ladder"),
        settings=_modelfile,
    ),
    Stage(
        "forgetting",
        "score general texts with base and tutor",
        needs=("base", "convert", "ladder"),
        settings=_forgetting,
        files=general_files,
    ),
    Stage(
        "evaluate",
        "answer the held-out prompts and grade the answers",
        needs=("data", "base", "train", "convert", "ladder"),
        settings=_evaluate,
        files=paraphrase_files,
        derived=f"{STAGE_FOLDERS['evaluate']}-*",
    ),
    Stage(
        "report",
        "write the report page and the model card",
        needs=("data",),
        settings=_report,
        reads=(
            *(STAGE_FOLDERS[name] for name in ("base", "train", "merge", "convert", "ladder", "parity")),
            *(STAGE_FOLDERS[name] for name in ("forgetting", "evaluate")),
            *(PUBLISHED_MERGED, OLLAMA_PARITY, OLLAMA_EVALUATION, PUBLISHED_EVALUATION, BASELINES),
        ),
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}
