"""The merge stage: adapter + base -> merged/ in 16 bits, tokenizer as it was with our chat template in it.

Piece by piece from file to file, W + scale·B·A in fp32, rounded once: bit for bit PEFT's merge_and_unload(safe_merge=
True) of the base in fp32, rounded. (PEFT on an FP16 base rounds twice, and is up to one unit in the last place away.)
A file that a killed run finished is kept. The base is the original, or NF4's round trip of it that training saw: where
that is open, the one that scores better on the held-out pairs. Refuses an adapter of another base, and values that the
type cannot hold. Does not load a model.
"""

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tutor.artifacts.disk import write_json
from tutor.artifacts.hashing import HASHES, file_sha256, known_sha256, remember_sha256
from tutor.artifacts.manifest import read_manifest
from tutor.artifacts.stage_folder import RESUME
from tutor.errors import ArtifactError, HostError
from tutor.formats.models.model_folder import WEIGHTS, load_tokenizer, read_facts, read_json, refuse
from tutor.formats.models.safetensors import WIDTHS, Stored, header, read_folder, writing
from tutor.prompt import Encoded, chat_template, encode
from tutor.stages.merge.peft_adapter import read_adapter
from tutor.stages.merge.weights import TYPES, Merged, refuse_unfit

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

UNTOUCHED = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "LICENSE*", "NOTICE*")
INDEX = "model.safetensors.index.json"
NAMES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
"""The recipe's word for a type -> safetensors'."""
MOST_TOKENS = 8192
"""Tokens of held-out rows that decide between the bases: a larger set tells no more and costs hours on a CPU."""
Files = Mapping[Path, Sequence[Stored]]
Base = Literal["original", "nf4"]


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Write the merged model folder into `out`; into which base and why, how many layers changed and by how much."""
    facts, base = read_facts(inputs["base"])
    manifest = read_manifest(inputs["train"])
    trained: Mapping[str, Any] = manifest.results if manifest else {}
    if trained.get("base_weights") != facts.weights:
        raise ArtifactError(
            f"{inputs['train']} was trained on other weights ({str(trained.get('base_weights'))[:12]}) than {base} "
            f"({facts.weights[:12]})",
            "run: tutor train",
        )
    refuse(base)  # it may lie in a cache that was cleaned since its stage ran
    adapter, files = read_adapter(inputs["train"]), read_folder(base)
    tensors = {tensor.name: tensor for stored in files.values() for tensor in stored}
    refuse_unfit(tensors, adapter, read_json(base / "config.json"))
    dtype = NAMES[recipe.merge.dtype]
    _check_room(files, dtype, out)
    candidates: dict[Base, Merged] = {"original": Merged(tensors, adapter, dtype)}
    if trained.get("quantization") == "nf4":
        candidates["nf4"] = Merged(tensors, adapter, dtype, TYPES[NAMES[trained["precision"]]])
    if recipe.merge.base != "auto":
        if recipe.merge.base not in candidates:
            raise ArtifactError(f"merge.base is nf4 and {inputs['train']} was trained on the 16-bit base")
        candidates = {recipe.merge.base: candidates[recipe.merge.base]}
    rows = _held_out(inputs["data"], base, recipe.system) if len(candidates) > 1 else []
    choice = choose(candidates, base, rows, out / RESUME)
    largest = write_shards(candidates[choice["base"]], files, out)
    copy_rest(base, out, dtype=str(TYPES[dtype]).removeprefix("torch."), add_bos=facts.add_bos)
    load_tokenizer(out)
    changed = {"layers": len(adapter.deltas), "largest_change": largest}
    return {"base_weights": facts.weights, "dtype": str(TYPES[dtype]).removeprefix("torch."), **choice, **changed}


def _held_out(data: Path, base: Path, system: str) -> list[Encoded]:
    """The held-out rows as ids, as many from the first on as MOST_TOKENS allows."""
    rows: list[Encoded] = []
    tokenizer, tokens = load_tokenizer(base), 0
    for line in (data / "held_out.jsonl").read_text("utf-8").split("\n"):
        if line:
            row = json.loads(line)
            encoded = encode(tokenizer, row["instruction"], row["response"], system)
            tokens += len(encoded.ids)
            if rows and tokens > MOST_TOKENS:
                break
            rows.append(encoded)
    return rows


def choose(candidates: Mapping[Base, Merged], base: Path, rows: Sequence[Encoded], notes: Path) -> dict[str, Any]:
    """The base to merge into, with the held-out loss of each where there are several; noted for a resumed run."""
    note = notes / "choice.json"
    if note.exists():
        return read_json(note)
    if len(candidates) == 1 or not rows:
        return {"base": next(iter(candidates))}
    losses = {name: mean_loss(merged, base, rows) for name, merged in candidates.items()}
    best = min(losses, key=losses.__getitem__)
    said = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    log.info("merging into the %s base: held-out loss %s", best, said)
    choice = {
        "base": best,
        "held_out": {"rows": len(rows), "tokens": sum(sum(row.mask) for row in rows), "loss": losses},
    }
    notes.mkdir(exist_ok=True)
    write_json(note, choice)
    return choice


def mean_loss(merged: Merged, base: Path, rows: Sequence[Encoded]) -> float:
    """Mean negative log-likelihood (nats) over all supervised tokens. Raises ArtifactError when it is no number."""
    from tutor.engines.hf.streaming_score import score

    log.info("scoring a merge into the %s base on %d held-out rows", "nf4" if merged.nf4 else "original", len(rows))
    scores = score(base, merged.tensors, [(row.ids[: row.n_prompt], row.ids[row.n_prompt :]) for row in rows])
    loss = -math.fsum(value for row in scores for value in row) / sum(len(row) for row in scores)
    if not math.isfinite(loss):
        raise ArtifactError(f"the held-out loss of the merged model is {loss}", "train again, or fetch the base again")
    return loss


def write_shards(merged: Merged, files: Files, out: Path) -> float:
    """Write every weight file of the base to `out`, merged; the largest change of one weight.

    A file that an earlier run noted below RESUME and that still has the noted content is kept.
    """
    hashes = out / RESUME / HASHES
    hashes.parent.mkdir(exist_ok=True)
    total = sum(tensor.count * WIDTHS[merged.dtype] for stored in files.values() for tensor in stored)
    done, largest = 0, 0.0
    for path, stored in files.items():
        target, note = out / path.name, out / RESUME / f"{path.name}.json"
        sha256 = known_sha256(target, hashes) if target.exists() else None
        if sha256 and note.exists() and file_sha256(target) == sha256:
            change = float(read_json(note)["largest_change"])
            log.info("%s was finished before", path.name)
        else:
            sha256, change = write_shard(merged, stored, target, done, total)
            write_json(note, {"largest_change": change})
            remember_sha256(target, hashes, sha256)
        done += sum(tensor.count * WIDTHS[merged.dtype] for tensor in stored)
        largest = max(largest, change)
    _copy_index(next(iter(files)).parent / INDEX, out / INDEX, total)
    return largest


def write_shard(merged: Merged, stored: Sequence[Stored], target: Path, done: int, total: int) -> tuple[str, float]:
    """Write one file: its sha256, and the largest change. `done` of `total` bytes were written before it."""
    largest = 0.0
    with _threads(1 if merged.nf4 is None else torch.get_num_threads()), writing(target) as file:
        file.write(header([(tensor.name, tensor.shape) for tensor in stored], merged.dtype))
        for tensor in stored:
            for bits, change in merged.pieces(tensor.name):
                file.write(bits)
                largest = max(largest, change)
                done += bits.nbytes
            counted = {"done": done, "total": total}
            log.info("merged %.1f of %.1f MB", done / 1e6, total / 1e6, extra=counted)
        return file.finish(), largest


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many of torch's threads inside. Beside those that hash and write, one is faster than two on two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _copy_index(source: Path, target: Path, total: int) -> None:
    """The index byte for byte where the sizes are the same, else with the new sum."""
    if not source.exists():
        return
    index = read_json(source)
    if index.get("metadata", {}).get("total_size") in (None, total):
        shutil.copyfile(source, target)
    else:
        _write(target, {**index, "metadata": {**index["metadata"], "total_size": total}})


def _check_room(files: Files, dtype: str, out: Path) -> None:
    """Raise HostError before the work when the disk cannot hold it; what an interrupted run left counts as free."""
    need = sum(tensor.count * WIDTHS[dtype] for stored in files.values() for tensor in stored)
    there = sum(path.stat().st_size for path in out.glob(WEIGHTS))
    free = shutil.disk_usage(out).free
    if need > free + there:
        raise HostError(f"{out} has {free / 1e9:.1f} GB free, merging needs {(need - there) / 1e9:.1f} GB", "make room")


def copy_rest(base: Path, out: Path, *, dtype: str, add_bos: bool) -> None:
    """Configuration in its type, tokenizer files byte for byte, and our chat template in place of the base's.

    The template stands in both places where tools look: tokenizer_config.json (llama.cpp, transformers 4) and
    chat_template.jinja (transformers 5).
    """
    for pattern in UNTOUCHED:
        for path in base.glob(pattern):
            shutil.copyfile(path, out / path.name)
    config = read_json(base / "config.json")
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    # transformers 4 and llama.cpp know the older name; transformers 5 reads both.
    config["torch_dtype"] = dtype
    _write(out / "config.json", config)
    template = chat_template(add_bos=add_bos)
    labels = read_json(base / "tokenizer_config.json")
    labels["chat_template"] = template
    _write(out / "tokenizer_config.json", labels)
    (out / "chat_template.jinja").write_text(template, "utf-8")
    if (base / "generation_config.json").exists():
        shutil.copyfile(base / "generation_config.json", out / "generation_config.json")


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
