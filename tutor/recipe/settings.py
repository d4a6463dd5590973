"""The recipe: one strict TOML file with every setting of a run. In: a path. Out: a frozen `Recipe`.

Each default is written once, here, and is the specification's number unless its comment says otherwise.
"""

import contextlib
import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from tutor.errors import RecipeError
from tutor.recipe.quantizations import AUTO, F16, KINDS, NEED_IMATRIX, NOT_MADE, canonical

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
    "device_map": "nothing replaces it: train.max_memory says how much the GPU may hold, and the rest is streamed",
    "per_device_train_batch_size": "it is called train.batch_size here",
    "gradient_accumulation_steps": "it is called train.accumulation here",
    "num_train_epochs": "it is called train.epochs here",
    "lora_alpha": "it is called train.alpha here",
    "lora_dropout": "it is called train.dropout here",
    "r": "it is called train.rank here",
}
"""Names of the specification and of older transformers, and what became of them here."""

MAX_BYTES = 1 << 16
"""A recipe is some lines: what is longer is another file, and a parser's time grows with the square of a key."""

MAX_PROBLEMS = 5

MEMORY = re.compile(r"(\d{1,6}(?:\.\d{1,3})?) ?(MB|MiB|GB|GiB)")

MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
"""A model name that Ollama accepts (docs/facts.md, 5), without host, namespace and tag."""


class Settings(BaseModel):
    """Strict and frozen: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @field_validator("*")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > 63:
            raise ValueError("TOML's numbers have 64 bits")
        return value


def _existing_style(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    if len(value) > 4096:
        raise ValueError(f"has {len(value)} characters; a path has at most 4096")
    return value


RelativePath = Annotated[str, AfterValidator(_existing_style)]
"""A path, relative to the recipe's own folder; `~` is the home folder."""


class DataSettings(Settings):
    """Which rows."""

    train: RelativePath = "tutor.jsonl"
    eval: RelativePath = "eval.jsonl"
    held_out: float = Field(0.1, gt=0, lt=0.5)  # share of the rows kept from training, by category
    rows: int = Field(0, ge=0)  # 0: all; else a part of so many rows, in proportion by category and topic
    prompts: int = Field(0, ge=0)  # the same for the prompts of data.eval


class BaseSettings(Settings):
    """Which model is tuned."""

    # "hub:OWNER/NAME@40-HEX", "path:FOLDER", "package:MODULE/FILE.gguf" or "tiny"
    source: str = "hub:deepseek-ai/DeepSeek-R1-Distill-Llama-8B@6a6f4aa4197940add57724a7707d069478df56b1"


def _linear_layer(name: str) -> str:
    if name == "lm_head":
        raise ValueError("lm_head cannot be adapted: a GGUF adapter and a tied embedding have no place for it")
    return name


def _amount(value: str) -> str:
    if not MEMORY.fullmatch(value):
        raise ValueError("give a number and MB, MiB, GB or GiB, as in '6GiB'")
    return value


class MemoryLimits(Settings):
    """How much the base may take of each memory while training; without a limit, all that is free."""

    gpu: Annotated[str, AfterValidator(_amount)] | None = None  # layers beyond it wait in RAM, one by one streamed
    cpu: Annotated[str, AfterValidator(_amount)] | None = None  # for those layers


class TrainSettings(Settings):
    """QLoRA."""

    rank: int = Field(8, ge=1, le=1024)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    target_modules: list[Annotated[str, AfterValidator(_linear_layer)]] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1
    )
    # Of the frozen base while training; nf4 is double-quantized, auto is none where 16 bits fit and nf4 elsewhere.
    quantization: Literal["auto", "nf4", "int8", "none"] = "nf4"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    batch_size: int = Field(1, ge=1)
    accumulation: int = Field(10, ge=1)
    packing: bool = True  # the same rows a step in fewer passes, unpadded; false: batch_size a pass, as specified
    # Of a packed pass at most; auto: 4096, the quickest, or what memory has room for without computing twice.
    pass_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"  # noqa: S105
    epochs: int = Field(6, ge=1)
    learning_rate: float = Field(2e-4, gt=0, lt=1)  # not in the specification; TRL's 2e-5 is too low for LoRA
    warmup: float = Field(0.03, ge=0, lt=1)  # share of the steps
    max_length: int = Field(1024, ge=16)  # tokens of prompt, answer and EOS; a longer row is an error
    gradient_checkpointing: Literal["auto"] | bool = "auto"  # compute activations twice; auto: where they do not fit
    max_memory: MemoryLimits = MemoryLimits()
    evaluations_per_epoch: int = Field(2, ge=0)  # of the held-out rows; the best adapter of them all is kept
    patience: int = Field(0, ge=0)  # end after so many evaluations without a better one; 0: all epochs, as they say
    logging_steps: int = Field(50, ge=1)
    save_steps: int = Field(500, ge=1)
    # Not in the specification, whose 500 steps are more than its 278 rows ever make; 0: by steps alone.
    save_minutes: float = Field(2, ge=0)


