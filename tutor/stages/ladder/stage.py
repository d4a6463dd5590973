"""The ladder stage: what each quantization loses on the held-out rows, what it takes, how fast it is; which one serves.

In: data/ (held_out.jsonl), base/ (its tokenizer), convert/ (the GGUF files). Out: ladder.json and ladder.svg (a rung a
quantization, the same from two runs), served.json (the quantization to serve); speeds and memory in the results alone.
Converts nothing, asks nothing.
"""

import logging
import math
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import write_json
from tutor.artifacts.layout import gguf_name
from tutor.engines.llamacpp.score import reference_bytes, score
from tutor.engines.llamacpp.server import serve
from tutor.engines.trace import Score
from tutor.errors import ArtifactError, HostError
from tutor.formats.models.gguf import read_gguf
from tutor.formats.models.served_quantization import write_served
from tutor.formats.rows.split_files import Rows, held_out_rows
from tutor.recipe.quantizations import AUTO, F16
from tutor.stages.ladder.plot import plot

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

TOKENS = 4096
"""Of held-out answers that are scored at most: with R1's vocabulary F16's distributions of so many take 2.1 GB."""
PROMPT, WRITTEN = 512, 64
"""Tokens that are read and written to time a file."""


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Score and time every file of the tutor, and choose: the rungs with their speeds, and what is served.

    Raises ArtifactError when a file is missing or gives no number, HostError when the disk cannot hold F16's
    distributions, ServiceError when a file cannot be served.
    """
    rows = fewer(held_out_rows(inputs["data"] / "held_out.jsonl", inputs["base"], recipe.system), TOKENS)
    kinds = [F16, *recipe.convert.quantizations]
    files = {kind: inputs["convert"] / gguf_name("tutor", kind) for kind in kinds}
    threads = len(os.sched_getaffinity(0))
    rungs = climb(files, rows, threads, out)
    chosen = choose(rungs, recipe.convert.budget)
    served = chosen if recipe.ollama.quantization == AUTO else recipe.ollama.quantization
    if recipe.ollama.quantization == AUTO and chosen == F16:
        log.warning("no quantization loses less than convert.budget (%g): F16 is served", recipe.convert.budget)
    worse = worse_and_larger(rungs)
    for kind, better in worse.items():
        log.warning("%s is larger than %s and loses more: nothing speaks for it", kind, better)
    write_json(out / "ladder.json", rungs)
    (out / "ladder.svg").write_text(plot(rungs, recipe.convert.budget, served), "utf-8")
    write_served(out, served)
    scored = {path.stem: _loss(rungs[kind]) for kind, path in files.items()}
    base = inputs["convert"] / gguf_name("base", served)
    if recipe.convert.base:
        scored[base.stem] = perplexity([item.logprobs for item in score(_there(base), rows, threads=threads)])
    said = out.parent / "ladder.log"
    speeds = {kind: measured(path, rows, recipe.generate.context, threads, said) for kind, path in files.items()}
    return {
        "rungs": {kind: {**rung, **speeds[kind]} for kind, rung in rungs.items()},
        "budget": recipe.convert.budget,
        "chosen": chosen,
        "served": served,
        "worse_and_larger": worse,
        "perplexity": scored,
    }


def fewer(rows: Rows, tokens: int) -> Rows:
    """Rows at even distances whose answers have so many tokens at most; one at least."""
    for count in range(len(rows), 1, -1):
        some = [rows[index * len(rows) // count] for index in range(count)]
        if sum(len(answer) for _, answer in some) <= tokens:
            return some
    return rows[:1]


def climb(files: Mapping[str, Path], rows: Rows, threads: int, out: Path) -> dict[str, dict[str, Any]]:
    """A rung a file, F16 first: size, held-out loss, and the distance from F16 over the whole vocabulary."""
    vocabulary = len(read_gguf(_there(files[F16])).fields.get("tokenizer.ggml.tokens", ()))
    need, free = reference_bytes(rows, vocabulary), shutil.disk_usage(out).free
    if need > free:
        raise HostError(f"{out} has {free / 1e9:.1f} GB free, scoring needs {need / 1e9:.1f} GB", "make room")
    reference = out / "reference.bin"
    rungs: dict[str, dict[str, Any]] = {}
    whole: list[Score] = []
    try:
        for kind, path in files.items():
            scores = score(_there(path), rows, threads=threads, reference=reference)
            whole = whole or scores
            rungs[kind] = {"file": path.name, "size": path.stat().st_size, **compare(whole, scores)}
            log.info("%s: held-out perplexity %.3f, KL %.5f", kind, rungs[kind]["perplexity"], rungs[kind]["kl"])
    finally:
        reference.unlink(missing_ok=True)
    return rungs


def compare(whole: Sequence[Score], scores: Sequence[Score]) -> dict[str, Any]:
    """What a file loses: its loss, how much more that is than F16's (nats a token, with its standard error over the
    tokens), KL from F16 (mean, 99th percentile), and the share of places where both prefer the same token.
    """
    kl = [value for item in scores for value in item.kl] or [0.0]
    same = [value for item in scores for value in item.same] or [True]
    pairs = zip(_flat(whole), _flat(scores), strict=True)
    more = [before - after for before, after in pairs]
    return {
        **perplexity([item.logprobs for item in scores]),
        "more": math.fsum(more) / len(more),
        "more_error": statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else 0.0,
        "kl": math.fsum(kl) / len(kl),
        "kl_p99": sorted(kl)[int(0.99 * (len(kl) - 1))],
        "same": sum(same) / len(same),
    }


def perplexity(logprobs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean negative log-likelihood (nats) over all tokens of all rows, its exponential, and how many tokens.

    Raises ArtifactError where it is no number: a model with broken weights.
    """
    tokens = sum(len(row) for row in logprobs)
    loss = -math.fsum(value for row in logprobs for value in row) / tokens if tokens else math.nan
    if not loss < 700:  # e^710 is no float; NaN compares as false
        raise ArtifactError(
            f"the held-out loss over {tokens} tokens is {loss}", "the weights may be broken: convert again"
        )
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}


