"""The parity gate: the tolerance of each hand-off, the first one that diverges, and the likeliest cause.

In: the observations of the engines. Out: hand-offs with their comparisons, the refusal, a table. Runs no engine, and
needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tutor.stages.parity.compare import NOTHING, Comparison, Observation, Tolerance, compare_engines

Kind = Literal["merge", "convert", "quantize", "publish"]
MODEL = "model"
"""Name of the comparison of a model's digest."""

SAME_WEIGHTS = {
    "F16": Tolerance(kl=1e-4, mean=0.02, worst=0.5, margin=0.1),
    "BF16": Tolerance(kl=1e-3, mean=0.1, worst=1.5, margin=0.5),
}
"""Tolerances between transformers in fp32 and the next engine, by the type of the weights there.

About ten times the differences that one rounding and another order of additions cause; llama.cpp rounds the activations
of a product with BF16 weights to BF16. Measured over 1,400 tokens of the demo's 135M (kl, mean, worst): base + adapter
to merged, F16 2e-6, 0.0015, 0.025, BF16 9e-5, 0.0095, 0.11; merged to llama.cpp, F16 3e-6, 0.0018, 0.043, BF16 8e-5,
0.0087, 0.094. A merge into the other base has 0.004. The tiny model stays below a quarter of the limits for F16.
"""
SAME_FILE = Tolerance(kl=0.02, mean=0.2, worst=3.0, margin=0.5)
"""Tolerance between two builds of llama.cpp with the same file, one perhaps on a GPU.

Activations are rounded to 8 bits, and a different last bit rounds some of them differently. About five times the
differences of Ollama on the same CPU: on the demo's 135M 0.0018 (kl), 0.022 (mean), 0.37 (worst) for Q8_0, 0.0041,
0.040, 0.43 for Q4_K_M, 0.0037, 0.023, 0.21 for Q5_K_M; 1.3e-5 on the tiny Q8_0.
"""

CAUSES: Mapping[Kind, Mapping[str, str]] = {
    "merge": {
        "prompt": "merged/ carries another chat template than the prompt contract: tutor clean merge, and run again",
        "tokens": "merged/ has another tokenizer than base/: changed, or read by another transformers version",
        "log-probabilities": "merged/ was not made from this base and adapter, but from another run's adapter, a "
        "base of the same shape, or the base in another precision: tutor why merge",
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
        "tokens": "Ollama has other tokens (another BOS or tokenizer), or cuts at another num_ctx: tutor publish",
        "log-probabilities": "the weights in Ollama differ from the published file, or its llama.cpp is another one",
    },
}
"""Likeliest causes of a difference, by the kind of hand-off and the subject of the comparison."""
UNSEEN: Mapping[Kind, str] = {
    **dict.fromkeys(
        ("merge", "convert", "quantize"), "the record of an engine is empty: tutor clean parity, and again"
    ),
    "publish": "Ollama returned no log-probabilities that can be compared: is it older than 0.30, or behind a proxy?",
}
"""Next steps where two engines have nothing in common to compare."""
ANSWER_CAUSES = {
    "greedy answer": "equal log-probabilities, another token: a sampler, a penalty or a stop text has an effect",
    "end": "the end-of-sequence token: another eos_token_id, a stop text, or an end that was not learnt",
}
"""Likeliest causes of a difference in the answer alone."""


@dataclass(frozen=True)
class HandOff:
    """Two neighbouring engines and their comparisons; `missing`: why they were not compared."""

    kind: Kind
    ours: str
    theirs: str
    checks: tuple[Comparison, ...] = ()
    tolerance: Tolerance | None = None
    missing: str = ""

    @property
    def failed(self) -> Comparison | None:
        """The first comparison with a difference."""
        return next((check for check in self.checks if not check.ok), None)

    @property
    def state(self) -> str:
        """Return `same`, `diverges`, `prompts only` (the answers were not compared) or `not checked`."""
        if self.missing or self.failed:
            return "not checked" if self.missing else "diverges"
        return "prompts only" if {"log-probabilities", "greedy answer"} <= {*self.not_compared} else "same"

    @property
    def not_compared(self) -> list[str]:
        """Names of the subjects of which the two engines have no value in common."""
        return [check.name for check in self.checks if not check.compared and check.name != MODEL]

    def record(self) -> dict[str, Any]:
        """Return the hand-off as JSON values, for parity.json and the manifest."""
        checks = [asdict(check) for check in self.checks]
        return {**asdict(self), "checks": checks, "state": self.state, "not_compared": self.not_compared}


