"""Compare merging and converting with the plain way and with `cp`, on random weights in a Llama's shapes.

    .venv/bin/python scripts/bench_merge.py [--size 8b|1b|small] [--parts merge convert] [--ways cp plain ours]

`plain` merges as PEFT's documentation does, and converts with llama.cpp's own script. `ours` is the work of the two
stages, checks, hashes and manifest included. Each runs in a process of its own, with its input out of the page cache,
and its output is removed before the next one starts: the disk holds the model twice, in a scratch folder that is always
removed, except after SIGKILL. Prints a table. 8b needs 33 GB of disk and, for the plain merge, 22 GB of memory.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from random_llama import SIZES, Size, make_adapter, make_base, make_model, take_tokenizer

PARTS = {"merge": "BF16", "convert": "F16"}
"""The measured parts, and the dtype of their input weights."""
WAYS = ("cp", "plain", "ours")
POLL = 0.02
"""Interval in seconds at which the memory of a process and its children is read."""
SPARE = 1.2e9
"""Disk space in bytes besides the two models: the adapter, and the demo's base, whose tokenizer is used."""


def main() -> None:
    """Measure and print a table for each part."""
    options = arguments()
    if options.work:
        work(*options.work)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch folder is removed
    size = SIZES[options.size]
    size = replace(size, layers=options.layers or size.layers)
    options.folder.mkdir(parents=True, exist_ok=True)
    refuse_small_disk(options.folder, size)
    found = {"size": options.size, "layers": size.layers, "gigabytes": round(2 * size.weights / 1e9, 2)}
    found |= {"cores": len(os.sched_getaffinity(0)), "parts": {}}
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=options.folder) as scratch:
        for part in options.parts:
            found["parts"][part] = ways = {}
            for way, figures in bench(part, options.ways, size, Path(scratch), options.base):
                ways[way] = figures
                compare(ways)
                print(f"{part}, {way}:", *(f"{name} {shown(name, figures)}" for name in figures), file=sys.stderr)
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(table(found))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument(
        "--layers", type=int, help="fewer layers than the size has, for less time and disk; the memory of `ours` stays"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="`cp ours` omits the plain way")
    parser.add_argument("--folder", type=Path, default=Path("build"), help="parent of the scratch folder")
    parser.add_argument(
        "--base", type=Path, help="a base stage's folder with a tokenizer (default: the demo's is made)"
    )
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def refuse_small_disk(folder: Path, size: Size) -> None:
    """Exit with the needed space when the disk cannot hold the model twice; list scratch folders of killed runs."""
    for other in folder.glob("bench-merge-*"):
        print(f"{other} is of a run that was killed, or of one that still runs", file=sys.stderr)
    need, free = 4 * size.weights + SPARE, shutil.disk_usage(folder).free
    if need > free:
        sys.exit(
            f"{folder} has {free / 1e9:.1f} GB free, this needs {need / 1e9:.1f}: free disk space, or give --layers"
        )


