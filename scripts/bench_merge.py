"""Our merge beside the plain one (from_pretrained, merge_and_unload, save_pretrained) and beside `cp` of its output.

Random weights of a Llama's shapes and an r=8 adapter of q, k, v and o are made in a scratch folder and removed again.
Each way runs in a process of its own, its input not in memory, and its output is removed before the next begins.
"""

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tutor.engines.tensor_files import header

SIZES = {
    # hidden, intermediate, layers, heads, key-value heads, vocabulary, layers a file
    "8b": (4096, 14336, 32, 32, 8, 128_256, 9),
    "1b": (2048, 8192, 16, 32, 8, 128_256, 6),
    "small": (512, 2048, 4, 8, 4, 32_000, 2),
}
WAYS = ("cp", "plain", "ours")
RANK = 8
POLL = 0.02
"""Seconds between two looks at a process's anonymous memory, whose peak the kernel does not keep."""


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", choices=SIZES, default="8b", help="8b needs 33 GB of disk and, for plain, 22 GB of memory"
    )
    parser.add_argument(
        "--layers", type=int, help="fewer than the size has, where the disk is small: time shrinks, memory not"
    )
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where the scratch folder is made")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        way, *folders = given.work
        work(way, *map(Path, folders))
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=given.folder) as scratch:
        found = bench(given.size, given.layers, given.ways, Path(scratch))
    print(json.dumps(found, indent=1) if given.json else table(found))


def bench(size: str, layers: int | None, ways: list[str], scratch: Path) -> dict[str, Any]:
    """The figures of each way, each against cp."""
    base, adapter = scratch / "base", scratch / "adapter"
    shape = list(SIZES[size])
    shape[2] = layers or shape[2]
    make_base(base, *shape)
    make_adapter(adapter, *shape)
    found = {way: measure(way, base, adapter, scratch / "out") for way in ways}
    for figures in found.values():
        if "cp" in found:
            figures["times_cp"] = round(figures["work_s"] / found["cp"]["work_s"], 2)
            figures["times_cp_synced"] = round(figures["synced_s"] / found["cp"]["synced_s"], 2)
    bytes_ = sum(path.stat().st_size for path in base.iterdir())
    return {
        "size": size,
        "layers": shape[2],
        "gigabytes": round(bytes_ / 1e9, 2),
        "cores": len(os.sched_getaffinity(0)),
        "ways": found,
    }


def shapes(
    hidden: int, inner: int, layers: int, heads: int, shared: int, words: int
) -> Iterator[tuple[str, list[int]]]:
    """Names and shapes, layer by layer; embedding first, head last."""
    narrow = hidden // heads * shared
    yield "model.embed_tokens.weight", [words, hidden]
    for layer in range(layers):
        parts = {
            "input_layernorm": [hidden],
            "mlp.down_proj": [hidden, inner],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "post_attention_layernorm": [hidden],
            "self_attn.k_proj": [narrow, hidden],
            "self_attn.o_proj": [hidden, hidden],
            "self_attn.q_proj": [hidden, hidden],
            "self_attn.v_proj": [narrow, hidden],
        }
        for part, shape in parts.items():
            yield f"model.layers.{layer}.{part}.weight", shape
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [words, hidden]


