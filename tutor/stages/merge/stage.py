"""The merge stage. In: adapter/, base/. Out: merged/ in 16 bits, the base's tokenizer and our chat template.

The weights go from file to file in pieces: W + scale·B·A in fp32, rounded once, bit for bit the rounded result of
PEFT's merge_and_unload(safe_merge=True) on the base in fp32. (PEFT on an FP16 base rounds twice, and differs by up to
one unit in the last place.) A file that a killed run finished is kept. The base is the original or its NF4 round trip,
which training saw: merge.base decides. An adapter of another base and values that the dtype cannot hold are errors.
Does not load a model, and does not measure which base is better.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tutor.artifacts.disk import read_json, read_json_object, write_json
from tutor.artifacts.hashing import HASHES, file_sha256, known_sha256, remember_sha256
from tutor.artifacts.manifest import read_manifest
from tutor.artifacts.stage_folder import RESUME
from tutor.errors import ArtifactError
from tutor.formats.architectures import architecture_of
from tutor.formats.models.model_config import normalised_config
from tutor.formats.models.model_folder import check_model_folder, load_tokenizer, read_facts
from tutor.formats.models.prompt_format import read_format
from tutor.formats.models.safetensors import INDEX, WEIGHTS, WIDTHS, Stored, make_header, read_folder
from tutor.formats.models.tensor_streams import open_writer
from tutor.machine.run_cost import require_disk
from tutor.prompt.format import PromptFormat
from tutor.prompt.served_files import (
    served_generation_config,
    served_model_config,
    served_special_tokens,
    served_tokenizer_config,
)
from tutor.stages.merge.peft_adapter import read_adapter
from tutor.stages.merge.weights import DTYPES, MergedWeights, require_fit

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

COPIED = ("tokenizer.json", "tokenizer.model", "added_tokens.json", "LICENSE*", "NOTICE*")
"""Patterns of files that are copied from the base byte for byte."""
SAFETENSORS_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
"""Names of dtypes: in a recipe -> in safetensors."""
Files = Mapping[Path, Sequence[Stored]]
"""Tensors of each weight file."""


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the merged model folder into `out`; return the base that was used and the changes."""
    facts, base = read_facts(inputs["base"])
    manifest = read_manifest(inputs["train"])
    trained: Mapping[str, Any] = manifest.results if manifest else {}
    if trained.get("base_weights") != facts.weights:
        raise ArtifactError(
            f"{inputs['train']} was trained on other weights ({str(trained.get('base_weights'))[:12]}) than {base} "
            f"({facts.weights[:12]})",
            "run: tutor train",
        )
    check_model_folder(base)  # its files may be in a cache that was cleaned since the base stage ran
    adapter, files = read_adapter(inputs["train"]), read_folder(base)
    tensors = {tensor.name: tensor for stored in files.values() for tensor in stored}
    config = read_json(base / "config.json")
    require_fit(tensors, adapter, config)
    family = architecture_of(config.get("model_type"), str(base))
    dtype = SAFETENSORS_DTYPES[family.merged_dtype if recipe.merge.dtype == "auto" else recipe.merge.dtype]
    _check_disk(files, dtype, out)
    compute_dtype = None
    if recipe.merge.base == "nf4":
        if trained.get("quantization") != "nf4":
            raise ArtifactError(f"merge.base is nf4 and {inputs['train']} was trained on the 16-bit base")
        compute_dtype = DTYPES[SAFETENSORS_DTYPES[trained["precision"]]]
    log.info("merging into the %s base", recipe.merge.base)
    largest = write_shards(MergedWeights(tensors, adapter, dtype, compute_dtype), files, out)
    dtype_name = str(DTYPES[dtype]).removeprefix("torch.")
    copy_other_files(base, out, read_format(recipe, inputs["base"]), dtype=dtype_name, add_bos=facts.add_bos)
    load_tokenizer(out)
    changes = {"layers": len(adapter.deltas), "largest_change": largest}
    return {"base_weights": facts.weights, "dtype": dtype_name, "base": recipe.merge.base, **changes}


