"""Load model folders into transformers, quantized or not, with a PEFT adapter or without.

In: folders on this disk, a precision and a quantization that the caller has decided. Out: a model, or an engine.
Does not fetch a model, does not choose a precision, and never runs code that a model folder brings.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from tutor.engines.hf.engine import TransformersEngine, first_line
from tutor.errors import ArtifactError, HostError, RecipeError
from tutor.formats.models.model_folder import load_tokenizer
from tutor.prompt.format import PromptFormat, end_token
from tutor.prompt.tutor_format import TUTOR

NF4_BLOCK = 64
"""Number of weights that share a scale."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Types of PyTorch by the recipe's names of precisions."""


def load(
    model: Path,
    adapter: Path | None,
    *,
    quantization: Literal["nf4", "int8", "none"],
    precision: str,
    prompt: PromptFormat = TUTOR,
) -> TransformersEngine:
    """Load a model folder as an engine, with the PEFT adapter of the folder `adapter` unless it is None.

    Raises ArtifactError when a folder is incomplete or the adapter does not fit the model, HostError when memory does
    not suffice.
    """
    tokenizer = load_tokenizer(model)
    if end_token(prompt, tokenizer) is None:
        raise ArtifactError(f"{model}: the tokenizer has no EOS token, so no answer could end")
    loaded = load_base(model, quantization, precision)
    loaded.generation_config = GenerationConfig()
    if adapter is not None:
        loaded = _with_adapter(loaded, adapter)
    name = f"transformers ({'' if quantization == 'none' else quantization.upper() + ', '}{precision})"
    return TransformersEngine(name, loaded.eval(), tokenizer, prompt)


def load_base(folder: Path, quantization: str, precision: str, *, sharded: bool = False, in_ram: bool = False) -> Any:
    """Load a model in NF4 (double-quantized), in int8 (LLM.int8) or unquantized; it computes in `precision`.

    The device is this process's GPU, or the CPU when there is no GPU or `in_ram` is set. `sharded`: FSDP will
    distribute the model over the GPUs.
    Raises ArtifactError when the folder cannot be loaded, HostError when memory does not suffice.
    """
    dtype = DTYPES[precision]
    configs: dict[str, dict[str, Any]] = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": quant_storage(precision, sharded=sharded),
        },
        "int8": {"load_in_8bit": True},
    }
    config = BitsAndBytesConfig(**configs[quantization]) if quantization in configs else None
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=config,
            device_map={"": torch.cuda.current_device() if torch.cuda.is_available() and not in_ram else "cpu"},
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"cannot load {folder}: {first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise HostError(
            f"the GPU has too little free memory for {folder}",
            "end other programs on the GPU, or set train.quantization to nf4",
        ) from error
    # transformers only warns about these tensors, and fills them with random numbers.
    if bad := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
        raise ArtifactError(f"{folder} lacks {len(bad)} tensors, or has them in another shape: {bad[0]}")
    if quantization == "nf4" and not torch.cuda.is_available():
        _refuse_cut_blocks(model, folder)
    if sharded:
        model.__dict__.pop("hf_device_map", None)  # accelerate refuses to move a model that has a device map
    return model


def _refuse_cut_blocks(model: Any, folder: Path) -> None:
    """Raise RecipeError where a row of a 4-bit weight ends inside a block: bitsandbytes 0.50 misreads it on a CPU.

    Measured there: errors of 0.28 (root mean square) instead of 0.09; training would see another base.
    """
    widths = (module.in_features for module in model.modules() if isinstance(module, Linear4bit))
    if cut := next((width for width in widths if width % NF4_BLOCK), None):
        raise RecipeError(
            f"train.quantization is nf4, and {folder} has rows of {cut} numbers: bitsandbytes reads rows on a CPU only "
            f"where they are a multiple of {NF4_BLOCK}",
            'set train.quantization = "none"',
        )


def quant_storage(precision: str, *, sharded: bool) -> torch.dtype:
    """Return the dtype that 4-bit weights are stored in: FSDP shards only tensors of the compute dtype."""
    return DTYPES[precision] if sharded else torch.uint8


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise ArtifactError(f"{adapter / name} is missing", "run: tutor train")
    try:
        return PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = first_line(error)
        raise ArtifactError(f"the adapter {adapter} does not fit its base: {reason}", "run: tutor train") from error
