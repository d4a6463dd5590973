"""Load model folders into transformers: in 4 or 8 bits or as they are, with a PEFT adapter over them or not.

In: folders that are on this disk, a precision and a quantization that were decided before. Out: a model, or an engine
on it. Does not fetch or choose anything, and never runs code that a model folder brings.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig

from tutor.engines.hf.engine import TransformersEngine, first_line
from tutor.errors import ArtifactError, HostError
from tutor.formats.models.model_folder import load_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(
    model: Path, adapter: Path | None, *, quantization: Literal["nf4", "int8", "none"], precision: str
) -> TransformersEngine:
    """An engine on a model folder, with a PEFT adapter over it where one is named.

    Raises ArtifactError when a folder is incomplete or the two do not fit, HostError when memory does not suffice.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer.eos_token_id is None:
        raise ArtifactError(f"{model}: the tokenizer has no EOS token, so no answer could end")
    loaded = load_base(model, quantization, precision)
    loaded.generation_config = GenerationConfig()
    if adapter is not None:
        loaded = _with_adapter(loaded, adapter)
    name = f"transformers ({'' if quantization == 'none' else quantization.upper() + ', '}{precision})"
    return TransformersEngine(name, loaded.eval(), tokenizer)


def load_base(folder: Path, quantization: str, precision: str, *, sharded: bool = False, in_ram: bool = False) -> Any:
    """A model in 4 bits (NF4, double-quantized), in 8 (LLM.int8) or as it is, computing in `precision`.

    On this process's GPU, or the CPU where there is none or `in_ram` says so; `sharded`: FSDP will distribute it over
    the GPUs. Raises ArtifactError when the folder cannot be loaded, HostError when memory does not suffice.
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
            f"the GPU has no room for {folder}", "end what else uses it, or set train.quantization to nf4"
        ) from error
    # transformers fills these with random numbers, with no more than a warning.
    if bad := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
        raise ArtifactError(f"{folder} lacks {len(bad)} tensors, or has them in another shape: {bad[0]}")
    if sharded:
        model.__dict__.pop("hf_device_map", None)  # accelerate moves it to the GPUs, and refuses one that is placed
    return model


def quant_storage(precision: str, *, sharded: bool) -> torch.dtype:
    """The numbers that 4-bit weights are stored as: FSDP parts only those of the type that is computed in."""
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
