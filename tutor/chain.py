"""The chain of stages: of each its folder, what it needs, and all that decides whether it has to run.

In: nothing. Out: `STAGES`, in order. Imports no stage: their modules bring torch. pipeline.py runs them.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutor.recipe import Recipe
from tutor.stages import checkpoint
from tutor.stages.lineage import TOOLS, recipe_hash


@dataclass(frozen=True)
class Stage:
    """One step: a module, a folder, and all that decides whether it has to run."""

    name: str
    folder: str
    about: str
    needs: tuple[str, ...]
    settings: Callable[[Recipe], dict[str, Any]]
    sources: tuple[str, ...]  # files of tutor/ whose change means another result
    packages: tuple[str, ...] = ()
    llamacpp: bool = False
    files: Callable[[Recipe], Mapping[str, Path]] = lambda _: {}  # the user's, beside the folders of `needs`
    beside: str = ""  # a pattern: what commands outside the pipeline make of its folder, removed with it
    resumes: bool = False  # goes on after a kill with what it had finished
    reads: tuple[str, ...] = ()  # folders and files that it takes where they are there, and needs none of

    @property
    def module(self) -> Any:
        """The stage's module, imported now: some bring torch."""
        return importlib.import_module(f"tutor.stages.{self.name}")


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
    from tutor.stages.data import input_files

    return input_files(recipe)


def _base_files(recipe: Recipe) -> Mapping[str, Path]:
    from tutor.base_source import input_files

    return input_files(recipe)


def _evaluate_files(recipe: Recipe) -> Mapping[str, Path]:
    from tutor.stages.honesty import named_files

    return named_files(recipe)


STAGES = (
    Stage(
        "data",
        "data",
        "check the rows and split them",
        needs=(),
        settings=_data,
        sources=("stages/data.py", "stages/rows.py", "stages/jsonl.py", "judges/fences.py", "template.py"),
        packages=("pydantic", "markdown-it-py"),
        files=_data_files,
    ),
    Stage(
        "base",
        "base",
        "fetch or make the base model and check it",
        needs=(),
        settings=_base,
        sources=(
            "stages/base.py",
            "stages/tiny.py",
            "base_source.py",
            "modelfolder.py",
            "engines/gguf_file.py",
            "template.py",
        ),
        packages=("transformers", "tokenizers", "torch", "gguf"),
        files=_base_files,
    ),
    Stage(
        "train",
        "adapter",
        "train the LoRA adapter",
        needs=("data", "base"),
        settings=_train,
        sources=checkpoint.SOURCES,
        packages=checkpoint.PACKAGES,
        beside="lora*",
    ),
    Stage(
        "merge",
        "merged",
        "merge the adapter into the 16-bit base",
        needs=("data", "base", "train"),
        settings=_merge,
        sources=(
            "stages/merge.py",
            "engines/layerwise.py",
            "engines/lora.py",
            "engines/merging.py",
            "engines/nf4.py",
            "engines/tensor_files.py",
            "modelfolder.py",
            "template.py",
        ),
        packages=("torch", "transformers", "safetensors", "bitsandbytes"),
        resumes=True,
    ),
    Stage(
        "convert",
        "gguf",
        "convert to GGUF and quantize",
        needs=("data", "base", "train", "merge"),
        settings=_convert,
        sources=(
            "stages/convert.py",
            "stages/gguf_says.py",
            "stages/lineage.py",
            "stages/readback.py",
            "stages/splits.py",
            "modelfolder.py",
            "engines/llamacpp_convert.py",
            "engines/llamacpp_process.py",
            "engines/gguf_file.py",
            "engines/gguf_weights.py",
            "engines/llamacpp_src/convert.py",
            "template.py",
        ),
        packages=("tutor", *TOOLS),
        llamacpp=True,
    ),
    Stage(
        "ladder",
        "ladder",
        "measure what each quantization loses",
        needs=("data", "base", "convert"),
        settings=_ladder,
        sources=(
            "stages/ladder.py",
            "stages/ladder_plot.py",
            "stages/splits.py",
            "served.py",
            "engines/llamacpp.py",
            "engines/llamacpp_process.py",
            "engines/llamacpp_score.py",
            "template.py",
        ),
        llamacpp=True,
    ),
    Stage(
        "parity",
        "parity",
        "compare every engine that the model passes",
        needs=("data", "base", "train", "merge", "convert", "ladder"),
        settings=_parity,
        sources=(
            "stages/parity.py",
            "stages/parity_collect.py",
            "stages/parity_compare.py",
            "stages/parity_gate.py",
            "stages/parity_record.py",
            "stages/parity_set.py",
            "served.py",
            "engines/hf.py",
            "engines/hf_trace.py",
            "engines/llamacpp.py",
            "engines/llamacpp_process.py",
            "engines/llamacpp_score.py",
            "engines/llamacpp_trace.py",
            "engines/trace.py",
            "modelfolder.py",
            "template.py",
        ),
        packages=("torch", "transformers", "peft", "bitsandbytes"),
        llamacpp=True,
        beside="parity-*",
    ),
    Stage(
        "modelfile",
        "model",
        "render the Modelfile",
        needs=("base", "convert", "ladder"),
        settings=_modelfile,
        sources=("stages/modelfile.py", "served.py", "template.py"),
        packages=("jinja2",),
    ),
    Stage(
        "evaluate",
        "eval",
        "answer the held-out prompts and judge",
        needs=("data", "base", "convert", "ladder"),
        settings=_evaluate,
        sources=(
            "stages/evaluate.py",
            "stages/splits.py",
            "served.py",
            "stages/asked.py",
            "stages/honesty.py",
            "stages/rates.py",
            "statistics.py",
            "engines/answer.py",
            "engines/llamacpp.py",
            "engines/llamacpp_process.py",
            "engines/llamacpp_score.py",
            "judges/code.py",
            "judges/fences.py",
            "judges/format.py",
            "judges/kept.py",
            "judges/language.py",
            "judges/overlap.py",
            "judges/typescript.py",
            "judges/typescript_install.py",
            "judges/typescript_scan.py",
            "judges/verdict.py",
            "template.py",
        ),
        packages=("markdown-it-py", "lingua-language-detector"),
        llamacpp=True,
        files=_evaluate_files,
        beside="eval-*",
    ),
    Stage(
        "report",
        "report",
        "write the page and the model card",
        needs=("data",),
        settings=_report,
        sources=(
            "stages/report.py",
            "stages/page.py",
            "stages/page.css",
            "stages/rates.py",
            "stages/report.html.j2",
            "stages/report_card.py",
            "stages/report_charts.py",
            "stages/report_labels.py",
            "stages/report_prompts.py",
            "stages/report_tables.py",
            "stages/report_view.py",
            "stages/splits.py",
            "host.py",
            "judges/language.py",
            "judges/verdict.py",
            "modelfolder.py",
            "template.py",
        ),
        packages=("jinja2", "lingua-language-detector", "transformers"),
        reads=(
            *("base", "adapter", "merged", "gguf", "ladder", "parity", "eval"),
            *("model/published.json", "parity-ollama", "eval-ollama"),
        ),
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}
