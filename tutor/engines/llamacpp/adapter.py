"""A LoRA adapter as a GGUF file, by the pinned llama.cpp's own converter, checked against its base and for its numbers.

In: PEFT's adapter folder, the base's 16-bit folder and its GGUF. Out: one GGUF for Ollama's ADAPTER or llama-server's
--lora. Never Ollama's conversion of safetensors adapters, which scrambles q and k. Merges nothing.
"""

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from tutor.engines.llamacpp.build import SOURCE
from tutor.engines.llamacpp.process import OFFLINE, Command, fault, partial_of, programs, write_file
from tutor.errors import ArtifactError, HostError
from tutor.formats.models.gguf import Gguf, read_gguf
from tutor.formats.models.gguf_weights import adapter_weights_of, check_exact
from tutor.formats.models.model_folder import read_json

log = logging.getLogger(__name__)

UNKNOWN = ("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "alpha_pattern", "rank_pattern", "modules_to_save")
"""PEFT's settings for which a GGUF adapter, which knows one alpha and pairs of matrices, has no place."""
ENDS = (".lora_a", ".lora_b")
KINDS = ("F16", "F32")
"""Of an adapter's tensors: a quantized one would lose more than the file is worth."""


def lora_to_gguf(
    adapter: Path, base_model: Path, base_gguf: Path, target: Path, says: Mapping[str, str] | None = None
) -> int:
    """Write an adapter's F16 GGUF, whole or not at all: how many matrices it changes.

    `base_gguf` is the file that it will be loaded with, `says` are key-values to be in the adapter's. Raises
    ArtifactError when the adapter cannot be converted or does not fit it, HostError when this machine lacks what the
    converter needs.
    """
    config = read_json(adapter / "adapter_config.json")
    if used := [name for name in UNKNOWN if config.get(name)]:
        raise ArtifactError(f"{adapter} uses {used[0]}, which a GGUF adapter cannot say", "serve the merged model")
    made = target.with_name(f"{target.name}.unchecked")
    start = (sys.executable, SOURCE / "convert_lora.py", programs().folder, json.dumps(dict(says or {})))
    command: Command = [*start, adapter, "--base", base_model, "--outfile", partial_of(made), "--outtype", "f16"]
    try:
        code, output = write_file(made, command, OFFLINE)
        if code:
            line = output.rpartition("\n")[2] or f"exit code {code}"
            if "ModuleNotFoundError" in line:
                raise HostError(f"cannot convert {adapter}: {line}", "make install")
            raise fault(f"cannot convert {adapter}", code, output, line)
        pairs = check_adapter(made, base_gguf)
        if lines := check_exact(made, read_gguf(made), adapter_weights_of(adapter, base_model)):
            raise ArtifactError(f"{target} is not what {adapter} holds: {lines[0]}", "convert it again")
        made.replace(target)
    finally:
        made.unlink(missing_ok=True)
    log.info("%s changes %d matrices of %s", target.name, pairs, base_gguf.name)
    return pairs


def check_adapter(adapter: Path, base: Path) -> int:
    """How many matrices of `base` an adapter changes. Raises ArtifactError where one is no LoRA of the other.

    Ollama checks nothing of it: it takes a file without general.type for a whole model, and finds out at the first
    answer.
    """
    lora, model = read_gguf(adapter), read_gguf(base)
    problems = _fields(lora, model) + _tensors(lora, model)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArtifactError(f"{adapter} is no LoRA of {base}: {problems[0]}{more}", "convert both from the same base")
    return len(lora.tensors) // 2


def _fields(lora: Gguf, model: Gguf) -> list[str]:
    architecture = model.fields.get("general.architecture")
    expected = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": architecture}
    problems = [
        f"{name} is {lora.fields.get(name)!r} instead of {value!r}"
        for name, value in expected.items()
        if lora.fields.get(name) != value
    ]
    alpha = lora.fields.get("adapter.lora.alpha")
    if not isinstance(alpha, float) or not math.isfinite(alpha) or alpha <= 0:
        problems.append(f"adapter.lora.alpha is {alpha!r}")
    return problems


def _tensors(lora: Gguf, model: Gguf) -> list[str]:
    """What is wrong with the pairs: A takes a row of the base's matrix to the rank, B the rank to a column."""
    names = {name.removesuffix(end) for name in lora.tensors for end in ENDS if name.endswith(end)}
    problems = [f"{name} is no half of a pair" for name in lora.tensors if not name.endswith(ENDS)]
    if not names:
        problems.append("it holds no pair of matrices")
    for name in sorted(names):
        first, second = (lora.tensors.get(name + end) for end in ENDS)
        base = model.tensors.get(name)
        if first is None or second is None:
            problems.append(f"{name} has only one of {' and '.join(ENDS)}")
        elif base is None:
            problems.append(f"the base has no {name}")
        else:
            found = (*first.shape, *second.shape)
            rank = first.shape[-1]
            if found != (base.shape[0], rank, rank, base.shape[-1]):
                problems.append(f"{name} has the shapes {first.shape} and {second.shape} for {base.shape}")
            problems += [f"{name} has a half of type {half.kind}" for half in (first, second) if half.kind not in KINDS]
    return problems
