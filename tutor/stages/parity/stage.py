"""The parity stage, a gate: every engine on the way from training to serving gets equal conversations.

In: data/ (held-out rows), base/, adapter/, merged/, gguf/, ladder/. Out: reference.json (the observations of every
engine), parity.json (the hand-offs from engine to engine, and the refusal where one diverges). Does not call Ollama:
that hand-off is compared with reference.json after publishing (tutor/serving/ollama_parity.py).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import read_json, write_json
from tutor.artifacts.layout import gguf_name
from tutor.artifacts.manifest import read_manifest
from tutor.errors import ArtifactError
from tutor.formats.models.model_config import require_equal_lengths
from tutor.formats.models.model_folder import load_tokenizer, read_facts, read_reference
from tutor.formats.models.prompt_format import read_format
from tutor.formats.models.safetensors import WEIGHTS
from tutor.formats.models.served_quantization import served_quantization
from tutor.formats.rows.split_files import HELD_OUT, read_split
from tutor.machine.device import loading_memory
from tutor.machine.host import usable_cores
from tutor.prompt.encoding import adds_bos
from tutor.prompt.format import PromptFormat
from tutor.recipe.quantizations import BF16
from tutor.stages.parity import collect
from tutor.stages.parity.compare import Observation
from tutor.stages.parity.conversations import CONTROL_TEXTS, Conversation, make_conversations
from tutor.stages.parity.gate import SAME_WEIGHTS, HandOff, Kind, hand_off, quantization_tolerance, refusal
from tutor.stages.parity.record import REFERENCE, to_record

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

PARITY = "parity.json"
"""File name of the hand-offs and the refusal."""
ADAPTER = "base + adapter"
"""Name of the adapter on its base, in transformers."""
MERGED = "merged"
"""Name of the merged model, in transformers."""
OVERHEAD_BYTES = 1 << 30
"""Memory beside a model's weights, in bytes: logits over the vocabulary, and the process itself."""


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Run every engine, compare, write the records into `out`; return the hand-offs, and `refused` for a divergence.

    Raises ArtifactError when a folder is missing or damaged, ServiceError when llama-server fails.
    """
    tokenizer = load_tokenizer(inputs["merge"])
    config = read_json(inputs["merge"] / "config.json")
    require_equal_lengths({"generate.context": recipe.generate.context}, config, inputs["merge"])
    prompt = read_format(recipe, inputs["base"])
    conversations = _conversations(tokenizer, recipe, inputs["data"], prompt)
    if read_facts(inputs["base"])[0].check.get("control_texts_differ"):
        log.warning("not compared: a question with the text of a control token, of which llama.cpp makes other ids")
        conversations = tuple(item for item in conversations if item.name != CONTROL_TEXTS)
    served = served_quantization(recipe.ollama.quantization, inputs["ladder"])
    items = [collect.tokenize(tokenizer, conversation, prompt) for conversation in conversations]
    bos = tokenizer.bos_token or "" if prompt.kind == "tutor" or adds_bos(tokenizer) else ""
    threads = usable_cores()
    settings = collect.ServerSettings(recipe.generate.context, threads, out.parent / "parity.log", bos)
    runs: dict[str, collect.GgufRun] = {}
    whole = read_reference(inputs["base"])
    for kind in (whole, *recipe.convert.quantizations):
        gguf = inputs["convert"] / gguf_name("tutor", kind)
        if not gguf.is_file():
            raise ArtifactError(f"{gguf} is missing", "run: tutor convert")
        log.info("running %s in llama.cpp", gguf.name)
        runs[kind] = collect.from_gguf(gguf, items, settings, served=kind == served)
    trained = _in_transformers(inputs, conversations, runs[whole].paths, prompt, loading_memory().available)
    observed = {**trained.observations, **{kind: run.observations for kind, run in runs.items()}}
    write_json(out / REFERENCE, _reference(conversations, observed, served))
    budgets = recipe.parity.budgets
    kinds = (whole, *recipe.convert.quantizations)
    hand_offs = [*_same_weights(observed, trained, whole), *_quantized(observed, kinds, budgets)]
    records = [item.record() for item in hand_offs]
    refused = refusal(hand_offs)
    write_json(out / PARITY, {"hand_offs": records, "refused": refused})
    for item in hand_offs:
        level = logging.INFO if item.state == "same" else logging.WARNING
        log.log(level, "%s -> %s: %s", item.ours, item.theirs, item.state)
    results = {
        "conversations": len(conversations),
        "precision": trained.precision,
        "served": served,
        "hand_offs": records,
    }
    return {**results, "refused": refused} if refused else results


def _conversations(tokenizer: Any, recipe: "Recipe", data: Path, prompt: PromptFormat) -> tuple[Conversation, ...]:
    """The shortest held-out rows, so that the gate costs little, and the fixed conversations."""
    rows = sorted(read_split(data, HELD_OUT), key=_length)
    max_tokens = recipe.generate.context - collect.GREEDY_TOKENS

    def fits(text: str) -> bool:
        return len(tokenizer(text, verbose=False)["input_ids"]) <= max_tokens

    return make_conversations(rows[: recipe.parity.prompts], recipe.system, fits, prompt)


def _length(row: Mapping[str, Any]) -> tuple[int, str, str]:
    history = sum(len(message["content"]) for message in row.get("history", ()))
    return history + len(row["instruction"]) + len(row["response"]), row["instruction"], row["response"]


@dataclass(frozen=True)
class TransformersResult:
    """The observations of transformers, by engine; or `missing`: why transformers did not run."""

    observations: Mapping[str, Sequence[Observation]]
    precision: str | None  # of the computation
    missing: str = ""
    merged: str = ""  # the key of SAME_WEIGHTS for the merge


def _in_transformers(
    inputs: Mapping[str, Path],
    conversations: Sequence[Conversation],
    paths: Mapping[str, Sequence[int]],
    prompt: PromptFormat,
    free: int,
) -> TransformersResult:
    """Observe base + adapter and the merged folder in transformers; both follow the 16-bit file's answers, `paths`."""
    weights = sum(path.stat().st_size for path in inputs["merge"].glob(WEIGHTS))
    precision = transformers_precision(weights, free)
    if precision is None:
        need = (
            f"its 16-bit weights need {(weights + OVERHEAD_BYTES) / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
        )
        log.warning("transformers does not run: %s", need)
        return TransformersResult({}, None, need)
    from tutor.engines.hf import loading

    load = partial(loading.load, precision=precision, prompt=prompt)
    log.info("running %s in transformers (%s)", MERGED, precision)
    engine = load(inputs["merge"], None, quantization="none")
    merged = collect.from_transformers(engine, conversations, paths, own_template=True)
    collect.free_model(engine)
    log.info("running %s in transformers (%s)", ADAPTER, precision)
    engine = load(read_facts(inputs["base"])[1], inputs["train"], quantization="none")
    if nf4_precision := _nf4_precision(inputs["merge"], inputs["train"]):
        collect.quantize_base_to_nf4(engine, nf4_precision)
    trained = collect.from_transformers(engine, conversations, paths, own_template=False)
    collect.free_model(engine)
    in_bf16 = read_json(inputs["merge"] / "config.json").get("dtype") == "bfloat16"
    observations = {ADAPTER: trained, MERGED: merged}
    return TransformersResult(observations, precision, merged=_tolerance(precision, in_bf16=in_bf16))


