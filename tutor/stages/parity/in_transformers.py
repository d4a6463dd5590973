"""Collect the observations of transformers: base + adapter, and the merged model, in fp32.

In: the model folders, conversations, the answers of the 16-bit file in llama.cpp. Out: one `Observation` a
conversation and model, or why there is none. A model that does not fit into the memory that is free is read layer by
layer, on the GPU or, where not even a layer fits there, on the CPU. Compares nothing. Imports torch where it runs.
"""

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tutor.artifacts.manifest import read_manifest
from tutor.engines.trace import Penalty
from tutor.formats.models.model_folder import read_facts
from tutor.formats.models.safetensors import WEIGHTS, folder_weights
from tutor.machine.device import DeviceMemory, loading_memory, main_memory
from tutor.prompt.encoding import adds_bos
from tutor.prompt.format import PromptFormat
from tutor.stages.parity.collect import given_answers, tokenize
from tutor.stages.parity.compare import Observation
from tutor.stages.parity.conversations import Conversation

if TYPE_CHECKING:
    from tutor.engines.hf.engine import TransformersEngine
    from tutor.engines.hf.trace import Reader

log = logging.getLogger(__name__)

ADAPTER = "base + adapter"
"""Name of the adapter on its base, in transformers."""
MERGED = "merged"
"""Name of the merged model, in transformers."""
OVERHEAD_BYTES = 1 << 30
"""Memory beside a model's weights, in bytes: logits over the vocabulary, and the process itself."""
Way = Literal["loaded", "GPU, layer by layer", "CPU, layer by layer"]
"""How transformers gets the weights: all at once onto the device that loads models, or layer by layer."""


@dataclass(frozen=True)
class TransformersResult:
    """The observations of transformers, by engine; or `missing`: why transformers did not run."""

    observations: Mapping[str, Sequence[Observation]]
    way: Way | None
    missing: str = ""


def run_transformers(
    inputs: Mapping[str, Path],
    conversations: Sequence[Conversation],
    paths: Mapping[str, Sequence[int]],
    prompt: PromptFormat,
    penalty: Penalty,
) -> TransformersResult:
    """Observe base + adapter and the merged folder in transformers; both follow the 16-bit file's answers, `paths`."""
    weights = sum(path.stat().st_size for path in inputs["merge"].glob(WEIGHTS))
    device, memory = loading_memory(), main_memory()
    way = choose_way(weights, largest_layer(inputs["merge"]), device, memory)
    if way is None:
        need = f"one layer of the model needs {_streamed_bytes(largest_layer(inputs['merge'])) / 1e9:.1f} GB of memory"
        missing = f"{need}, {memory.available / 1e9:.1f} GB are free"
        log.warning("transformers does not run: %s", missing)
        return TransformersResult({}, None, missing)
    folders = {MERGED: (inputs["merge"], None), ADAPTER: (read_facts(inputs["base"])[1], inputs["train"])}
    nf4 = {MERGED: None, ADAPTER: _nf4_precision(inputs["merge"], inputs["train"])}
    found = {}
    for name, (folder, adapter) in folders.items():
        log.info("running %s in transformers (fp32; %s)", name, way)
        with _opened(folder, adapter, nf4[name], prompt, way) as reader:
            found[name] = observe(reader, conversations, paths, penalty, own_template=name == MERGED)
    return TransformersResult(found, way)


def choose_way(weights: int, layer: int, device: DeviceMemory, memory: DeviceMemory) -> Way | None:
    """Return how transformers can compute in fp32; None: in no way.

    `weights`: size of the 16-bit weights in bytes; `layer`: numbers in the largest layer; `device`: what models are
    loaded into; `memory`: main memory. Not in bf16: its tolerances accept a merge into the other base (docs/parity.md).
    """
    if 2 * weights + OVERHEAD_BYTES <= device.available:
        return "loaded"
    if device.gpu and _streamed_bytes(layer) <= device.available:
        return "GPU, layer by layer"
    return "CPU, layer by layer" if _streamed_bytes(layer) <= memory.available else None