def hand_off(
    kind: Kind,
    names: tuple[str, str],
    sides: tuple[Sequence[Observation], Sequence[Observation]],
    limit: Tolerance,
    *,
    answers: bool = True,
) -> HandOff:
    """Compare two neighbouring engines; without `answers` their prompts alone."""
    return HandOff(kind, *names, tuple(compare_engines(*sides, limit, answers=answers)), limit)


def quantization_tolerance(kl: float) -> Tolerance:
    """Return the tolerance of a quantization: the KL divergence of the recipe; its answers may differ."""
    return Tolerance(kl=kl, mean=None, worst=None, margin=None)


def refusal(hand_offs: Sequence[HandOff]) -> dict[str, str] | None:
    """Return `message` and `hint` of the first hand-off that diverges or shows nothing; None where none does."""
    if not hand_offs:
        return {"message": "no two engines were compared", "hint": "tutor clean parity, and run again"}
    for item in hand_offs:
        if (check := item.failed) and check.what == NOTHING:
            return {
                "message": f"{item.ours} -> {item.theirs} ({item.kind}) is not shown: of its {check.name} {NOTHING}",
                "hint": UNSEEN[item.kind],
            }
        if check:
            cause = CAUSES[item.kind].get(check.name) or ANSWER_CAUSES[check.name]
            return {
                "message": f"{item.ours} -> {item.theirs} ({item.kind}) diverges in its {check.name}: {check.what}",
                "hint": f"most likely: {cause}",
            }
    return None


def parity_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of hand-offs (as their records) for a terminal."""
    head = ("prompts", "tokens", "mean", "worst", "KL", "greedy", "ends")
    rows = [f"  {'hand-off':<26}" + "".join(f"{name:>10}" for name in head)]
    for item in records:
        checks = {check["name"]: check["figures"] for check in item["checks"]}
        name = f"{item['ours']} -> {item['theirs']}"
        if item["missing"]:
            rows.append(f"  {name:<26}  not checked: {item['missing']}")
            continue
        if MODEL in checks:
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
        unseen = ", ".join(item.get("not_compared", ()))
        failed = "not shown" if any(check["what"] == NOTHING for check in item["checks"]) else "diverges"
        mark = f"  <- {failed}" if item["state"] == "diverges" else f"  not compared: {unseen}" if unseen else ""
        rows.append(f"  {name:<26}" + "".join(f"{cell:>10}" for cell in cells) + mark)
    return rows


def note_lines(gate: Mapping[str, Any]) -> list[str]:
    """Return what the gate left out, and what the compared repetition penalty changes, as lines for a terminal."""
    left_out = [f"  not compared: the conversation «{name}»" for name in gate.get("left_out", ())]
    penalty = gate.get("penalty")
    if not penalty or penalty["factor"] == 1:
        return left_out
    changes = [f"{name} {f'from token {at} on' if at else 'never'}" for name, at in penalty["departs"].items()]
    told = f"another answer, by more than a near tie, {', '.join(changes)}" if changes else "its prompt does not fit"
    return [*left_out, f"  repetition penalty {penalty['factor']:g} over {penalty['window']} tokens: {told}"]


def _share(figures: Mapping[str, float], part: str = "equal", whole: str = "of") -> str:
    return f"{figures[part]:.0f}/{figures[whole]:.0f}" if figures[whole] else "-"
