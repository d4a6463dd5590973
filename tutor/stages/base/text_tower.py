"""The text model of a multimodal checkpoint, as a folder of its own.

In: a folder such as Gemma 3's with `text_config`, whose tensors lie below `language_model.`. Out: a model folder of the
text's family: its tensors, config.json, the tokenizer's files. Streams one piece of one tensor, leaves images and sound
out, and changes no file of the source.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json, write_json
from tutor.errors import ArtifactError
from tutor.formats.architectures import ARCHITECTURES
from tutor.formats.models.model_folder import is_refusal, reason
from tutor.formats.models.safetensors import INDEX, WIDTHS, Stored, make_header, read_folder
from tutor.formats.models.tensor_streams import open_writer, pieces
from tutor.machine.run_cost import require_disk

log = logging.getLogger(__name__)

PREFIXES = {"model.language_model.": "model.", "language_model.": "", "lm_head.": "lm_head."}
"""Beginnings of the names of the text's tensors in a checkpoint, by version of transformers, and what they become."""
COPIED = ("tokenizer*", "special_tokens_map.json", "chat_template*", "added_tokens.json", "LICENSE*", "NOTICE*")
"""Patterns of the files that the text model keeps."""


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration is that of a multimodal checkpoint whose text model is of a known family."""
    return any(row.multimodal and row.multimodal == config.get("model_type") for row in ARCHITECTURES.values())


def text_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a folder's model: of a multimodal checkpoint the text's, completed by transformers.

    Raises ArtifactError where transformers cannot read it.
    """
    config = read_json(folder / "config.json")
    if not is_multimodal(config):
        return config
    from transformers import AutoConfig

    try:
        whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if not is_refusal(error):
            raise
        problem = f"transformers cannot read {folder / 'config.json'}: {reason(error)}"
        raise ArtifactError(problem, "fetch it again, or name another base") from error
    text = json.loads(whole.get_text_config().to_json_string(use_diff=False))
    kept = {name: config[name] for name in ("quantization_config", "auto_map") if name in config}
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
    family = ARCHITECTURES[text["model_type"]]
    return {**text, **kept, "architectures": [family.class_name], "dtype": dtype}


def extract_text(source: Path, model: Path) -> None:
    """Write the text model of a multimodal checkpoint into the folder `model`.

    Raises ArtifactError for a checkpoint without one, HostError where the disk cannot hold it.
    """
    files = {path: [each for each in stored if _name(each.name)] for path, stored in read_folder(source).items()}
    files = {path: stored for path, stored in files.items() if stored}
    if not files:
        raise ArtifactError(f"{source} has no tensor of a text model (language_model.)", "fetch it again")
    size = sum(each.count * WIDTHS[each.dtype] for stored in files.values() for each in stored)
    model.mkdir(parents=True, exist_ok=True)
    require_disk(model, size, "extracting the text model", "free disk space")
    log.info("extracting the text model of %s: %.1f GB, without its images and sound", source, size / 1e9)
    places: dict[str, str] = {}
    for number, (_, stored) in enumerate(sorted(files.items()), 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        _write(model / name, stored)
        places |= {_name(each.name): name for each in stored}
    write_json(model / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    write_json(model / "config.json", text_config(source))
    for path in sorted({path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}):
        shutil.copyfile(path, model / path.name)


def _name(name: str) -> str:
    """The name in the text model of a checkpoint's tensor; "" for one of images or sound."""
    return next((new + name.removeprefix(old) for old, new in PREFIXES.items() if name.startswith(old)), "")


def _write(path: Path, stored: list[Stored]) -> None:
    kinds = {_name(each.name): each.dtype for each in stored}
    with open_writer(path) as writer:
        writer.write(make_header([(_name(each.name), each.shape) for each in stored], kinds))
        for each in stored:
            for bits in pieces(each):
                writer.write(bits)
        writer.finish()
