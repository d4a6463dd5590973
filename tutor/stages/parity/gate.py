"""The parity gate's judgement: each hand-over's tolerance, the first one that diverges, and what most likely did it.

In: what the engines made of the conversations. Out: hand-overs with their checks, the verdict, a table, and the record
that later comparisons read. Asks no engine, and needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tutor.stages.parity.compare import Check, Seen, Tolerance, compare

Kind = Literal["merge", "convert", "quantize", "publish"]

SAME_WEIGHTS = {
    "fp32": Tolerance(kl=1e-4, mean=0.02, worst=0.5, lead=0.1),
    "bf16": Tolerance(kl=0.02, mean=0.3, worst=5.0, lead=1.0),
}
"""By what transformers computed in: about ten times what rounding to FP16 once, and adding in another order, made.

Measured over 1,400 tokens of the demo's 135M (kl, mean, worst): base + adapter to merged, fp32 2e-6, 0.0015, 0.025,
bf16 0.0026, 0.055, 1.0; merged to F16 in llama.cpp, fp32 3e-6, 0.0018, 0.043, bf16 0.0019, 0.046, 0.98. The best two
changed places in bf16 alone, at leads up to 0.06. The tiny model stays below a quarter of its fp32 figures.
"""
PUBLISHED = Tolerance(kl=0.02, mean=0.2, worst=3.0, lead=0.5)
"""The same file in another build of llama.cpp, perhaps on a GPU: activations are rounded to 8 bits, and a last bit that
differs rounds some otherwise. About five times what Ollama on the same CPU made: on the demo's 135M 0.0018 (kl), 0.022
(mean), 0.37 (worst) for Q8_0, 0.0041, 0.040, 0.43 for Q4_K_M, 0.0037, 0.023, 0.21 for Q5_K_M; 1.3e-5 on the tiny Q8_0.
"""

CAUSES: Mapping[Kind, Mapping[str, str]] = {
    "merge": {
        "prompt": "merged/ carries another chat template than the prompt contract: tutor clean merge, and run again",
        "tokens": "merged/ has another tokenizer than base/: changed, or read by another transformers version",
        "log-probabilities": "merged/ was not made of this base and adapter, but of another run's adapter, a base "
        "of the same shape, or the base in another precision: tutor why merge",
    },
    "convert": {
        "prompt": "the GGUF carries another chat template than merged/: tutor clean convert, and run again",
        "tokens": "the GGUF's tokenizer differs in its pre-tokenizer (tokenizer.ggml.pre) or add_bos_token",
        "log-probabilities": "the F16 file is of another merged folder, is damaged, or has other RoPE settings",
    },
    "quantize": {
        "prompt": "the file carries another chat template than F16: another run's? tutor clean convert, and run again",
        "tokens": "the file carries another tokenizer than F16: another run's? tutor clean convert, and run again",
        "log-probabilities": "the file is damaged, of another model or coarser than its name says, or its types are "
        "too coarse for this model: serve another quantization, or raise its parity.budgets",
    },
    "publish": {
        "model": "someone created or copied another model under this name: tutor publish",
        "prompt": "Ollama renders by another template or system text than was published: tutor publish",
        "tokens": "Ollama reads the prompt otherwise (BOS, tokenizer), or cuts it at another num_ctx: tutor publish",
        "log-probabilities": "the weights in Ollama are not the published file's, or its llama.cpp computes otherwise",
    },
}
LATER = {
    "greedy answer": "the numbers agree and the choice does not: a sampler, a penalty or a stop text takes part",
    "end": "the end-of-sequence token: another eos_token_id, a stop text, or an end that was not learnt",
}
"""The likeliest cause of a difference that only shows in the answer."""


@dataclass(frozen=True)
class HandOver:
    """From one engine to the next; `missing` says why the two were not compared."""

    kind: Kind
    ours: str
    theirs: str
    checks: tuple[Check, ...] = ()
    tolerance: Tolerance | None = None
    missing: str = ""

    @property
    def failed(self) -> Check | None:
        """The first check that is not as it must be."""
        return next((check for check in self.checks if not check.ok), None)

    @property
    def state(self) -> str:
        """same, diverges or not checked."""
        return "not checked" if self.missing else "diverges" if self.failed else "same"

    def record(self) -> dict[str, Any]:
        """As parity.json and a manifest hold it."""
        return {**asdict(self), "checks": [asdict(check) for check in self.checks], "state": self.state}


def hand_over(
    kind: Kind, names: tuple[str, str], sides: tuple[Sequence[Seen], Sequence[Seen]], limit: Tolerance
) -> HandOver:
    """Two neighbours compared."""
    return HandOver(kind, *names, tuple(compare(*sides, limit)), limit)


def budget(kl: float) -> Tolerance:
    """A quantization's tolerance: the divergence that the recipe allows; what it answers may differ."""
    return Tolerance(kl=kl, mean=None, worst=None, lead=None)


def refusal(hand_overs: Sequence[HandOver]) -> dict[str, str] | None:
    """`message` and `hint` of the first hand-over that diverges, in the chain's order; None where none does."""
    for item in hand_overs:
        if check := item.failed:
            cause = CAUSES[item.kind].get(check.name) or LATER[check.name]
            return {
                "message": f"{item.ours} -> {item.theirs} ({item.kind}) diverges in its {check.name}: {check.what}",
                "hint": f"most likely: {cause}",
            }
    return None


def lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of hand-overs, as their records, for a terminal."""
    head = ("prompts", "tokens", "mean", "worst", "KL", "greedy", "ends")
    rows = [f"  {'hand-over':<26}" + "".join(f"{name:>10}" for name in head)]
    for item in records:
        checks = {check["name"]: check["figures"] for check in item["checks"]}
        name = f"{item['ours']} -> {item['theirs']}"
        if item["missing"]:
            rows.append(f"  {name:<26}  not checked: {item['missing']}")
            continue
        if "model" in checks:
            rows.append(f"  {name:<26}  <- another model: {item['checks'][0]['what']}")
            continue
        numbers = checks["log-probabilities"]
        cells = [
            _share(checks["prompt"]),
            _share(checks["tokens"]),
            *(f"{numbers[key]:.2g}" if key in numbers else "-" for key in ("mean", "worst", "kl")),
            _share(checks["greedy answer"], "agreed", "steps"),
            _share(checks["end"]),
        ]
        mark = "" if item["state"] == "same" else "  <- diverges"
        rows.append(f"  {name:<26}" + "".join(f"{cell:>10}" for cell in cells) + mark)
    return rows


def _share(figures: Mapping[str, float], part: str = "equal", whole: str = "of") -> str:
    return f"{figures[part]:.0f}/{figures[whole]:.0f}" if figures[whole] else "-"