def write_shards(merged: MergedWeights, files: Files, out: Path) -> float:
    """Write every weight file of the base to `out`, merged; return the largest change of one weight.

    A file whose hash an earlier run recorded below RESUME is kept when its content still has that hash.
    """
    hashes = out / RESUME / HASHES
    hashes.parent.mkdir(exist_ok=True)
    total = sum(tensor.count * WIDTHS[merged.dtype] for stored in files.values() for tensor in stored)
    done, largest = 0, 0.0
    for path, stored in files.items():
        target, note = out / path.name, out / RESUME / f"{path.name}.json"
        sha256 = known_sha256(target, hashes) if target.exists() else None
        noted = (read_json_object(note) or {}).get("largest_change")
        if sha256 and isinstance(noted, float) and file_sha256(target) == sha256:
            change = noted
            log.info("%s was finished before", path.name)
        else:
            sha256, change = write_shard(merged, stored, target, done, total)
            write_json(note, {"largest_change": change})
            remember_sha256(target, hashes, sha256)
        done += sum(tensor.count * WIDTHS[merged.dtype] for tensor in stored)
        largest = max(largest, change)
    _copy_index(next(iter(files)).parent / INDEX, out / INDEX, total)
    return largest


def write_shard(
    merged: MergedWeights, stored: Sequence[Stored], target: Path, done: int, total: int
) -> tuple[str, float]:
    """Write one file; return its sha256 and the largest change. `done` of `total` bytes were written before."""
    largest = 0.0
    with _threads(1 if merged.nf4 is None else torch.get_num_threads()), open_writer(target) as file:
        file.write(make_header([(tensor.name, tensor.shape) for tensor in stored], merged.dtype))
        for tensor in stored:
            for bits, change in merged.pieces(tensor.name):
                file.write(bits)
                largest = max(largest, change)
                done += bits.nbytes
            progress = {"done": done, "total": total}
            log.info("merged %.1f of %.1f MB", done / 1e6, total / 1e6, extra=progress)
        return file.finish(), largest


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Limit torch to `count` threads. With the threads that hash and write, 1 is faster than 2 on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _copy_index(source: Path, target: Path, total: int) -> None:
    """Copy the index byte for byte when its total size is unchanged, else write it with the new total."""
    if not source.exists():
        return
    index = read_json(source)
    if index.get("metadata", {}).get("total_size") in (None, total):
        shutil.copyfile(source, target)
    else:
        _write(target, {**index, "metadata": {**index["metadata"], "total_size": total}})


def _check_disk(files: Files, dtype: str, out: Path) -> None:
    """Raise HostError when the disk cannot hold the output; the files of an interrupted run count as free space."""
    need = sum(tensor.count * WIDTHS[dtype] for stored in files.values() for tensor in stored)
    written = sum(path.stat().st_size for path in out.glob(WEIGHTS))
    require_disk(out, need - written, "merging")


def copy_other_files(base: Path, out: Path, prompt: PromptFormat, *, dtype: str, add_bos: bool) -> None:
    """Write the configuration with its dtype, the tokenizer files, and the chat template that is served.

    The token that ends an answer is EOS in all of them. The template is in both places where tools read it:
    tokenizer_config.json (llama.cpp, transformers 4) and chat_template.jinja (transformers 5).
    """
    for pattern in COPIED:
        for path in base.glob(pattern):
            shutil.copyfile(path, out / path.name)
    config = normalised_config(read_json(base / "config.json"))
    for name in ("torch_dtype", "_name_or_path"):  # the latter is a path of the machine that saved it
        config.pop(name, None)
    config["dtype"] = dtype
    # transformers 4 and llama.cpp read the older name, transformers 5 reads both.
    config["torch_dtype"] = dtype
    _write(out / "config.json", served_model_config(config, prompt))
    tokenizer_config = read_json(base / "tokenizer_config.json")
    tokenizer_config.pop("name_or_path", None)
    _write(out / "tokenizer_config.json", served_tokenizer_config(tokenizer_config, prompt, add_bos=add_bos))
    (out / "chat_template.jinja").write_text(prompt.chat_template(add_bos=add_bos), "utf-8")
    for name, served in (
        ("special_tokens_map", served_special_tokens),
        ("generation_config", served_generation_config),
    ):
        path = base / f"{name}.json"
        if path.exists() and served(read_json(path), prompt) == read_json(path):
            shutil.copyfile(path, out / path.name)
        elif path.exists():
            _write(out / path.name, served(read_json(path), prompt))


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