class MergeSettings(Settings):
    """What the adapter is merged into."""

    # "nf4" is what 4-bit training saw of the base, "original" its 16-bit weights; "auto" scores both after nf4 training
    base: Literal["auto", "original", "nf4"] = "auto"
    dtype: Literal["fp16", "bf16"] = "fp16"


def _quantization(name: str) -> str:
    called = canonical(name)
    if called in NOT_MADE:
        raise ValueError(NOT_MADE[called])
    if called not in KINDS:
        close = difflib.get_close_matches(called, KINDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"is no quantization of llama.cpp; {hint}known: {', '.join(KINDS)}")
    return called


def _served(name: str) -> str:
    return AUTO if name.lower() == AUTO else canonical(name)


Kind = Annotated[str, AfterValidator(_quantization)]

BUDGETS: dict[str, float] = {
    "Q8_0": 0.02,
    "Q6_K": 0.05,
    "Q5_K_M": 0.1,
    "Q5_K_S": 0.12,
    "Q4_K_M": 0.2,
    **dict.fromkeys(("Q4_K_S", "Q5_0", "Q5_1"), 0.25),
    **dict.fromkeys(("Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS"), 0.8),
    **dict.fromkeys(("Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS"), 2.0),
    **dict.fromkeys(("Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "TQ2_0", "TQ1_0", "IQ1_M", "IQ1_S"), 3.0),
}
"""KL to F16 in nats a token: two to three times what the demo's 135M loses, and small models lose most. Measured: Q8_0
0.006, Q6_K 0.016, Q5_K_M as the convert stage makes it 0.017, Q4_K_M 0.077, Q4_K_S 0.093, Q5_0 0.10, IQ4_NL and IQ4_XS
0.22, Q4_0 0.36, Q3_K_M 0.20, Q3_K_S 0.56, IQ3_S 0.92. Q4_1 and Q5_1 (0.63, 0.40 there) have the next coarser type's;
two bits and less have what is below another model of the same shape (4.1), and TQ1_0 and TQ2_0 (4.3) fail it."""


def _with_defaults(given: dict[str, float]) -> dict[str, float]:
    return {**BUDGETS, **given}


class ConvertSettings(Settings):
    """GGUF files beside F16."""

    quantizations: list[Kind] = Field(default=["Q4_K_M", "Q5_K_M", "Q8_0"], min_length=1)
    imatrix: bool = False  # weigh the weights by what the training split makes of them: F16 reads it once
    base: bool = True  # also the untuned base, to compare with
    # Of ollama.quantization = "auto": nats a held-out token at most, in loss and in KL divergence to F16 alike.
    # 0.01 is the specification's own promise for quantizing, less than 1 % lost (3.2).
    budget: float = Field(0.01, gt=0, le=1)


class GenerateSettings(Settings):
    """How the served model answers; evaluation replaces temperature by 0."""

    max_new_tokens: int = Field(515, ge=1)
    temperature: float = Field(0.003, ge=0, le=2)
    top_p: float = Field(0.85, gt=0, le=1)
    repetition_penalty: float = Field(1.15, ge=1, le=2)
    context: int = Field(4096, ge=64)  # always explicit: Ollama's default goes from 4k to 256k with the card


class EvaluateSettings(Settings):
    """What the evaluation reads beside data.eval; empty: nothing of the kind. Rows as data/README.md says."""

    paraphrases: str = ""  # prompts of data.eval in other words
    general: str = ""  # texts about anything else: what tuning must not make the model forget


class ParitySettings(Settings):
    """The gate behind conversion: the same conversations through every engine."""

    prompts: int = Field(2, ge=0)  # held-out rows among them, the shortest ones; the other texts are fixed
    # KL to F16 in nats a token that a quantization may cost; what is not named here is as in BUDGETS
    budgets: Annotated[dict[Kind, Annotated[float, Field(gt=0)]], AfterValidator(_with_defaults)] = BUDGETS


class OllamaSettings(Settings):
    """What is published."""

    model: str = "tutor"
    # Which of convert.quantizations is served; "auto": the smallest in convert.budget.
    quantization: Annotated[str, AfterValidator(_served)] = "Q4_K_M"


class Recipe(Settings):
    """A whole run."""

    seed: int = Field(42, ge=0, lt=2**32 - 1)  # llama.cpp reads 2**32 - 1 as: any
    system: str = ""  # stands in every training sample and in the Modelfile, or (empty) in neither
    data: DataSettings = DataSettings()
    base: BaseSettings = BaseSettings()
    train: TrainSettings = TrainSettings()
    merge: MergeSettings = MergeSettings()
    convert: ConvertSettings = ConvertSettings()
    generate: GenerateSettings = GenerateSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    parity: ParitySettings = ParitySettings()
    ollama: OllamaSettings = OllamaSettings()
    path: Path = Field(default=Path(), exclude=True)  # where it was read; not a setting

    @property
    def name(self) -> str:
        """The recipe file's stem: the folder under `build/`."""
        return self.path.stem

    def resolve(self, relative: str) -> Path:
        """A path of this recipe, seen from its own folder. Raises RecipeError when it cannot be one."""
        try:
            path = (self.path.parent / Path(relative).expanduser()).resolve()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                path.stat()  # from Python 3.13 on, `resolve` alone accepts a loop of links
            return path
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, an unknown user's ~, a NUL
            raise RecipeError(f"{self.path}: {relative!r} is no path: {error}") from None


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises RecipeError naming the file, the key and its neighbours."""
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
    """The values of a TOML file."""
    try:
        if not path.is_file() and path.exists():
            # Opening a pipe would wait for its writer.
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
    """What is merged and converted."""
    if recipe.merge.base == "nf4" and recipe.train.quantization != "nf4":
        raise RecipeError(
            f"{recipe.path}: merge.base is 'nf4' and train.quantization is {recipe.train.quantization!r}",
            "set merge.base to original or auto",
        )
    made = recipe.convert.quantizations
    if len(set(made)) != len(made):
        raise RecipeError(f"{recipe.path}: convert.quantizations names one twice: {', '.join(made)}")
    if not recipe.convert.imatrix and (blind := [name for name in made if name in NEED_IMATRIX]):
        raise RecipeError(
            f"{recipe.path}: llama.cpp makes {blind[0]} of convert.quantizations only with an importance matrix",
            "set convert.imatrix = true",
        )


def _check_together(recipe: Recipe) -> None:
    if not recipe.name.strip("."):
        raise RecipeError(f"{recipe.path} has no name, and the build folder is named after it", "call it NAME.toml")
    _check_weights(recipe)
    known = (*recipe.convert.quantizations, F16, AUTO)
    if recipe.ollama.quantization not in known:
        raise RecipeError(
            f"{recipe.path}: ollama.quantization is {recipe.ollama.quantization!r}; converted are {', '.join(known)}"
        )
    if not MODEL_NAME.fullmatch(recipe.ollama.model) or recipe.ollama.model == "deepseek-r1":
        raise RecipeError(
            f"{recipe.path}: ollama.model is {recipe.ollama.model!r}",
            "letters, digits, '_', '-' and '.', at most 80, and not deepseek-r1, which Ollama treats specially",
        )
    if recipe.train.patience and not recipe.train.evaluations_per_epoch:
        raise RecipeError(f"{recipe.path}: train.patience counts evaluations, and train.evaluations_per_epoch is 0")
    if recipe.train.max_memory.gpu and recipe.train.quantization == "int8":
        raise RecipeError(
            f"{recipe.path}: train.max_memory cannot stream int8 weights (bitsandbytes keeps its own copy of them)",
            "set train.quantization to nf4 or none",
        )
    if recipe.train.max_memory.gpu and recipe.train.gradient_checkpointing is False:
        raise RecipeError(
            f"{recipe.path}: train.max_memory needs gradient checkpointing: without it all layers stay on the GPU",
            "remove train.gradient_checkpointing",
        )
    if recipe.generate.max_new_tokens >= recipe.generate.context:
        raise RecipeError(
            f"{recipe.path}: generate.max_new_tokens ({recipe.generate.max_new_tokens}) leaves no room for a prompt "
            f"in generate.context ({recipe.generate.context})"
        )


def _explain(item: Any) -> str:
    """One problem of pydantic's, in the recipe's own words."""
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
    """The settings that exist beside an unknown one; a retired name's successor first."""
    model: Any = Recipe
    for part in where[:-1]:
        field = model.model_fields.get(part)
        model = field.annotation if field else Recipe
    known = sorted(set(model.model_fields) - {"path"})
    if where[-1] in RETIRED:
        return RETIRED[where[-1]]
    close = difflib.get_close_matches(where[-1], known, n=1)
    return (f"did you mean {close[0]}? " if close else "") + f"known: {', '.join(known)}"