def make_base(folder: Path, *size: int) -> None:
    """A model folder in bf16, its numbers of the magnitudes that trained weights have."""
    hidden, inner, layers, heads, shared, words, per_file = size
    folder.mkdir()
    random = np.random.default_rng(0)
    # Sign, two bits of exponent and the mantissa at random: 0.008 to 0.25.
    block = random.integers(0, 1 << 16, 1 << 25, dtype=np.uint16) & 0x81FF | 0x3C00
    groups: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes(hidden, inner, layers, heads, shared, words):
        layer = int(name.split(".")[2]) if ".layers." in name else layers if "embed" not in name else 0
        groups.setdefault(min(layer, layers - 1) // per_file, []).append((name, tuple(shape)))
    where = {}
    for number, tensors in groups.items():
        file = f"model-{number + 1:05}-of-{len(groups):05}.safetensors"
        with (folder / file).open("wb") as out:
            out.write(header(tensors, "BF16"))
            for name, shape in tensors:
                where[name] = file
                for left in range(prod(shape), 0, -len(block)):
                    out.write(block[: min(left, len(block))].data)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": shared, "vocab_size": words, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}), "utf-8")


def make_adapter(folder: Path, *size: int) -> None:
    """A PEFT adapter of q, k, v and o."""
    random, tensors = np.random.default_rng(1), {}
    for name, shape in shapes(*size[:-1]):
        if "self_attn" in name:
            start = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{start}.lora_A.weight"] = random.normal(0, 0.02, (RANK, shape[1])).astype(np.float32)
            tensors[f"{start}.lora_B.weight"] = random.normal(0, 0.02, (shape[0], RANK)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")


def measure(way: str, base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """Seconds of the process, of the work alone, and until all is on the disk; peaks of its memory in MB."""
    os.sync()
    for path in base.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command: list[str | Path] = ["cp", "-r", base, out]
    if way != "cp":
        command = [sys.executable, Path(__file__), "--work", way, base, adapter, out]
    started, anonymous = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        anonymous = max(anonymous, _status(process.pid).get("RssAnon", 0))
        time.sleep(POLL)
    seconds = time.monotonic() - started
    os.sync()
    synced = time.monotonic() - started
    said, complaint = process.communicate()
    if process.returncode:
        sys.exit(f"{way} failed with {process.returncode}:\n{complaint[-2000:]}")
    shutil.rmtree(out)
    inside = json.loads(said.splitlines()[-1]) if said else {"work_s": seconds, "peak_rss_mb": 0}
    before = seconds - inside.get("sealed_s", inside["work_s"])  # start and imports
    return {
        "process_s": round(seconds, 1),
        "work_s": round(inside["work_s"], 2),
        "synced_s": round(synced - before, 2),
        "peak_rss_mb": round(inside["peak_rss_mb"]),
        "imported_rss_mb": round(inside.get("imported_rss_mb", 0)),
        "peak_anonymous_mb": round(anonymous / 1024),
    }


def _status(pid: int) -> dict[str, int]:
    """The lines of /proc/PID/status that are sizes, in KB."""
    with contextlib.suppress(OSError):
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {words[0][:-1]: int(words[1]) for words in lines if words[-1] == "kB"}
    return {}


def work(way: str, base: Path, adapter: Path, out: Path) -> None:
    """One merge in this process; its figures as JSON on stdout."""
    merge = plain if way == "plain" else ours
    print(json.dumps(merge(base, adapter, out)))


def plain(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """As PEFT's documentation has it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    imported, started = _peak(), time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return {"work_s": time.monotonic() - started, "imported_rss_mb": imported, "peak_rss_mb": _peak()}


def ours(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """As the merge stage does it, hashes and manifest included; the folder is synced as every stage's is."""
    from tutor import artifacts
    from tutor.engines.lora import read_adapter
    from tutor.engines.merging import Merged
    from tutor.engines.tensor_files import read_folder
    from tutor.stages.merge import write_shards

    imported, started = _peak(), time.monotonic()
    with artifacts.writing(out, "merge", {}, resume=True) as (scratch, _):
        files = read_folder(base)
        tensors = {tensor.name: tensor for stored in files.values() for tensor in stored}
        write_shards(Merged(tensors, read_adapter(adapter), "F16"), files, scratch)
        merged = time.monotonic() - started
    sealed = time.monotonic() - started
    return {"work_s": merged, "sealed_s": sealed, "imported_rss_mb": imported, "peak_rss_mb": _peak()}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{found['size']}, {found['layers']} layers: {found['gigabytes']} GB, {found['cores']} cores",
        "",
        "| way | work | x cp | on the disk | x cp | process | peak RSS | of it by imports | peak anonymous |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way, row in found["ways"].items():
        lines.append(
            f"| {way} | {row['work_s']} s | {row.get('times_cp', '')} | {row['synced_s']} s "
            f"| {row.get('times_cp_synced', '')} | {row['process_s']} s | {row['peak_rss_mb']} MB "
            f"| {row['imported_rss_mb']} MB | {row['peak_anonymous_mb']} MB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