def choose(rungs: Mapping[str, Mapping[str, Any]], budget: float) -> str:
    """The smallest file inside the budget, in loss and in KL alike; F16, which loses nothing, where no other is.

    Both, because a lucky sample can lower the loss of a model that has drifted away. They share one number: were the
    rows F16's own, the loss would on average grow by exactly the KL divergence.
    """
    inside = [kind for kind, rung in rungs.items() if rung["more"] <= budget and rung["kl"] <= budget]
    return min(inside, key=lambda kind: (rungs[kind]["size"], kind), default=F16)


def worse_and_larger(rungs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Each rung that another beats in size, loss and KL alike, with the smallest such; `choose` never takes one."""
    found = {}
    for kind, rung in rungs.items():
        better = [
            (other["size"], name)
            for name, other in rungs.items()
            if other["size"] < rung["size"] and other["more"] < rung["more"] and other["kl"] < rung["kl"]
        ]
        if better:
            found[kind] = min(better)[1]
    return found


def measured(path: Path, rows: Rows, context: int, threads: int, said: Path) -> dict[str, Any]:
    """Tokens/s of reading and writing, and the most memory in bytes, of a llama-server with the recipe's context."""
    tokens = min(PROMPT, context - WRITTEN - 1)
    ids = [id_ for prompt, answer in rows for id_ in (*prompt, *answer)]
    ids = (ids * (tokens // len(ids) + 1))[:tokens]
    with serve(path, context=context, threads=threads, log=said) as server:
        server.speed(ids[:8], 1)  # the first request finds pages of the file not yet in memory
        speed = server.speed(ids, WRITTEN)
        memory = server.peak_memory()
    log.info("%s: reads %.0f tokens/s, writes %.1f", path.name, speed.prompt, speed.generation)
    return {"prompt_per_second": speed.prompt, "tokens_per_second": speed.generation, "memory": memory}


def _there(path: Path) -> Path:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", "run: tutor convert")
    return path


def _flat(scores: Sequence[Score]) -> list[float]:
    return [value for item in scores for value in item.logprobs]


def _loss(rung: Mapping[str, Any]) -> dict[str, Any]:
    return {name: rung[name] for name in ("loss", "perplexity", "tokens")}
