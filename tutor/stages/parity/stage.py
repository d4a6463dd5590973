"""The parity stage, a gate: every engine on the way from training to serving gets equal conversations.

In: data/ (held-out rows), base/, adapter/, merged/, gguf/, ladder/. Out: reference.json (the observations of every
engine), parity.json (the hand-offs from engine to engine, and the refusal where one diverges). Does not call Ollama:
that hand-off is compared with reference.json after publishing (tutor/serving/ollama_parity.py).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import read_json, write_json
from tutor.artifacts.layout import gguf_name
from tutor.engines.trace import Penalty
from tutor.errors import ArtifactError
from tutor.formats.models.model_config import require_equal_lengths
from tutor.formats.models.model_folder import load_tokenizer, read_facts, read_reference
from tutor.formats.models.prompt_format import read_format
from tutor.formats.models.served_quantization import served_quantization
from tutor.formats.rows.split_files import HELD_OUT, read_split
from tutor.machine.host import usable_cores
from tutor.prompt.encoding import adds_bos
from tutor.prompt.format import PromptFormat
from tutor.recipe.quantizations import BF16
from tutor.stages.parity import collect
from tutor.stages.parity.compare import Observation
from tutor.stages.parity.conversations import CONTROL_TEXTS, Conversation, make_conversations
from tutor.stages.parity.gate import SAME_WEIGHTS, HandOff, Kind, hand_off, quantization_tolerance, refusal
from tutor.stages.parity.in_transformers import ADAPTER, MERGED, TransformersResult, run_transformers
from tutor.stages.parity.record import REFERENCE, to_record

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

PARITY = "parity.json"
"""File name of the hand-offs and the refusal."""


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Run every engine, compare, write the records into `out`; return the hand-offs, and `refused` for a divergence.

    Raises ArtifactError when a folder is missing or damaged, ServiceError when llama-server fails.
    """
    tokenizer = load_tokenizer(inputs["merge"])
    config = read_json(inputs["merge"] / "config.json")
    require_equal_lengths({"generate.context": recipe.generate.context}, config, inputs["merge"])
    prompt = read_format(recipe, inputs["base"])
    conversations = _conversations(tokenizer, recipe, inputs["data"], prompt)
    left_out = []
    if read_facts(inputs["base"])[0].check.get("control_texts_differ"):
        left_out = [CONTROL_TEXTS]
        log.warning("not compared: a question with the text of a control token, of which llama.cpp makes other ids")
        conversations = tuple(item for item in conversations if item.name != CONTROL_TEXTS)
    served = served_quantization(recipe.ollama.quantization, inputs["ladder"])
    items = [collect.tokenize(tokenizer, conversation, prompt) for conversation in conversations]
    bos = tokenizer.bos_token or "" if prompt.kind == "tutor" or adds_bos(tokenizer) else ""
    threads = usable_cores()
    penalty = Penalty(recipe.generate.repetition_penalty, recipe.generate.context)
    settings = collect.ServerSettings(recipe.generate.context, threads, out.parent / "parity.log", bos, penalty)
    runs: dict[str, collect.GgufRun] = {}
    whole = read_reference(inputs["base"])
    for kind in (whole, *recipe.convert.quantizations):
        gguf = inputs["convert"] / gguf_name("tutor", kind)
        if not gguf.is_file():
            raise ArtifactError(f"{gguf} is missing", "run: tutor convert")
        log.info("running %s in llama.cpp", gguf.name)
        runs[kind] = collect.from_gguf(gguf, items, settings, served=kind == served)
    trained = run_transformers(inputs, conversations, runs[whole].paths, prompt, penalty)
    observed = {**trained.observations, **{kind: run.observations for kind, run in runs.items()}}
    write_json(out / REFERENCE, _reference(conversations, observed, served))
    budgets = recipe.parity.budgets
    kinds = (whole, *recipe.convert.quantizations)
    in_bf16 = {MERGED: read_json(inputs["merge"] / "config.json").get("dtype") == "bfloat16", whole: whole == BF16}
    hand_offs = [*_same_weights(observed, trained, whole, in_bf16), *_quantized(observed, kinds, budgets)]
    records = [item.record() for item in hand_offs]
    refused = refusal(hand_offs)
    write_json(out / PARITY, {"hand_offs": records, "refused": refused})
    for item in hand_offs:
        level = logging.INFO if item.state == "same" else logging.WARNING
        log.log(level, "%s -> %s: %s", item.ours, item.theirs, item.state)
    results = {
        "conversations": len(conversations),
        "transformers": trained.way,
        "served": served,
        "left_out": left_out,
        "penalty": {**asdict(penalty), "departs": runs[served].departs},
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


def _reference(
    conversations: Sequence[Conversation], observed: Mapping[str, Sequence[Observation]], served: str
) -> dict[str, Any]:
    engines = {
        engine: [to_record(item, candidates=engine == served) for item in found] for engine, found in observed.items()
    }
    messages = [asdict(item) for item in conversations]
    return {"served": served, "steps": collect.GREEDY_TOKENS, "conversations": messages, "engines": engines}


def _same_weights(
    observed: Mapping[str, Sequence[Observation]], trained: TransformersResult, whole: str, in_bf16: Mapping[str, bool]
) -> list[HandOff]:
    """Base + adapter -> merged -> the 16-bit file `whole`: only rounding may change; `in_bf16`: to BF16."""
    chain: tuple[tuple[Kind, str, str], ...] = (("merge", ADAPTER, MERGED), ("convert", MERGED, whole))
    if trained.way is None:
        return [HandOff(kind, ours, theirs, missing=trained.missing) for kind, ours, theirs in chain]
    limits = {theirs: SAME_WEIGHTS["BF16" if in_bf16[theirs] else "F16"] for _, _, theirs in chain}
    return [
        hand_off(kind, (ours, theirs), (observed[ours], observed[theirs]), limits[theirs])
        for kind, ours, theirs in chain
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