def bench(
    part: str, ways: Sequence[str], size: Size, scratch: Path, base: Path | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the figures of each way when they are measured, and remove the input afterwards."""
    model, extra, out = scratch / "model", scratch / "extra", scratch / "out"
    make_model(model, size, PARTS[part])
    if part == "merge":
        make_adapter(extra, size)
    else:
        extra.mkdir()
        if base is None:
            # In another process, so that this one stays small: a child's memory includes its parent's at the start.
            base = scratch / "base"
            made: list[str | Path] = [sys.executable, __file__, "--work", "base", model, extra, base]
            subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        take_tokenizer(base, model, extra / "facts.json")
    for way in ways:
        command: list[str | Path] = [sys.executable, __file__, "--work", f"{part}-{way}", model, extra, out]
        if way == "cp":
            command = ["cp", "-r", "--reflink=never", model, out]
        yield way, measure(command, model, out)
    shutil.rmtree(model)
    shutil.rmtree(extra)


def measure(command: Sequence[str | Path], model: Path, out: Path) -> dict[str, float]:
    """Run a command; return its times in seconds (work, checks, until synced, process) and memory peaks in MB."""
    os.sync()
    for path in model.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started, anonymous, resident = time.monotonic(), 0, 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        while process.poll() is None:
            seen = [status(pid) for pid in family(process.pid)]
            anonymous = max(anonymous, sum(each.get("RssAnon", 0) for each in seen))
            resident = max(resident, sum(each.get("VmRSS", 0) for each in seen))
            resident = max([resident, *(each.get("VmHWM", 0) for each in seen)])
            time.sleep(POLL)
        seconds = time.monotonic() - started
        os.sync()
        synced = time.monotonic() - started
        output, _ = process.communicate()
    finally:
        process.kill()
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    shutil.rmtree(out)
    inside = json.loads(output.splitlines()[-1]) if output else {"work_s": seconds}
    checked = inside.get("checked_s", inside["work_s"])
    return {
        "work_s": inside["work_s"],
        "checked_s": checked,
        "synced_s": synced - (seconds - checked),
        "process_s": seconds,
        "peak_rss_mb": max(resident / 1024, inside.get("peak_rss_mb", 0.0)),
        "imported_rss_mb": inside.get("imported_rss_mb", 0.0),
        "peak_anonymous_mb": anonymous / 1024,
    }


def family(pid: int) -> list[int]:
    """Return a process and its running descendants."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def status(pid: int) -> dict[str, int]:
    """Return the sizes in /proc/PID/status, in KB."""
    with contextlib.suppress(OSError):
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {words[0][:-1]: int(words[1]) for words in lines if words[-1] == "kB"}
    return {}


def merge_plain(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Merge as PEFT's documentation does."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    imported, started = peak(), time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    return {"work_s": time.monotonic() - started, "imported_rss_mb": imported}


def merge_ours(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Merge as the merge stage does, hashes, manifest and sync included."""
    from tutor.artifacts.stage_folder import writing
    from tutor.formats.models.safetensors import read_folder
    from tutor.stages.merge.peft_adapter import read_adapter
    from tutor.stages.merge.stage import write_shards
    from tutor.stages.merge.weights import MergedWeights

    imported, started = peak(), time.monotonic()
    with writing(out, "merge", {}, resume=True) as (scratch, _):
        files = read_folder(base)
        tensors = {tensor.name: tensor for stored in files.values() for tensor in stored}
        write_shards(MergedWeights(tensors, read_adapter(adapter), "F16"), files, scratch)
        merged = time.monotonic() - started
    return {"work_s": merged, "checked_s": time.monotonic() - started, "imported_rss_mb": imported}


def convert_plain(model: Path, _: Path, out: Path) -> dict[str, float]:
    """Convert with llama.cpp's script, as its README does."""
    from tutor.engines.llamacpp.process import OFFLINE, programs

    out.mkdir()
    command: list[str | Path] = [sys.executable, programs().folder / "convert_hf_to_gguf.py", model]
    started = time.monotonic()
    subprocess.run(
        [*command, "--outtype", "f16", "--outfile", out / "plain.gguf"],
        env={**os.environ, **OFFLINE},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return {"work_s": time.monotonic() - started}


def convert_ours(model: Path, extra: Path, out: Path) -> dict[str, float]:
    """Convert to F16 as the convert stage does, with its comparison of all values, hashes and sync."""
    from tutor.artifacts.disk import read_json
    from tutor.artifacts.stage_folder import writing
    from tutor.engines.llamacpp.convert import Conversion, to_gguf
    from tutor.formats.models.gguf_metadata import check_gguf, implied_metadata
    from tutor.formats.models.gguf_weights import weights_of
    from tutor.formats.models.model_folder import Facts
    from tutor.stages.convert.quantization_error import require_exact

    facts = Facts(**read_json(extra / "facts.json"))
    config = read_json(model / "config.json")
    imported, started = peak(), time.monotonic()
    with writing(out, "convert", {}) as (scratch, _):
        expected, whole = (
            implied_metadata(model, replace(facts, vocabulary=config["vocab_size"])),
            scratch / "tutor-F16.gguf",
        )
        to_gguf(Conversion(model, whole, facts.pre_tokenizer))
        converted = time.monotonic() - started
        require_exact(whole, check_gguf(whole, expected), weights_of(model))
    return {"work_s": converted, "checked_s": time.monotonic() - started, "imported_rss_mb": imported}


def base_of_the_demo(_: Path, __: Path, out: Path) -> dict[str, float]:
    """Make the base that converting needs; not measured."""
    out.mkdir()
    make_base(out)
    return {}


WORK: dict[str, Callable[[Path, Path, Path], dict[str, float]]] = {
    "merge-plain": merge_plain,
    "merge-ours": merge_ours,
    "convert-plain": convert_plain,
    "convert-ours": convert_ours,
    "base": base_of_the_demo,
}


def work(name: str, *folders: str) -> None:
    """Run one of WORK in this process, and print its figures as JSON."""
    from tutor.cli.progress import quiet_libraries

    quiet_libraries()
    model, extra, out = map(Path, folders)
    figures = WORK[name](model, extra, out)
    print(json.dumps({**figures, "peak_rss_mb": peak()}))  # the parent's polling misses short peaks


def peak() -> float:
    """Return the peak memory of this process in MB."""
    return status(os.getpid()).get("VmHWM", 0) / 1024


def compare(ways: dict[str, dict[str, float]]) -> None:
    """Add the ratios of the last way's times to those of the ways before."""
    *before, last = ways.values()
    for name, figures in zip(ways, before, strict=False):
        for time_ in ("work", "synced"):
            last[f"{time_}_times_{name}"] = last[f"{time_}_s"] / figures[f"{time_}_s"]


def shown(name: str, figures: dict[str, float]) -> str:
    """Return a figure as text: MB without decimals, seconds and ratios with two; "" when it was not measured."""
    return "" if name not in figures else f"{figures[name]:.{0 if name.endswith('_mb') else 2}f}"


def table(found: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    columns = {
        "work_s": "work, s", "work_times_cp": "x cp", "work_times_plain": "x plain", "checked_s": "with checks, s",
        "synced_s": "on the disk, s", "synced_times_cp": "x cp", "process_s": "process, s", "peak_rss_mb": "RSS, MB",
        "imported_rss_mb": "of it imports", "peak_anonymous_mb": "anonymous, MB",
    }  # fmt: skip
    lines = [f"{found['size']}, {found['layers']} layers: {found['gigabytes']} GB, {found['cores']} cores"]
    for part, ways in found["parts"].items():
        lines += ["", f"| {part} | {' | '.join(columns.values())} |", "| --- |" + " ---: |" * len(columns)]
        lines += [f"| {way} | {' | '.join(shown(name, row) for name in columns)} |" for way, row in ways.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
