"""Manifests and answers as the report stage reads them, and a parser that checks its page."""

import math
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

from tutor.artifacts.manifest import Manifest
from tutor.stages.evaluate import rates
from tutor.stages.forgetting.stage import drift
from tutor.stages.report.view import StageOutputs

EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7*7 }}"\'--><style>*{display:none}</style>'


KINDS = ("aplicacion", "correccion", "")


VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Parses a page: unclosed and misplaced tags, names, ids, links, headings and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def manifest(stage: str, results: dict[str, Any], fields: dict[str, Any] | None = None, **outputs: int) -> Manifest:
    files = {name.replace("__", "-") + ".gguf": {"size": size, "sha256": "ab" * 32} for name, size in outputs.items()}
    started = "2026-01-02T03:04:05+00:00"
    return Manifest(stage, "c" * 64, fields or {"version.torch": "2.15.0"}, files, results, started, 61.0, "vm")


TRAINED = {
    "base_source": "hub:deepseek-ai/DeepSeek-R1-Distill-Llama-8B@" + "6" * 40,
    "base_weights": "d" * 64, "precision": "bf16", "quantization": "nf4", "rows": 35, "steps": 4, "kept_step": 2,
    "trainable_parameters": 4_884_480, "samples_per_second": 0.7,
    "held_out": {"rows": 5, "tokens": 99, "loss_before": 3.0, "loss_after": 2.0,
                 "perplexity_before": math.exp(3), "perplexity_after": math.exp(2)},
}  # fmt: skip


METRICS = [
    {"step": step, "epoch": step / 2, "loss": None if step == 3 else 3 / step, "perplexity": None if step == 3 else 9.0}
    | ({"held_out_loss": 2.0, "held_out_perplexity": math.exp(2)} if step % 2 == 0 else {})
    for step in (1, 2, 3, 4)
]  # fmt: skip


LOSSES = {
    "loss": 2.0,
    "perplexity": 7.4,
    "tokens": 99,
    "more": 0.0,
    "more_error": 0.0,
    "kl": 0.0,
    "kl_p99": 0.0,
    "same": 1.0,
}


SPEED = {"prompt_per_second": 200.0, "tokens_per_second": 30.0, "memory": None}


LADDER = {
    "quantizations": {
        "F16": {"file": "tutor-F16.gguf", "size": 270e6, **LOSSES, **SPEED},
        "Q8_0": {"file": "tutor-Q8_0.gguf", "size": 144e6, **LOSSES, **SPEED, "kl": 0.006, "more": 0.001},
    },
    "worse_and_larger": {"F16": "Q8_0"}, "budget": 0.01, "chosen": "Q8_0", "served": "Q8_0",
    "perplexity": {"tutor-F16": {"perplexity": 7.4}, "base-Q8_0": {"perplexity": 20.5}},
}  # fmt: skip


FIGURES = {
    "prompt": {"equal": 9.0, "of": 9.0},
    "tokens": {"equal": 9.0, "of": 9.0},
    "log-probabilities": {"tokens": 9.0, "mean": 0.3, "worst": 4.5, "kl": 0.07},
    "greedy answer": {"agreed": 41.0, "steps": 96.0, "equal": 1.0, "of": 6.0},
    "end": {"equal": 0.0, "of": 0.0},
}


CHECKS = [{"name": name, "ok": True, "figures": figures, "what": ""} for name, figures in FIGURES.items()]


def hand_off_record(**changes: Any) -> dict[str, Any]:
    limit = {"kl": 0.2, "mean": None, "worst": None, "margin": None}
    item = {"kind": "quantize", "ours": "F16", "theirs": "Q8_0", "checks": CHECKS, "tolerance": limit}
    return {**item, "missing": "", "state": "same", **changes}


