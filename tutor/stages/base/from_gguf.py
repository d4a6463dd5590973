"""Make a plain 16-bit model folder of the quantized GGUF that a Python package carries.

In: the GGUF file. Out: weights, configuration and tokenizer as a Hugging Face folder, with a README that states that
the weights were quantized. Does not restore what quantization lost, and does not import the package.
"""

import json
import logging
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tutor.errors import ArtifactError
from tutor.formats.models.gguf import read_gguf
from tutor.formats.models.gguf_metadata import Metadata, metadata_of
from tutor.formats.models.model_folder import check_model_config
from tutor.formats.models.pre_tokenizer import equivalent_names, pre_tokenizer_name

log = logging.getLogger(__name__)


def make_folder(gguf: Path, model: Path, package: str) -> None:
    """Write the model of a package's GGUF into the folder `model`.

    Raises ArtifactError for a damaged file, another architecture, or a tokenizer that does not split as the file does.
    """
    try:
        metadata = metadata_of(read_gguf(gguf))
    except ArtifactError as error:
        raise ArtifactError(error.message, f"install {package} again") from None
    check_model_config({"model_type": metadata.architecture}, str(gguf))
    log.info("reading %s", gguf.name)
    _write_weights(gguf, model)
    _write_tokenizer(gguf, model, metadata)
    card = f"# Weights of {gguf.name}\n\nOnce quantized as the file's name says; here they are 16-bit again.\n"
    (model / "README.md").write_text(card, "utf-8")


def _write_weights(gguf: Path, model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # The loaded model refuses .half() and keeps this key: copy its state into a plain model without it
    settings.pop("quantization_config", None)
    config = type(loaded.config).from_dict({**settings, "dtype": "float16"})
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.float16).save_pretrained(model)


def _write_tokenizer(gguf: Path, model: Path, metadata: Metadata) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    split = metadata.pre_tokenizer
    if split == "smollm":
        # transformers' loader ignores the GGUF's splitting: blanks before a digit would get other ids than in serving
        digits = pre_tokenizers.Digits(individual_digits=True)
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.save_pretrained(model)
    found = pre_tokenizer_name(model / "tokenizer.json")
    if not split or split not in equivalent_names(found):
        raise ArtifactError(f"{gguf} splits text as {split!r}, its tokenizer was read as {found!r}")
    path = model / "tokenizer_config.json"
    labels = json.loads(path.read_text("utf-8"))
    for name in ("is_local", "local_files_only", "backend"):
        labels.pop(name, None)
    # transformers 4 (pinned by llama.cpp's converter) knows this name, and not that of version 5
    labels["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(labels, ensure_ascii=False, indent=1) + "\n", "utf-8")
