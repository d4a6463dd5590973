"""Read a recipe file and check how its settings fit together.

In: the path of a TOML file. Out: a `Recipe`, or a RecipeError that names the file, the setting and what is known
instead. Does not read the files that the recipe names.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tutor.errors import RecipeError
from tutor.recipe.ollama_names import FORMS, is_base_name
from tutor.recipe.quantizations import AUTO, BF16, F16, NEED_IMATRIX
from tutor.recipe.settings import Recipe

RETIRED = {
    "warmup_ratio": "it is called train.warmup here",
    "logging_dir": "nothing replaces it: metrics go to adapter/metrics.jsonl, TensorBoard's files to adapter.log/",
    "overwrite_output_dir": "nothing replaces it: a stage's folder is replaced when its inputs change",
    "evaluation_strategy": "it is called train.evaluations_per_epoch here",
    "eval_steps": "it is called train.evaluations_per_epoch here",
    "early_stopping_patience": "it is called train.patience here",
    "load_best_model_at_end": "nothing replaces it: the adapter with the lowest held-out loss is the one that is kept",
    "load_in_4bit": "it is called train.quantization here (nf4)",
    "load_in_8bit": "it is called train.quantization here (int8)",
    "device_map": "nothing replaces it: train.max_memory limits the GPU memory, and the other layers are streamed",
    "per_device_train_batch_size": "it is called train.batch_size here",
    "gradient_accumulation_steps": "it is called train.accumulation here",
    "num_train_epochs": "it is called train.epochs here",
    "use_rslora": "it is called train.variant here (rslora)",
    "use_dora": "it is called train.variant here (dora)",
    "lora_alpha": "it is called train.alpha here",
    "lora_dropout": "it is called train.dropout here",
    "r": "it is called train.rank here",
}
"""Names of the specification and of older transformers, each with its replacement here."""

MAX_BYTES = 1 << 16
"""Maximum size of a recipe in bytes; the time to parse a key is quadratic in its length."""

MAX_PROBLEMS = 5
"""Maximum number of problems in one message."""


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises RecipeError with the file, the setting and its neighbours."""
    values = _load(path)
    if "path" in values:
        raise RecipeError(f"{path}: unknown setting path; {_neighbours(('path',))}")
    try:
        recipe = Recipe.model_validate(values).model_copy(update={"path": path.resolve()})
    except ValidationError as error:
        problems = [_explain(item) for item in error.errors()]
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise RecipeError(f"{path}: " + "; ".join([*problems[:MAX_PROBLEMS], *more])) from None
    _check_together(recipe)
    return recipe


def _load(path: Path) -> dict[str, Any]:
    """The values of a TOML file. Raises RecipeError for a file that is none."""
    try:
        if not path.is_file() and path.exists():
            # open() of a pipe would wait for its writer.
            kind = "a folder" if path.is_dir() else "a pipe or a device"
            raise RecipeError(f"{path} is {kind}, not a recipe", "give a .toml file, for example data/demo.toml")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror}", "give --recipe data/demo.toml") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path} has more than {MAX_BYTES} bytes: that is no recipe", "give --recipe data/demo.toml")
    try:
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 (byte {error.start})", "save it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise RecipeError(f"{path} is not valid TOML: {error}") from None


def _check_weights(recipe: Recipe) -> None:
    """Raise RecipeError for settings of merge and convert that exclude each other."""
    if recipe.merge.base == "nf4" and recipe.train.quantization != "nf4":
        raise RecipeError(
            f"{recipe.path}: merge.base is 'nf4' and train.quantization is {recipe.train.quantization!r}",
            "set merge.base to original",
        )
    made = recipe.convert.quantizations
    if len(set(made)) != len(made):
        raise RecipeError(f"{recipe.path}: convert.quantizations names one twice: {', '.join(made)}")
    if not recipe.convert.imatrix and (blind := [name for name in made if name in NEED_IMATRIX]):
        raise RecipeError(
            f"{recipe.path}: llama.cpp makes {blind[0]} of convert.quantizations only with an importance matrix",
            "set convert.imatrix = true",
        )


