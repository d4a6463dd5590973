"""The chain of stages: of each its folder, what it needs, and all that decides whether it has to run.

In: nothing. Out: `STAGES`, in order. Imports no stage: their modules bring torch. pipeline/runner.py runs them.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutor.artifacts.layout import OLLAMA, OLLAMA_PARITY, PUBLISHED, STAGE_FOLDERS, evaluation_name
from tutor.artifacts.manifest import recipe_fields
from tutor.recipe.settings import Recipe
from tutor.stages.convert.lineage import TOOLS, recipe_hash
from tutor.stages.train import checkpoint


@dataclass(frozen=True)
class Stage:
    """One step: a module, a folder, and all that decides whether it has to run."""

    name: str
    about: str
    needs: tuple[str, ...]
    settings: Callable[[Recipe], dict[str, Any]]
    sources: tuple[str, ...]  # files of tutor/ whose change means another result
    packages: tuple[str, ...] = ()
    llamacpp: bool = False
    files: Callable[[Recipe], Mapping[str, Path]] = lambda _: {}  # the user's, beside the folders of `needs`
    beside: str = ""  # a pattern: what commands outside the pipeline make of its folder, removed with it
    takes_plan: bool = False  # its run takes the TrainingPlan that the runner makes
    resumes: bool = False  # goes on after a kill with what it had finished
    reads: tuple[str, ...] = ()  # folders and files that it takes where they are there, and needs none of

    @property
    def folder(self) -> str:
        """The folder's name below the build folder."""
        return STAGE_FOLDERS[self.name]

    def recipe_fields(self, recipe: Recipe) -> dict[str, Any]:
        """The settings that the stage reads, as key fields."""
        return recipe_fields(self.settings(recipe))

    @property
    def module(self) -> Any:
        """The stage's module, imported now: some bring torch."""
        return importlib.import_module(f"tutor.stages.{self.name}.stage")


def _data(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.data.model_dump(exclude={"train", "eval"}), "seed": recipe.seed}


def _base(recipe: Recipe) -> dict[str, Any]:
    made_here = {"seed": recipe.seed} if recipe.base.source == "tiny" else {}
    return {"source": recipe.base.source, **made_here}


def _train(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.train.model_dump(), "system": recipe.system, "seed": recipe.seed}


def _merge(recipe: Recipe) -> dict[str, Any]:
    trained = {"quantization": recipe.train.quantization, "system": recipe.system}
    return {**recipe.merge.model_dump(), **(trained if recipe.merge.base == "auto" else {})}


def _convert(recipe: Recipe) -> dict[str, Any]:
    made = recipe.convert.model_dump(exclude={"budget"})
    text = {"system": recipe.system} if recipe.convert.imatrix else {}
    return {**made, **text, "served": recipe.ollama.quantization, "lineage": recipe_hash(recipe)}


def _ladder(recipe: Recipe) -> dict[str, Any]:
    chosen_from = {"quantizations": recipe.convert.quantizations, "base": recipe.convert.base}
    how = {"budget": recipe.convert.budget, "context": recipe.generate.context, "system": recipe.system}
    return {**chosen_from, **how, "served": recipe.ollama.quantization}


def _parity(recipe: Recipe) -> dict[str, Any]:
    served = {"served": recipe.ollama.quantization, "context": recipe.generate.context}
    return {**recipe.parity.model_dump(), **served, "system": recipe.system}


def _modelfile(recipe: Recipe) -> dict[str, Any]:
    served = {"generate": recipe.generate.model_dump(), "ollama": recipe.ollama.model_dump()}
    return {**served, "system": recipe.system, "seed": recipe.seed}


def _evaluate(recipe: Recipe) -> dict[str, Any]:
    names = ("max_new_tokens", "context", "repetition_penalty")
    greedy = {name: getattr(recipe.generate, name) for name in names}
    return {**greedy, "served": recipe.ollama.quantization, "system": recipe.system, "seed": recipe.seed}


def _report(recipe: Recipe) -> dict[str, Any]:
    return {"name": recipe.name, "model": recipe.ollama.model, "system": recipe.system}


def _data_files(recipe: Recipe) -> Mapping[str, Path]:
    from tutor.stages.data.stage import input_files

    return input_files(recipe)


def _base_files(recipe: Recipe) -> Mapping[str, Path]:
    from tutor.formats.models.base_source import input_files

    return input_files(recipe)


def _evaluate_files(recipe: Recipe) -> Mapping[str, Path]:
    from tutor.stages.evaluate.generalization import named_files

    return named_files(recipe)


