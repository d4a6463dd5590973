"""The parity stage, a gate: the same conversations through every engine that the model passes on its way.

In: data/ (held-out rows), base/, adapter/, merged/, gguf/. Out: reference.json (what each engine made of the
conversations; first of all what was trained), parity.json (the hand-overs from engine to engine, and the verdict).
Asks no Ollama: that hand-over is compared after publishing, with this record (parity_ollama.py).
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import write_json
from tutor.artifacts.layout import gguf_name
from tutor.artifacts.manifest import read_manifest
from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import WEIGHTS, load_tokenizer, read_facts, read_json
from tutor.formats.models.served_quantization import served_quantization
from tutor.stages.parity import collect
from tutor.stages.parity.compare import Seen
from tutor.stages.parity.conversations import Conversation, conversations
from tutor.stages.parity.gate import SAME_WEIGHTS, HandOver, Kind, budget, hand_over, refusal
from tutor.stages.parity.record import REFERENCE, to_record

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

PARITY = "parity.json"
ADAPTER, MERGED, F16 = "base + adapter", "merged", "F16"
SPARE = 1 << 30
"""Bytes of memory beside a model's weights: a vocabulary of logits, and what the process has already."""


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Ask, compare and record into `out`; the hand-overs with their figures, and `refused` where one diverges.

    Raises ArtifactError when a folder is missing or damaged, ServiceError when llama-server fails.
    """
    tokenizer = load_tokenizer(inputs["merge"])
    asked = _conversations(tokenizer, recipe, inputs["data"])
    trained = _in_transformers(inputs, asked, free_memory())
    served = served_quantization(recipe.ollama.quantization, inputs["ladder"])
    reads = [collect.read(tokenizer, conversation) for conversation in asked]
    bos = tokenizer.bos_token or ""
    serving = collect.Serving(recipe.generate.context, len(os.sched_getaffinity(0)), out.parent / "parity.log", bos)
    seen = dict(trained.seen)
    for kind in (F16, *recipe.convert.quantizations):
        gguf = inputs["convert"] / gguf_name("tutor", kind)
        if not gguf.is_file():
            raise ArtifactError(f"{gguf} is missing", "run: tutor convert")
        log.info("asking %s", gguf.name)
        seen[kind] = collect.from_gguf(gguf, reads, serving, served=kind == served)
    write_json(out / REFERENCE, _reference(asked, seen, served))
    hand_overs = [*_same_weights(seen, trained), *_quantized(seen, recipe.convert.quantizations, recipe.parity.budgets)]
    records = [item.record() for item in hand_overs]
    refused = refusal(hand_overs)
    write_json(out / PARITY, {"hand_overs": records, "refused": refused})
    for item in hand_overs:
        level = logging.INFO if item.state == "same" else logging.WARNING
        log.log(level, "%s -> %s: %s", item.ours, item.theirs, item.state)
    results = {"conversations": len(asked), "precision": trained.precision, "served": served, "hand_overs": records}
    return {**results, "refused": refused} if refused else results


def _conversations(tokenizer: Any, recipe: "Recipe", data: Path) -> tuple[Conversation, ...]:
    """The recipe's conversations: its shortest held-out rows, so that the gate costs little, and the fixed ones."""
    path = data / "held_out.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", "run: tutor data split") from None
    pairs = sorted(
        ((row["instruction"], row["response"]) for row in rows), key=lambda pair: (sum(map(len, pair)), pair)
    )
    room = recipe.generate.context - collect.STEPS

    def fits(prompt: str) -> bool:
        return len(tokenizer(prompt, verbose=False)["input_ids"]) <= room

    return conversations(pairs[: recipe.parity.prompts], recipe.system, fits)


@dataclass(frozen=True)
class Trained:
    """What transformers made of the conversations, by engine; or `missing`, why it was not asked."""

    seen: Mapping[str, Sequence[Seen]]
    precision: str | None  # in which it computed
    missing: str = ""
    kept: str = ""  # the coarser one of that precision and of what the merged weights are stored in