def record(*, passed: bool, text: str = " Hola.\n\n```ts\nlet a = 1;\n```\n\nFin.") -> dict[str, Any]:
    verdicts = {"language": True, "stopped": True, "answered": True, "compiles": passed, "characters": len(text)}
    verdicts |= {"chrf": 30.0 + 10 * passed, "chrf_other": None}
    reasons = [] if passed else ["its code in line 3: type error"]
    speed = {"tokens": 9, "finish": "stop", "tokens_per_second": 50.0}
    return {"text": text, **speed, "verdicts": verdicts, "passed": passed, "reasons": reasons}


def prompts_with_answers(text: str = "¿Qué es una interfaz?") -> list[dict[str, Any]]:
    """Nine prompts: each kind has one that both pass, one that only the tutor passes, one that only the base passes."""
    return [
        {
            "instruction": f"{text} {number}", "category": KINDS[number % 3], "topic": "tipos", "line": number,
            "expect": {"include": [["interface", "interfaz"]], "exclude": ["any"]}, "reference": "Una forma.",
            "answers": {"base": record(passed=number // 3 != 1), "tutor": record(passed=number // 3 != 2)},
        }
        for number in range(9)
    ]  # fmt: skip


def evaluated(answers: list[dict[str, Any]]) -> dict[str, Any]:
    records = {name: [item["answers"][name] for item in answers] for name in ("base", "tutor")}
    models = {name: {"file": f"{name}-Q8_0", **rates.summarise(answers, found)} for name, found in records.items()}
    change = {"before": "base", "after": "tutor", **rates.changes(answers, records["base"], records["tutor"], 1)}
    copied = {"tutor": {"n": 9, "median": 2.0, "longest": 30, "half_copied": 1}}
    rest = {"paraphrases": change["all"]["passed"], "copied": copied, "findings": []}
    return {"models": models, "differences": [change], **rest}


def forgotten() -> dict[str, Any]:
    general = drift({"base": [1.0] * 7, "tutor": [1.2] * 7}, [{"language": "es", "kind": "poem"}] * 7, 1)
    findings = [{"conclusion": "worse", "text": "general texts: 4.00 before and 5.00 after"}]
    return {"general": general, "findings": findings}


def compared(*, measure: str = "passed", left_out: dict[str, str] | None = None) -> dict[str, Any]:
    """The results of `tutor baselines`: the tutor is better than the base, and costs more."""
    records = {"base": [record(passed=False)] * 9, "tutor": [record(passed=True)] * 8 + [record(passed=False)]}
    difference = {"n": 9, "higher": 8, "lower": 0, "mean": 0.8889, "low": 0.5, "high": 1.0, "conclusion": "better"}
    if measure == "chrf":
        difference |= {"mean": 22.5, "low": None, "high": None, "conclusion": "no difference shown"}
    score = {"passed": (0.0, 0.8889), "chrf": (11.0, 33.5)}[measure]
    costs = ({"prompt_tokens": 41.5, "tokens": 200.0, "seconds": 1.25}, dict.fromkeys(("prompt_tokens", "tokens")))
    ways = {
        name: {**rates.summarise(prompts_with_answers(), found), **costs[place], "score": score[place]}
        for place, (name, found) in enumerate(records.items())
    }
    ways["tutor"]["seconds"] = None
    decision = {"measure": measure, "n": 9, "outcome": "tune", "to_tuned": {"base": difference}}
    decision["sentence"] = "Best: tutor <8 of 9>; fine-tuning pays."
    texts = {"language": "es", "system": "Be brief.", "line": "Responde en español."}
    return {"ways": ways, "decision": decision, "left_out": left_out or {}, "files": {"tutor": "ab" * 32}, **texts}


def without(outputs: StageOutputs, *folders: str) -> StageOutputs:
    left = {name: each for name, each in outputs.manifests.items() if name not in folders}
    gone = {"answers": (), "paraphrased": ()} if "eval" in folders else {}
    return replace(outputs, manifests=left, **gone, metrics=() if "adapter" in folders else outputs.metrics)
