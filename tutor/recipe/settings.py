"""Every setting of a run, with its type, range and default; a recipe is one value of each.

In: the values of a recipe file (reading.py reads it). Out: a frozen `Recipe`. Each default is written once, here, and
is the specification's number unless its comment says otherwise. Does not check how settings fit together.
"""

import contextlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from tutor.errors import RecipeError
from tutor.recipe.trackers import TrackerName
from tutor.recipe.values import (
    BaseSource,
    Kind,
    Language,
    LinearLayers,
    MemoryAmount,
    OptionalPath,
    RelativePath,
    ServedKind,
    SystemText,
)

MANY = 1 << 24
"""Upper bound of counts of rows, steps and tokens; no model has more positions."""


class Settings(BaseModel):
    """A strict, frozen table of settings: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        if isinstance(value, int) and value.bit_length() > 63:
            raise ValueError("TOML's numbers have 64 bits")
        return value


class DataSettings(Settings):
    """The rows that are used, and their split."""

    train: RelativePath = "tutor.jsonl"
    eval: OptionalPath = ""  # prompts to ask; empty: the held-out rows' questions, whose answers are references
    held_out: float = Field(0.1, gt=0, lt=0.5)  # share of the rows kept from training, by category
    rows: int = Field(0, ge=0, le=MANY)  # number of rows, in proportion by category and topic; 0: all
    loss: Literal["all", "last"] = "all"  # the answers of a row of several turns that are trained
    language: Language = "es"  # of the answers, an ISO 639-1 code; "any": neither graded nor linted
    prompts: int = Field(0, ge=0, le=MANY)  # number of prompts, in proportion by category; 0: all


class BaseSettings(Settings):
    """The model that is tuned."""

    # "hub:OWNER/NAME@40-HEX", "path:FOLDER", "package:MODULE/FILE.gguf" or "tiny"
    source: BaseSource = "hub:deepseek-ai/DeepSeek-R1-Distill-Llama-8B@6a6f4aa4197940add57724a7707d069478df56b1"


class MemoryLimits(Settings):
    """Maximum memory of the base during training; without a limit, all memory that is available."""

    gpu: MemoryAmount | None = None  # layers beyond it stay in main memory, streamed
    cpu: MemoryAmount | None = None  # for the streamed layers


class TrainSettings(Settings):
    """The training of the LoRA adapter."""

    # "rslora" scales by alpha / sqrt(rank); "dora" trains a length for each output too, and is served merged only.
    variant: Literal["lora", "rslora", "dora"] = "lora"
    rank: int = Field(8, ge=1, le=1024)
    alpha: int = Field(16, ge=1, le=1 << 16)
    dropout: float = Field(0.1, ge=0, lt=1)
    # Linear layers with an adapter, by name; "all-linear": all of them.
    target_modules: LinearLayers = ["q_proj", "k_proj", "v_proj", "o_proj"]
    # Quantization of the frozen base. nf4 is double-quantized; auto: none where 16 bits fit, nf4 elsewhere.
    quantization: Literal["auto", "nf4", "int8", "none"] = "nf4"
    # Of the computation. auto: by compute capability on a GPU; the faster of bf16 and fp32, measured, on a CPU.
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    batch_size: int = Field(1, ge=1, le=1 << 16)
    accumulation: int = Field(10, ge=1, le=1 << 16)
    packing: bool = True  # rows of a step in fewer micro-batches, without padding; false: batch_size rows each
    # Maximum tokens of a packed micro-batch. auto: 4096 (the fastest), or what fits without gradient checkpointing.
    pass_tokens: Literal["auto"] | Annotated[int, Field(ge=1, le=MANY)] = "auto"  # noqa: S105
    epochs: int = Field(6, ge=1, le=10_000)
    learning_rate: float = Field(2e-4, gt=0, lt=1)  # not in the specification; TRL's 2e-5 is too low for LoRA
    warmup: float = Field(0.03, ge=0, lt=1)  # share of the steps
    max_length: int = Field(1024, ge=16, le=MANY)  # tokens of prompt, answer and EOS; a longer row is an error
    gradient_checkpointing: Literal["auto"] | bool = "auto"  # computes activations twice; auto: where they do not fit
    max_memory: MemoryLimits = MemoryLimits()
    evaluations_per_epoch: int = Field(2, ge=0, le=1000)  # evaluations on the held-out rows
    # The adapter that is kept: "best": lowest held-out loss of the evaluations; "last": the end of the schedule, where
    # the learning rate is zero.
    keep: Literal["best", "last"] = "best"
    patience: int = Field(0, ge=0, le=MANY)  # evaluations without improvement that end the training; 0: no early end
    # Trackers that transformers reports each step to, beside TensorBoard's files: wandb, mlflow, trackio, ... Accounts
    # and addresses are in their own environment variables; the services of `tutor stack` reach no tracker outside.
    report_to: list[TrackerName] = []
    logging_steps: int = Field(50, ge=1, le=MANY)
    save_steps: int = Field(500, ge=1, le=MANY)
    # Minutes between checkpoints; 0: by steps alone. Not in the specification: 278 rows never reach its 500 steps.
    save_minutes: float = Field(2, ge=0, le=10_080)


class MergeSettings(Settings):
    """The base that the adapter is merged into."""

    # "original": its 16-bit weights; "nf4": as dequantized from the 4 bits of the training. No difference is shown
    # between them (docs/benchmarks.md), and the original is rounded once less before it is quantized for serving.
    base: Literal["original", "nf4"] = "original"
    dtype: Literal["auto", "fp16", "bf16"] = "auto"  # auto: fp16, and bf16 for families that overflow in fp16


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
"""Maximum KL divergence from F16 in nats per token: two to three times the loss of the demo's 135M model; small models
lose most. Measured there: Q8_0 0.006, Q6_K 0.016, Q5_K_M 0.017, Q4_K_M 0.077, Q4_K_S 0.093, Q5_0 0.10, IQ4_NL and
IQ4_XS 0.22, Q4_0 0.36, Q3_K_M 0.20, Q3_K_S 0.56, IQ3_S 0.92. Q4_1 and Q5_1 (0.63, 0.40) share the limit of the next
coarser type. The limit of two bits and less is below the distance to another model of equal shape (4.1); TQ1_0 and
TQ2_0 (4.3) exceed it."""


def _with_defaults(given: dict[str, float]) -> dict[str, float]:
    return {**BUDGETS, **given}


class ConvertSettings(Settings):
    """The GGUF files that are made in addition to F16."""

    quantizations: list[Kind] = Field(default=["Q4_K_M", "Q5_K_M", "Q8_0"], min_length=1)
    imatrix: bool = False  # quantizes with an importance matrix of the training split
    base: bool = True  # converts the untuned base too, for comparison
    # Maximum nats per held-out token for ollama.quantization = "auto", in loss and in KL divergence from F16.
    # 0.01 is the specification's promise for quantizing: less than 1 % lost (3.2).
    budget: float = Field(0.01, gt=0, le=1)


class GenerateSettings(Settings):
    """Sampling of the served model; evaluation replaces temperature by 0."""

    # Maximum tokens of an answer; auto: the longest trained answer and a tenth (tutor/engines/answer_limit.py).
    max_new_tokens: Literal["auto"] | Annotated[int, Field(ge=1, le=MANY)] = 515
    temperature: float = Field(0.003, ge=0, le=2)
    top_p: float = Field(0.85, gt=0, le=1)
    repetition_penalty: float = Field(1.15, ge=1, le=2)
    context: int = Field(4096, ge=64, le=MANY)  # always explicit: Ollama's default depends on the GPU (4k to 256k)


class EvaluateSettings(Settings):
    """Files that the evaluation reads in addition to data.eval, in the form of data/README.md; empty: none."""

    paraphrases: str = ""  # prompts in other words
    general: str = ""  # texts on other subjects, to measure what tuning made the model forget


class ParitySettings(Settings):
    """The gate after conversion: equal conversations through every engine."""

    prompts: int = Field(2, ge=0, le=1000)  # number of held-out rows among the conversations, the shortest ones
    # Maximum KL divergence from F16 in nats per token, by quantization; default: BUDGETS
    budgets: Annotated[dict[Kind, Annotated[float, Field(gt=0, le=10)]], AfterValidator(_with_defaults)] = BUDGETS


class OllamaSettings(Settings):
    """The model that is published."""

    model: str = "tutor"
    # The served one of convert.quantizations; "auto": the smallest within convert.budget,
    # and the closest to F16 where none is.
    quantization: ServedKind = "Q4_K_M"


class Recipe(Settings):
    """All settings of a run."""

    seed: int = Field(42, ge=0, lt=2**32 - 1)  # llama.cpp takes 2**32 - 1 for a random seed
    # "tutor": Instrucción / Respuesta, as the specification has it; "base": the chat template of the base.
    prompt: Literal["tutor", "base"] = "tutor"
    # Thoughts before an answer. "none": no think block; "empty": the prompt ends behind an empty one; "rows": the
    # reasoning of the rows is trained.
    reasoning: Literal["none", "empty", "rows"] = "none"
    system: SystemText = ""  # system text of every training sample and of the Modelfile; empty: none
    data: DataSettings = DataSettings()
    base: BaseSettings = BaseSettings()
    train: TrainSettings = TrainSettings()
    merge: MergeSettings = MergeSettings()
    convert: ConvertSettings = ConvertSettings()
    generate: GenerateSettings = GenerateSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    parity: ParitySettings = ParitySettings()
    ollama: OllamaSettings = OllamaSettings()
    path: Path = Field(default=Path(), exclude=True)  # the recipe file; not a setting

    @property
    def name(self) -> str:
        """The recipe file's stem: name of its folder below `build/`."""
        return self.path.stem

    def resolve(self, relative: str) -> Path:
        """A path of this recipe, relative to the recipe's folder. Raises RecipeError when it is no path."""
        try:
            path = (self.path.parent / Path(relative).expanduser()).resolve()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                path.stat()  # from Python 3.13 on, `resolve` alone accepts a loop of links
            return path
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, an unknown user's ~, a NUL
            raise RecipeError(f"{self.path}: {relative!r} is no path: {error}") from None