STAGES = (
    Stage(
        "data",
        "check the rows and split them",
        needs=(),
        settings=_data,
        sources=(
            "stages/data/stage.py",
            "formats/rows/rows.py",
            "formats/rows/jsonl.py",
            "formats/markdown.py",
            "prompt.py",
        ),
        packages=("pydantic", "markdown-it-py"),
        files=_data_files,
    ),
    Stage(
        "base",
        "fetch or make the base model and check it",
        needs=(),
        settings=_base,
        sources=(
            "stages/base/stage.py",
            "stages/base/tiny_model.py",
            "formats/models/base_source.py",
            "formats/models/model_folder.py",
            "formats/models/gguf.py",
            "prompt.py",
        ),
        packages=("transformers", "tokenizers", "torch", "gguf"),
        files=_base_files,
    ),
    Stage(
        "train",
        "train the LoRA adapter",
        needs=("data", "base"),
        settings=_train,
        sources=checkpoint.SOURCES,
        packages=checkpoint.PACKAGES,
        beside="lora*",
        takes_plan=True,
    ),
    Stage(
        "merge",
        "merge the adapter into the 16-bit base",
        needs=("data", "base", "train"),
        settings=_merge,
        sources=(
            "stages/merge/stage.py",
            "engines/hf/streaming_score.py",
            "stages/merge/peft_adapter.py",
            "stages/merge/weights.py",
            "engines/hf/nf4.py",
            "formats/models/safetensors.py",
            "formats/models/model_folder.py",
            "prompt.py",
        ),
        packages=("torch", "transformers", "safetensors", "bitsandbytes"),
        resumes=True,
    ),
    Stage(
        "convert",
        "convert to GGUF and quantize",
        needs=("data", "base", "train", "merge"),
        settings=_convert,
        sources=(
            "stages/convert/stage.py",
            "machine/memory/shapes.py",
            "formats/models/gguf_metadata.py",
            "stages/convert/lineage.py",
            "stages/convert/quantization_error.py",
            "formats/rows/split_files.py",
            "formats/models/model_folder.py",
            "engines/llamacpp/convert.py",
            "engines/llamacpp/process.py",
            "formats/models/gguf.py",
            "formats/models/gguf_weights.py",
            "engines/llamacpp/src/convert.py",
            "prompt.py",
        ),
        packages=("tutor", *TOOLS),
        llamacpp=True,
    ),
    Stage(
        "ladder",
        "measure what each quantization loses",
        needs=("data", "base", "convert"),
        settings=_ladder,
        sources=(
            "stages/ladder/stage.py",
            "stages/ladder/plot.py",
            "formats/chart.py",
            "engines/trace.py",
            "formats/rows/split_files.py",
            "formats/models/served_quantization.py",
            "engines/llamacpp/server.py",
            "engines/llamacpp/process.py",
            "engines/llamacpp/score.py",
            "prompt.py",
        ),
        llamacpp=True,
    ),
    Stage(
        "parity",
        "compare every engine that the model passes",
        needs=("data", "base", "train", "merge", "convert", "ladder"),
        settings=_parity,
        sources=(
            "stages/parity/stage.py",
            "machine/device.py",
            "stages/parity/collect.py",
            "stages/parity/compare.py",
            "stages/parity/gate.py",
            "stages/parity/record.py",
            "formats/rows/split_files.py",
            "stages/parity/conversations.py",
            "formats/models/served_quantization.py",
            "engines/hf/engine.py",
            "engines/hf/loading.py",
            "engines/hf/trace.py",
            "engines/llamacpp/server.py",
            "engines/llamacpp/process.py",
            "engines/llamacpp/score.py",
            "engines/llamacpp/trace.py",
            "engines/trace.py",
            "formats/models/model_folder.py",
            "prompt.py",
        ),
        packages=("torch", "transformers", "peft", "bitsandbytes"),
        llamacpp=True,
        beside="parity-*",
    ),
    Stage(
        "modelfile",
        "render the Modelfile",
        needs=("base", "convert", "ladder"),
        settings=_modelfile,
        sources=(
            "stages/modelfile/parse.py",
            "stages/modelfile/render.py",
            "stages/modelfile/spec.py",
            "stages/modelfile/stage.py",
            "formats/models/served_quantization.py",
            "prompt.py",
        ),
        packages=("jinja2",),
    ),
    Stage(
        "evaluate",
        "answer the held-out prompts and judge",
        needs=("data", "base", "convert", "ladder"),
        settings=_evaluate,
        sources=(
            "stages/evaluate/stage.py",
            "formats/rows/split_files.py",
            "formats/models/served_quantization.py",
            "stages/evaluate/answers.py",
            "stages/evaluate/generalization.py",
            "stages/evaluate/rates.py",
            "stages/evaluate/intervals.py",
            "engines/protocol.py",
            "engines/llamacpp/server.py",
            "engines/llamacpp/process.py",
            "engines/llamacpp/score.py",
            "graders/code.py",
            "formats/markdown.py",
            "graders/format.py",
            "graders/identifiers.py",
            "graders/language.py",
            "graders/copied_text.py",
            "graders/typescript/compiler.py",
            "graders/typescript/install.py",
            "graders/typescript/scanner.py",
            "graders/verdict.py",
            "prompt.py",
        ),
        packages=("markdown-it-py", "lingua-language-detector"),
        llamacpp=True,
        files=_evaluate_files,
        beside="eval-*",
    ),
    Stage(
        "report",
        "write the page and the model card",
        needs=("data",),
        settings=_report,
        sources=(
            "stages/report/stage.py",
            "formats/html.py",
            "formats/page.css",
            "stages/evaluate/rates.py",
            "stages/report/page.html.j2",
            "stages/report/model_card.py",
            "formats/models/base_source.py",
            "stages/report/charts.py",
            "formats/chart.py",
            "stages/report/labels.py",
            "stages/report/prompts.py",
            "stages/report/tables.py",
            "stages/report/view.py",
            "formats/rows/split_files.py",
            "machine/host.py",
            "graders/language.py",
            "graders/verdict.py",
            "formats/models/model_folder.py",
            "prompt.py",
        ),
        packages=("jinja2", "lingua-language-detector", "transformers"),
        reads=(
            *(STAGE_FOLDERS[name] for name in ("base", "train", "merge", "convert", "ladder", "parity", "evaluate")),
            f"{STAGE_FOLDERS['modelfile']}/{PUBLISHED}",
            OLLAMA_PARITY,
            evaluation_name(OLLAMA),
        ),
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}
