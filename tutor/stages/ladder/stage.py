"""The ladder stage: a quantization benchmark (held-out loss, size, speed, memory), and the choice of the served one.

In: data/ (held_out.jsonl), base/ (its tokenizer), gguf/ (the GGUF files). Out: ladder.json and ladder.svg (loss, KL
divergence and size by quantization; two runs give equal bytes), served.json (the quantization to serve); speeds and
memory in the results only. Quantizes nothing and generates no answer.
"""

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import write_json
from tutor.artifacts.layout import gguf_name
from tutor.engines.llamacpp.score import reference_bytes, score
from tutor.engines.llamacpp.server import serve
from tutor.engines.trace import Score
from tutor.errors import ArtifactError
from tutor.formats.models.gguf import read_gguf
from tutor.formats.models.model_folder import read_reference
from tutor.formats.models.served_quantization import resolve, write_served
from tutor.formats.rows.row_ids import TokenRows, held_out_ids
from tutor.machine.host import usable_cores
from tutor.machine.run_cost import require_disk
from tutor.recipe.quantizations import AUTO, F16
from tutor.stages.ladder.plot import plot

if TYPE_CHECKING:
    from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

MAX_TOKENS = 4096
"""Maximum number of scored answer tokens: with R1's vocabulary, F16's distributions over 4096 tokens take 2.1 GB."""
TIMED_PROMPT_TOKENS = 512
"""Number of prompt tokens of the timed request."""
TIMED_NEW_TOKENS = 64
"""Number of generated tokens of the timed request."""