def _streamed_bytes(layer: int) -> int:
    """Memory for one layer in fp32, its output, and what is computed of its weights (DoRA, NF4)."""
    return 8 * layer + OVERHEAD_BYTES


def largest_layer(folder: Path) -> int:
    """Return the number of weights in the largest decoder layer of a model folder."""
    counts: dict[str, int] = {}
    for name, tensor in folder_weights(folder).items():
        if ".layers." in name:
            number = name.partition(".layers.")[2].partition(".")[0]
            counts[number] = counts.get(number, 0) + tensor.count
    return max(counts.values(), default=0)


@contextmanager
def _opened(
    folder: Path, adapter: Path | None, nf4_precision: str | None, prompt: PromptFormat, way: Way
) -> "Iterator[Reader]":
    """A model to read, freed at the end. `nf4_precision`: its matrices are those of 4-bit training, in this one."""
    import torch

    if way != "loaded":
        from tutor.engines.hf.streamed_engine import StreamedEngine

        device = torch.device("cuda" if way.startswith("GPU") else "cpu")
        yield StreamedEngine(folder, adapter, prompt=prompt, device=device, nf4_precision=nf4_precision)
        return
    from tutor.engines.hf import loading

    engine = loading.load(folder, adapter, quantization="none", precision="fp32", prompt=prompt)
    if nf4_precision:
        quantize_base_to_nf4(engine, nf4_precision)
    yield engine
    engine.model = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def observe(
    reader: "Reader",
    conversations: Sequence[Conversation],
    paths: Mapping[str, Sequence[int]],
    penalty: Penalty,
    *,
    own_template: bool,
) -> tuple[Observation, ...]:
    """Observe a model.

    `own_template`: the folder's chat template renders the prompts; else the prompt contract does, because the folder of
    a base has another template. `paths`: greedy answers of a GGUF in llama.cpp; this model follows them up to its first
    different token, which is much faster than to generate.
    """
    from tutor.engines.hf import trace

    items = [tokenize(reader.tokenizer, conversation, reader.prompt) for conversation in conversations]
    given = given_answers(items)
    answered = [item for item in items if item.conversation.reach == "everywhere"]
    followed = [trace.Followed(item.ids, paths[item.name], item.penalty(penalty)) for item in answered]
    scores, traces = trace.observe(reader, list(given.values()), followed)
    scored = dict(zip(given, scores, strict=True))
    traced = {item.name: answer for item, answer in zip(answered, traces, strict=True)}
    found = []
    for item in items:
        prompt = own_prompt(reader.tokenizer, item.conversation) if own_template else item.prompt
        seen = scored.get(item.name), traced.get(item.name)
        found.append(Observation(item.name, prompt, item.ids, len(item.ids), *seen))
    return tuple(found)


def own_prompt(tokenizer: Any, conversation: Conversation) -> str:
    """Return a conversation rendered by the folder's chat template, without a BOS that the tokenizer adds."""
    messages = [dict(message) for message in conversation.messages]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return text.removeprefix(tokenizer.bos_token or "") if adds_bos(tokenizer) else text


def quantize_base_to_nf4(engine: "TransformersEngine", precision: str) -> None:
    """Replace the base's weights by those of 4-bit training: to NF4 with double quantization, and back."""
    from tutor.engines.hf.loading import DTYPES
    from tutor.engines.hf.nf4 import whole_round_trip

    for name, weight in engine.model.named_parameters():
        if ".layers." in name and weight.dim() == 2 and "lora_" not in name:
            weight.data.copy_(whole_round_trip(weight.data, DTYPES[precision]))


def _nf4_precision(merged: Path, adapter: Path) -> str | None:
    """The precision of 4-bit training where the merge stage used the NF4 base; None: the original base."""
    merge, train = read_manifest(merged), read_manifest(adapter)
    return str(train.results["precision"]) if merge and train and merge.results.get("base") == "nf4" else None