def _in_transformers(inputs: Mapping[str, Path], asked: Sequence[Conversation], free: int) -> Trained:
    """Base and adapter, and the merged folder: what was trained, before llama.cpp has any part in it.

    The merged model answers by itself, base and adapter are held against its answers: they are slower.
    """
    weights = sum(path.stat().st_size for path in inputs["merge"].glob(WEIGHTS))
    precision = fitting(weights, free)
    if precision is None:
        need = f"its 16-bit weights need {(weights + SPARE) / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        log.warning("transformers is not asked: %s", need)
        return Trained({}, None, need)
    from tutor.engines.hf import loading

    load = partial(loading.load, precision=precision)
    log.info("asking %s in transformers (%s)", MERGED, precision)
    engine = load(inputs["merge"], None, quantization="none")
    merged = collect.from_transformers(engine, asked, own_template=True)
    collect.let_go(engine)
    log.info("asking %s in transformers (%s)", ADAPTER, precision)
    engine = load(read_facts(inputs["base"])[1], inputs["train"], quantization="none")
    if seen_as := _seen_as(inputs["merge"], inputs["train"]):
        collect.to_nf4_and_back(engine, seen_as)
    trained = collect.from_transformers(engine, asked, paths=merged.paths, own_template=False)
    collect.let_go(engine)
    in_bf16 = read_json(inputs["merge"] / "config.json").get("dtype") == "bfloat16"
    return Trained({ADAPTER: trained.seen, MERGED: merged.seen}, precision, kept="bf16" if in_bf16 else precision)


def fitting(weights: int, free: int) -> str | None:
    """What transformers can compute in where so many bytes of 16-bit weights meet so much free memory, if at all."""
    if 2 * weights + SPARE <= free:
        return "fp32"
    return "bf16" if weights + SPARE <= free else None


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that a model may take: of the first GPU where there is one, else of this machine and its container."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    lines = (root / "proc/meminfo").read_text("ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = root / "sys/fs/cgroup"  # a container sees its own there
    try:
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no limit, which is the word "max"
        return free


def _seen_as(merged: Path, adapter: Path) -> str | None:
    """The precision in which 4-bit training saw the base, where the merge stage took the base so; None: as it is."""
    merge, train = read_manifest(merged), read_manifest(adapter)
    return str(train.results["precision"]) if merge and train and merge.results.get("base") == "nf4" else None


def _reference(asked: Sequence[Conversation], seen: Mapping[str, Sequence[Seen]], served: str) -> dict[str, Any]:
    engines = {
        engine: [to_record(item, candidates=engine == served) for item in found] for engine, found in seen.items()
    }
    talks = [asdict(item) for item in asked]
    return {"served": served, "steps": collect.STEPS, "conversations": talks, "engines": engines}


def _same_weights(seen: Mapping[str, Sequence[Seen]], trained: Trained) -> list[HandOver]:
    """Base and adapter -> merged -> F16: nothing may change but the last bits."""
    chain: tuple[tuple[Kind, str, str], ...] = (("merge", ADAPTER, MERGED), ("convert", MERGED, F16))
    if trained.precision is None:
        return [HandOver(kind, ours, theirs, missing=trained.missing) for kind, ours, theirs in chain]
    limits = {"merge": SAME_WEIGHTS[trained.kept], "convert": SAME_WEIGHTS[trained.precision]}
    return [hand_over(kind, (ours, theirs), (seen[ours], seen[theirs]), limits[kind]) for kind, ours, theirs in chain]


def _quantized(
    seen: Mapping[str, Sequence[Seen]], kinds: Sequence[str], budgets: Mapping[str, float]
) -> list[HandOver]:
    """F16 -> every quantization: no more may be lost than its budget allows."""
    return [hand_over("quantize", (F16, kind), (seen[F16], seen[kind]), budget(budgets[kind])) for kind in kinds]