def transformers_precision(weights: int, free: int) -> str | None:
    """Return the precision in which transformers can compute with `free` bytes of memory; None: it cannot.

    fp32 also where bf16 is faster: bf16's tolerances accept a merge into the other base (docs/parity.md).
    `weights`: size of the 16-bit weights in bytes.
    """
    if 2 * weights + OVERHEAD_BYTES <= free:
        return "fp32"
    return "bf16" if weights + OVERHEAD_BYTES <= free else None


def _nf4_precision(merged: Path, adapter: Path) -> str | None:
    """The precision of 4-bit training where the merge stage used the NF4 base; None: the original base."""
    merge, train = read_manifest(merged), read_manifest(adapter)
    return str(train.results["precision"]) if merge and train and merge.results.get("base") == "nf4" else None


def _reference(
    conversations: Sequence[Conversation], observed: Mapping[str, Sequence[Observation]], served: str
) -> dict[str, Any]:
    engines = {
        engine: [to_record(item, candidates=engine == served) for item in found] for engine, found in observed.items()
    }
    messages = [asdict(item) for item in conversations]
    return {"served": served, "steps": collect.GREEDY_TOKENS, "conversations": messages, "engines": engines}


def _tolerance(precision: str, *, in_bf16: bool) -> str:
    """The key of SAME_WEIGHTS for weights in BF16, or in F16."""
    return "bf16 weights" if in_bf16 and precision == "fp32" else precision


def _same_weights(
    observed: Mapping[str, Sequence[Observation]], trained: TransformersResult, whole: str
) -> list[HandOff]:
    """Base + adapter -> merged -> the 16-bit file `whole`: only rounding may change."""
    chain: tuple[tuple[Kind, str, str], ...] = (("merge", ADAPTER, MERGED), ("convert", MERGED, whole))
    if trained.precision is None:
        return [HandOff(kind, ours, theirs, missing=trained.missing) for kind, ours, theirs in chain]
    # llama.cpp's products with BF16 weights round the activations to BF16.
    converted = _tolerance(trained.precision, in_bf16=whole == BF16)
    limits = {"merge": SAME_WEIGHTS[trained.merged], "convert": SAME_WEIGHTS[converted]}
    return [
        hand_off(kind, (ours, theirs), (observed[ours], observed[theirs]), limits[kind]) for kind, ours, theirs in chain
    ]


def _quantized(
    observed: Mapping[str, Sequence[Observation]], kinds: Sequence[str], budgets: Mapping[str, float]
) -> list[HandOff]:
    """The 16-bit file, the first of `kinds`, -> every quantization: the KL divergence may be up to its budget."""
    whole, *quantizations = kinds
    return [
        hand_off("quantize", (whole, kind), (observed[whole], observed[kind]), quantization_tolerance(budgets[kind]))
        for kind in quantizations
    ]