def run(recipe: "Recipe", inputs: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Score and time every file of the tutor and choose one; return all figures and the served quantization.

    Raises ArtifactError when a file is missing or its loss is no number, HostError when the disk cannot hold F16's
    distributions, ServiceError when llama-server cannot serve a file.
    """
    rows = sample_rows(held_out_ids(recipe, inputs["data"], inputs["base"]), MAX_TOKENS)
    reference = read_reference(inputs["base"])
    kinds = [reference, *recipe.convert.quantizations]
    files = {kind: inputs["convert"] / gguf_name("tutor", kind) for kind in kinds}
    threads = usable_cores()
    figures = benchmark(files, rows, threads, out)
    chosen = choose(figures, recipe.convert.budget)
    nearest = closest(figures) if chosen == reference else chosen
    served = resolve(recipe.ollama.quantization, nearest)
    if recipe.ollama.quantization == AUTO and chosen == reference:
        log.warning(
            "no quantization loses less than convert.budget (%g): %s, the closest to %s, is served (KL %.4f); add Q8_0 "
            'to convert.quantizations, or set ollama.quantization = "%s"',
            recipe.convert.budget, nearest, reference, figures[nearest]["kl"], reference,
        )  # fmt: skip
    worse = worse_and_larger(figures)
    for kind, better in worse.items():
        log.warning("%s is larger and less accurate than %s: remove it from convert.quantizations", kind, better)
    write_json(out / "ladder.json", figures)
    (out / "ladder.svg").write_text(plot(figures, recipe.convert.budget, served), "utf-8")
    write_served(out, served)
    scored = {path.stem: _loss(figures[kind]) for kind, path in files.items()}
    base = inputs["convert"] / gguf_name("base", served)
    if recipe.convert.base:
        scored[base.stem] = perplexity([item.logprobs for item in score(_existing(base), rows, threads=threads)])
    server_log = out.parent / "ladder.log"
    speeds = {
        kind: speed_and_memory(path, rows, recipe.generate.context, threads, server_log) for kind, path in files.items()
    }
    return {
        "quantizations": {kind: {**each, **speeds[kind]} for kind, each in figures.items()},
        "budget": recipe.convert.budget,
        "chosen": chosen,
        "served": served,
        "worse_and_larger": worse,
        "perplexity": scored,
    }


def sample_rows(rows: TokenRows, tokens: int) -> TokenRows:
    """Return equidistant rows whose answers have at most `tokens` tokens together; at least one row."""
    for count in range(len(rows), 1, -1):
        sample = [rows[index * len(rows) // count] for index in range(count)]
        if sum(len(answer) for _, answer in sample) <= tokens:
            return sample
    return rows[:1]


def benchmark(files: Mapping[str, Path], rows: TokenRows, threads: int, out: Path) -> dict[str, dict[str, Any]]:
    """Return each file's size, held-out loss and KL divergence from the first, the 16-bit one, over all tokens."""
    vocabulary = len(read_gguf(_existing(next(iter(files.values())))).fields.get("tokenizer.ggml.tokens", ()))
    require_disk(out, reference_bytes(rows, vocabulary), "scoring")
    reference = out / "reference.bin"
    figures: dict[str, dict[str, Any]] = {}
    f16_scores: list[Score] = []
    try:
        for kind, path in files.items():
            scores = score(_existing(path), rows, threads=threads, reference=reference)
            f16_scores = f16_scores or scores
            figures[kind] = {"file": path.name, "size": path.stat().st_size, **against_f16(f16_scores, scores)}
            log.info("%s: held-out perplexity %.3f, KL %.5f", kind, figures[kind]["perplexity"], figures[kind]["kl"])
    finally:
        reference.unlink(missing_ok=True)
    return figures


def against_f16(f16_scores: Sequence[Score], scores: Sequence[Score]) -> dict[str, Any]:
    """Return the figures of a quantization, compared with F16.

    `loss`, `perplexity` and `tokens`: its own; `more`: the increase of the loss (nats a token), with its standard
    error over the tokens; `kl`: KL divergence from F16, mean and 99th percentile; `same`: the share of tokens where
    both have the same most probable token. Raises ArtifactError where a token was not compared, or a figure is no
    number: nothing may be chosen by figures that are missing.
    """
    own = perplexity([item.logprobs for item in scores])
    is_f16 = scores is f16_scores  # has no divergence from itself
    kl = [0.0] * own["tokens"] if is_f16 else [value for item in scores for value in item.kl]
    same = [True] * own["tokens"] if is_f16 else [value for item in scores for value in item.same]
    pairs = zip(_flat(f16_scores), _flat(scores), strict=True)
    more = [before - after for before, after in pairs]
    if not len(kl) == len(same) == own["tokens"] or not all(map(math.isfinite, (*kl, *more))):
        raise ArtifactError(
            f"the divergence from F16 is known for {sum(map(math.isfinite, kl))} of {own['tokens']} tokens",
            "the weights may be broken: convert again",
        )
    return {
        **own,
        "more": math.fsum(more) / len(more),
        "more_error": statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else 0.0,
        "kl": math.fsum(kl) / len(kl),
        "kl_p99": sorted(kl)[int(0.99 * (len(kl) - 1))],
        "same": sum(same) / len(same),
    }


def perplexity(logprobs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the mean negative log-likelihood (nats) over all tokens of all rows, its exponential, and their number.

    Raises ArtifactError where the loss is no number: a model with broken weights.
    """
    tokens = sum(len(row) for row in logprobs)
    loss = -math.fsum(value for row in logprobs for value in row) / tokens if tokens else math.nan
    if not -1 < loss < 700:  # a loss is positive; e^710 is no float; NaN compares as false
        raise ArtifactError(
            f"the held-out loss over {tokens} tokens is {loss}", "the weights may be broken: convert again"
        )
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": tokens}


def choose(figures: Mapping[str, Mapping[str, Any]], budget: float) -> str:
    """Return the smallest quantization whose loss increase and KL divergence are inside the budget; F16 without one.

    Both are checked, because a lucky sample can lower the loss of a model that has drifted away. One budget serves
    for both: on text that F16 generates, the loss grows on average by exactly the KL divergence.
    """
    inside = [kind for kind, each in figures.items() if each["more"] <= budget and each["kl"] <= budget]
    return min(inside, key=lambda kind: (figures[kind]["size"], kind), default=next(iter(figures), F16))


def closest(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the quantization with the smallest KL divergence from the first file, the 16-bit one."""
    _, *quantizations = figures
    return min(quantizations, key=lambda kind: (figures[kind]["kl"], figures[kind]["size"]))


def worse_and_larger(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return each quantization that another beats in size, loss and KL, with the smallest that does.

    `choose` returns none of them.
    """
    found = {}
    for kind, each in figures.items():
        better = [
            (other["size"], name)
            for name, other in figures.items()
            if other["size"] < each["size"] and other["more"] < each["more"] and other["kl"] < each["kl"]
        ]
        if better:
            found[kind] = min(better)[1]
    return found


def speed_and_memory(path: Path, rows: TokenRows, context: int, threads: int, server_log: Path) -> dict[str, Any]:
    """Return prompt and generation speed (tokens/s) and peak memory (bytes) of llama-server at the recipe's context."""
    tokens = min(TIMED_PROMPT_TOKENS, context - TIMED_NEW_TOKENS - 1)
    ids = [id_ for prompt, answer in rows for id_ in (*prompt, *answer)]
    ids = (ids * (tokens // len(ids) + 1))[:tokens]
    with serve(path, context=context, threads=threads, log=server_log) as server:
        server.speed(ids[:8], 1)  # loads pages of the file that are not in memory yet
        speed = server.speed(ids, TIMED_NEW_TOKENS)
        memory = server.peak_memory()
    log.info("%s: prompt %.0f tokens/s, generation %.1f tokens/s", path.name, speed.prompt, speed.generation)
    return {"prompt_per_second": speed.prompt, "tokens_per_second": speed.generation, "memory": memory}


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", "run: tutor convert")
    return path


def _flat(scores: Sequence[Score]) -> list[float]:
    return [value for item in scores for value in item.logprobs]


def _loss(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figures[name] for name in ("loss", "perplexity", "tokens")}