def _check_keeping(recipe: Recipe) -> None:
    """Raise RecipeError for a patience that cannot count, or that ends a schedule whose end is to be kept."""
    if recipe.train.patience and not recipe.train.evaluations_per_epoch:
        raise RecipeError(f"{recipe.path}: train.patience counts evaluations, and train.evaluations_per_epoch is 0")
    if recipe.train.patience and recipe.train.keep == "last":
        raise RecipeError(
            f"{recipe.path}: train.patience ends a training before its schedule does, and train.keep is 'last'",
            "set train.patience to 0, or train.keep to 'best'",
        )


def _check_together(recipe: Recipe) -> None:
    """Raise RecipeError for settings that exclude each other."""
    if not recipe.name.strip("."):
        raise RecipeError(f"{recipe.path} has no name, and the build folder is named after it", "call it NAME.toml")
    _check_weights(recipe)
    if recipe.reasoning != "none" and recipe.prompt != "base":
        raise RecipeError(
            f"{recipe.path}: reasoning is {recipe.reasoning!r}, and the tutor's prompt has no thoughts",
            'set prompt = "base", or reasoning = "none"',
        )
    known = (*recipe.convert.quantizations, F16, BF16, AUTO)
    if recipe.ollama.quantization not in known:
        raise RecipeError(
            f"{recipe.path}: ollama.quantization is {recipe.ollama.quantization!r}; converted are {', '.join(known)}"
        )
    if not is_base_name(recipe.ollama.model):
        hint = f"{FORMS} (75 for the model), without a tag, and not deepseek-r1, which Ollama treats specially"
        raise RecipeError(f"{recipe.path}: ollama.model is {recipe.ollama.model[:200]!r}", hint)
    _check_keeping(recipe)
    if recipe.train.max_memory.gpu and recipe.train.quantization == "int8":
        raise RecipeError(
            f"{recipe.path}: train.max_memory cannot stream int8 weights (bitsandbytes keeps its own copy of them)",
            "set train.quantization to nf4 or none",
        )
    if recipe.train.max_memory.gpu and recipe.train.variant == "dora":
        raise RecipeError(
            f"{recipe.path}: train.max_memory cannot stream the base of a DoRA, which reads its weights at every step",
            "set train.variant to lora or rslora",
        )
    if recipe.train.max_memory.gpu and recipe.train.gradient_checkpointing is False:
        raise RecipeError(
            f"{recipe.path}: train.max_memory needs gradient checkpointing: without it all layers stay on the GPU",
            "remove train.gradient_checkpointing",
        )
    answer = recipe.generate.max_new_tokens
    if answer != "auto" and answer >= recipe.generate.context:
        raise RecipeError(
            f"{recipe.path}: generate.max_new_tokens ({answer}) leaves no tokens for a prompt "
            f"in generate.context ({recipe.generate.context})"
        )


def _explain(item: Any) -> str:
    """One problem that pydantic found, with the setting's name and value."""
    where = tuple(str(part) for part in item["loc"])
    name = _brief(".".join(where))
    if item["type"] == "extra_forbidden":
        return f"unknown setting {name}; {_neighbours(where)}"
    return f"{name} is {_shown(item['input'])}: {item['msg'].removeprefix('Value error, ')}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 63:
        return f"a number of {value.bit_length()} bits"
    return _brief(repr(value)) if isinstance(value, str | int | float) else type(value).__name__


def _brief(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _neighbours(where: tuple[str, ...]) -> str:
    """The replacement of a retired name, or the settings that exist beside an unknown one."""
    model: Any = Recipe
    for part in where[:-1]:
        field = model.model_fields.get(part)
        model = field.annotation if field else Recipe
    known = sorted(set(model.model_fields) - {"path"})
    if where[-1] in RETIRED:
        return RETIRED[where[-1]]
    close = difflib.get_close_matches(where[-1], known, n=1)
    return (f"did you mean {close[0]}? " if close else "") + f"known: {', '.join(known)}"
