"""Convert a LoRA adapter to GGUF with the pinned llama.cpp's converter; check its shapes and its numbers.

In: PEFT's adapter folder, the base's 16-bit folder and its GGUF. Out: one GGUF for Ollama's ADAPTER or llama-server's
--lora (Ollama's own conversion of safetensors adapters scrambles q and k). Merges nothing.
"""

import contextlib
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json, write_json
from tutor.engines.llamacpp.build import SOURCE
from tutor.engines.llamacpp.process import OFFLINE, Command, partial_path, program_error, programs, write_file
from tutor.errors import ArtifactError, HostError
from tutor.formats.architectures import architecture_of
from tutor.formats.models.gguf import Gguf, read_gguf
from tutor.formats.models.gguf_weights import adapter_weights_of, check_exact

log = logging.getLogger(__name__)

UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "alpha_pattern",
    "rank_pattern",
    "modules_to_save",
)
"""PEFT settings that a GGUF adapter cannot represent: it has one alpha, and pairs of matrices."""
PAIR_SUFFIXES = (".lora_a", ".lora_b")
"""Ends of the names of the two matrices of a pair."""
WEIGHTS = "adapter_model.safetensors"
"""Name of the file of an adapter's matrices."""
TENSOR_TYPES = ("F16", "F32")
"""Accepted types of an adapter's tensors; quantization would lose too much of so small a file."""


def lora_to_gguf(
    adapter: Path, base_model: Path, base_gguf: Path, target: Path, metadata: Mapping[str, str] | None = None
) -> int:
    """Write an adapter's GGUF, completely or not at all; return the number of matrices that it changes.

    `base_gguf` is the file that the adapter will be loaded with, `metadata` are additional key-values. An rsLoRA is
    written with the alpha of a LoRA that changes the base equally: llama.cpp scales by alpha / rank. Raises
    ArtifactError when the adapter cannot be converted or does not fit the base, HostError when the converter lacks a
    package.
    """
    config = read_json(adapter / "adapter_config.json")
    if used := [name for name in UNSUPPORTED if config.get(name)]:
        raise ArtifactError(
            f"{adapter} uses {used[0]}, which a GGUF adapter cannot represent", "serve the merged model"
        )
    family = architecture_of(read_json(base_model / "config.json").get("model_type"), str(base_model))
    kind = "f32" if family.wide else "f16"  # products with F16 weights round activations to F16
    made = target.with_name(f"{target.name}.unchecked")
    start = (sys.executable, SOURCE / "convert_lora.py", programs().folder, json.dumps(dict(metadata or {})))
    end: Command = ["--base", base_model, "--outfile", partial_path(made), "--outtype", kind]
    try:
        with _as_lora(adapter, config) as (folder, alpha):
            code, output = write_file(made, [*start, folder, *end], OFFLINE)
        if code:
            line = output.rpartition("\n")[2] or f"exit code {code}"
            if "ModuleNotFoundError" in line:
                raise HostError(f"cannot convert {adapter}: {line}", "make install")
            raise program_error(f"cannot convert {adapter}", code, output, line)
        pairs = check_adapter(made, base_gguf)
        if not math.isclose(found := read_gguf(made).fields["adapter.lora.alpha"], alpha, rel_tol=1e-6):
            raise ArtifactError(f"{target} has alpha {found:g}, and {adapter} {alpha:g}", "convert it again")
        if lines := check_exact(made, read_gguf(made), adapter_weights_of(adapter, base_model)):
            raise ArtifactError(f"{target} differs from {adapter}: {lines[0]}", "convert it again")
        made.replace(target)
    finally:
        made.unlink(missing_ok=True)
    log.info("%s changes %d matrices of %s", target.name, pairs, base_gguf.name)
    return pairs


@contextlib.contextmanager
def _as_lora(adapter: Path, config: Mapping[str, Any]) -> Iterator[tuple[Path, float]]:
    """Give folder and alpha of a plain LoRA with an adapter's matrices and scale; the adapter's own unless rsLoRA.

    The converter copies lora_alpha, whatever use_rslora says.
    """
    if not config.get("use_rslora"):
        yield adapter, config["lora_alpha"]
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / adapter.name
        folder.mkdir()
        alpha = config["lora_alpha"] * math.sqrt(config["r"])
        write_json(folder / "adapter_config.json", {**config, "lora_alpha": alpha, "use_rslora": False})
        (folder / WEIGHTS).symlink_to((adapter / WEIGHTS).resolve())
        yield folder, alpha


def check_adapter(adapter: Path, base: Path) -> int:
    """Number of matrices of `base` that an adapter changes. Raises ArtifactError when it is no LoRA of `base`.

    Ollama does not check this: it loads a file without general.type as a model, and fails at the first answer.
    """
    lora, model = read_gguf(adapter), read_gguf(base)
    problems = _fields(lora, model) + _tensors(lora, model)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ArtifactError(f"{adapter} is no LoRA of {base}: {problems[0]}{more}", "convert both from the same base")
    return len(lora.tensors) // 2


def _fields(lora: Gguf, model: Gguf) -> list[str]:
    """Problems of the metadata."""
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
    """Problems of the pairs: A maps a row of the base's matrix to the rank, B maps the rank to a column."""
    names = {name.removesuffix(end) for name in lora.tensors for end in PAIR_SUFFIXES if name.endswith(end)}
    problems = [f"{name} is no half of a pair" for name in lora.tensors if not name.endswith(PAIR_SUFFIXES)]
    if not names:
        problems.append("it holds no pair of matrices")
    for name in sorted(names):
        first, second = (lora.tensors.get(name + end) for end in PAIR_SUFFIXES)
        base = model.tensors.get(name)
        if first is None or second is None:
            problems.append(f"{name} has only one of {' and '.join(PAIR_SUFFIXES)}")
        elif base is None:
            problems.append(f"the base has no {name}")
        else:
            found = (*first.shape, *second.shape)
            rank = first.shape[-1]
            if found != (base.shape[0], rank, rank, base.shape[-1]):
                problems.append(f"{name} has the shapes {first.shape} and {second.shape} for {base.shape}")
            problems += [
                f"{name} has a half of type {half.kind}" for half in (first, second) if half.kind not in TENSOR_TYPES
            ]
    return problems
