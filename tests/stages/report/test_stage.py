"""stages/report*.py and `tutor report`: what the page says and lacks, that nothing in it runs, that a browser shows it.

Run alone with: .venv/bin/pytest tests/stages/report/test_stage.py
"""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.small_tokenizer import make_tokenizer

from tutor.artifacts.manifest import Manifest
from tutor.artifacts.stage_folder import writing
from tutor.formats.chart import ticks
from tutor.formats.html import visible
from tutor.pipeline.registry import BY_NAME
from tutor.pipeline.runner import State, inspect, run_one
from tutor.recipe.reading import read_recipe
from tutor.stages.evaluate import rates
from tutor.stages.report.charts import curves, quantizations
from tutor.stages.report.labels import labelled, sample_rows
from tutor.stages.report.model_card import card, escaped, hub_name
from tutor.stages.report.prompts import parts, prompts
from tutor.stages.report.stage import page
from tutor.stages.report.view import MISSING, StageOutputs, view

EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7*7 }}"\'--><style>*{display:none}</style>'
KINDS = ("aplicacion", "correccion", "")
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """A page's tags that stay open or close wrongly, its names, ids, links, headings and text."""

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


def handed(**changes: Any) -> dict[str, Any]:
    limit = {"kl": 0.2, "mean": None, "worst": None, "lead": None}
    item = {"kind": "quantize", "ours": "F16", "theirs": "Q8_0", "checks": CHECKS, "tolerance": limit}
    return {**item, "missing": "", "state": "same", **changes}


def record(*, passed: bool, text: str = " Hola.\n\n```ts\nlet a = 1;\n```\n\nFin.") -> dict[str, Any]:
    verdicts = {"spanish": True, "stopped": True, "answered": True, "compiles": passed, "characters": len(text)}
    reasons = [] if passed else ["its code in line 3: type error"]
    speed = {"tokens": 9, "finish": "stop", "tokens_per_second": 50.0}
    return {"text": text, **speed, "verdicts": verdicts, "passed": passed, "reasons": reasons}


def asked(text: str = "¿Qué es una interfaz?") -> list[dict[str, Any]]:
    """Nine prompts: each kind has one that both pass, one that only the tutor passes, one that only the base passes."""
    return [
        {
            "instruction": f"{text} {number}", "category": KINDS[number % 3], "topic": "tipos", "line": number,
            "expect": {"include": [["interface", "interfaz"]], "exclude": ["any"]},
            "answers": {"base": record(passed=number // 3 != 1), "tutor": record(passed=number // 3 != 2)},
        }
        for number in range(9)
    ]  # fmt: skip


def evaluated(answers: list[dict[str, Any]]) -> dict[str, Any]:
    told = {name: [item["answers"][name] for item in answers] for name in ("base", "tutor")}
    models = {name: {"file": f"{name}-Q8_0", **rates.summarise(answers, found)} for name, found in told.items()}
    change = {"before": "base", "after": "tutor", **rates.changes(answers, told["base"], told["tutor"], 1)}
    general = {"n": 2, "perplexity": {"base": 4.0, "tutor": 5.0}, "conclusion": "worse", "difference": 0.2, "low": 0.1,
               "high": 0.3, "languages": {"es": {"n": 2, "perplexity": {"base": 4.0, "tutor": 5.0}}}}  # fmt: skip
    copied = {"tutor": {"n": 9, "median": 2.0, "longest": 30, "half_copied": 1}}
    findings = [{"conclusion": "worse", "text": "general texts: 4.00 before and 5.00 after"}]
    rest = {"paraphrases": change["all"]["passed"], "general": general, "copied": copied, "findings": findings}
    return {"models": models, "differences": [change], **rest}


@pytest.fixture
def made() -> StageOutputs:
    answers = asked()
    parity = {"conversations": 9, "precision": "fp32", "served": "Q8_0", "hand_offs": [handed()]}
    files = {"files": {"tutor-Q8_0.gguf": {"size": 144_000_000, "replaced": {"Q5_1": 3}}}}
    fields = {"recipe.rank": 8, "recipe.alpha": 16, "recipe.target_modules": ["q_proj"], "recipe.epochs": 6,
              "recipe.learning_rate": 2e-4, "recipe.system": "Eres un tutor.", "version.torch": "2.14.0"}  # fmt: skip
    manifests = {
        "data": manifest("data", {"rows": 278, "train": 35, "held_out": 5, "prompts": 9, "notes": []}),
        "base": manifest("base", {"source": TRAINED["base_source"]}),
        "adapter": manifest("train", TRAINED, fields),
        "merged": manifest("merge", {"base": "nf4", "dtype": "float16"}),
        "gguf": manifest("convert", files, None, tutor__Q8_0=144_000_000, tutor__F16=270_000_000),
        "ladder": manifest("ladder", LADDER),
        "parity": manifest("parity", parity),
        "eval": manifest("evaluate", evaluated(answers)),
    }
    row = {"instruction": "¿Qué es una interfaz?", "response": "Una forma.", "line": 7}
    labels = [labelled(make_tokenizer(add_bos=True), row, "")]
    more = {"paraphrased": answers[:1], "labels": labels, "language": "es", "machine": [("processor", "a CPU")]}
    return StageOutputs(name="demo", model="tutor", manifests=manifests, metrics=METRICS, answers=answers, **more)


def without(made: StageOutputs, *folders: str) -> StageOutputs:
    left = {name: each for name, each in made.manifests.items() if name not in folders}
    gone = {"answers": (), "paraphrased": ()} if "eval" in folders else {}
    return replace(made, manifests=left, **gone, metrics=() if "adapter" in folders else made.metrics)


# --- the page


def test_the_page_is_well_formed_and_its_headings_are_in_order(made: StageOutputs) -> None:
    shown = Page(page(made))
    assert (shown.open, shown.wrong) == ([], [])
    levels = [int(tag[1]) for tag, _ in shown.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= before + 1 for before, later in pairwise(levels))
    ids = [attributes["id"] for _, attributes in shown.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in shown.all("a")} <= {f"#{name}" for name in ids}


def test_the_page_needs_nothing_else_and_runs_nothing(made: StageOutputs) -> None:
    html = page(made)
    shown = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in shown.tags}
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on") or name == "src"]
    assert "url(" not in html
    assert "@import" not in html
    assert "http://" not in html
    assert "https://" not in html


def test_the_page_says_what_was_trained_on_what_and_what_came_of_it(made: StageOutputs) -> None:
    text = " ".join(Page(page(made)).text.split())
    for said in (
        "hub:deepseek-ai/DeepSeek-R1-Distill-Llama-8B@", "35 trained on, 5 held out", "LoRA of rank 8, alpha 16",
        "kept: step 2", "Eres un tutor.", "20.1 → 7.4", "F16 → Q8_0", "41/96", "✓ in budget", "the nf4 base, float16",
        "Worse: general texts", "+0.10 %", "perplexity of 20.50", "code compiles", "aplicacion", "(no kind)",
        "2.14.0, 2.15.0", "ab" * 32, "a CPU", "carry loss", "1 min 1 s",
        "F16 is larger and less accurate than Q8_0", "Q8_0 in place of Q5_1 in 3 tensors",
    ):  # fmt: skip
        assert said in text, said


def test_the_same_stages_give_the_same_bytes(made: StageOutputs) -> None:
    assert page(made) == page(made)
    assert card(made) == card(made)


def test_what_strangers_wrote_is_text_and_never_markup(made: StageOutputs) -> None:
    answers = asked(EVIL)
    for item in answers:
        item["category"] = f"kind {EVIL}"
        item["topic"] = EVIL
        item["answers"] = {EVIL: {**record(passed=False, text=f"{EVIL}\n```{EVIL}\n\u202e\x1b\x07"), "reasons": [EVIL]}}
    evil = evaluated(asked())
    evil["findings"] = [{"conclusion": "worse", "text": EVIL}]
    row = {"instruction": EVIL, "response": EVIL}
    changed = replace(
        made, name=EVIL, model=EVIL, answers=answers, machine=[(EVIL, EVIL)],
        labels=[labelled(make_tokenizer(add_bos=False), row, EVIL)],
        manifests={**made.manifests, "eval": manifest(EVIL, evil, {f"version.{EVIL}": EVIL})},
    )  # fmt: skip
    html = page(changed)
    shown = Page(html)
    assert (shown.open, shown.wrong) == ([], [])
    assert not {"script", "img"} & {tag for tag, _ in shown.tags}
    assert len(shown.all("style")) == 1
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in html
    assert not {"\u202e", "\x1b", "\x07"} & set(html)


@pytest.mark.parametrize("folder", MISSING)
def test_what_has_not_run_is_said_with_its_command_and_is_no_error(made: StageOutputs, folder: str) -> None:
    shown = Page(page(without(made, folder)))
    assert (shown.open, shown.wrong) == ([], [])
    assert MISSING[folder][1] in shown.text
    assert card(without(made, folder)).startswith("---\n")


def test_a_page_of_nothing_is_a_page(made: StageOutputs) -> None:
    nothing = StageOutputs(name="demo", model="tutor", manifests={}, no_labels="No row can be shown.")
    shown = Page(page(nothing))
    assert (shown.open, shown.wrong) == ([], [])
    assert all(command in shown.text for _, command in MISSING.values())
    assert "It has not been evaluated." in card(nothing)


def test_a_gate_that_says_no_stands_first(made: StageOutputs) -> None:
    refused = {"message": "F16 -> Q8_0 (quantize) diverges", "hint": "most likely: the file is damaged"}
    gate = {**made.manifests["parity"].results, "hand_offs": [handed(state="diverges")], "refused": refused}
    text = Page(page(replace(made, manifests={**made.manifests, "parity": manifest("parity", gate)}))).text
    assert text.index("The parity gate refuses this model.") < text.index("which tokens carry loss")
    assert "✗ diverges" in text


def test_a_hand_off_that_was_not_checked_says_why(made: StageOutputs) -> None:
    lone = handed(checks=[], tolerance=None, missing="too little memory", state="not checked")
    gate = {**made.manifests["parity"].results, "precision": None, "hand_offs": [lone]}
    changed = replace(made, manifests={**made.manifests, "parity": manifest("parity", gate)})
    assert "too little memory" in Page(page(changed)).text
    assert view(changed)["tiles"][2] == {"value": "0/1", "text": view(changed)["tiles"][2]["text"], "tone": "plain"}


def test_what_ollama_serves_is_in_the_table_where_it_was_compared(made: StageOutputs) -> None:
    ollama = manifest("parity-ollama", {"hand_offs": [handed(kind="publish", ours="Q8_0", theirs="Ollama")]})
    assert "tutor parity --host" in Page(page(made)).text
    text = Page(page(replace(made, manifests={**made.manifests, "parity-ollama": ollama}))).text
    assert "Q8_0 → Ollama" in text
    assert "tutor parity --host" not in text
    once = {"hand_offs": [handed(kind="publish", ours="Q8_0", theirs="Ollama, as published")]}
    assert "Ollama, as published" in Page(page(replace(made, published=once))).text


def test_a_base_that_was_not_asked_leaves_the_tutor_alone(made: StageOutputs) -> None:
    answers = [{**item, "answers": {"tutor": item["answers"]["tutor"]}} for item in asked()]
    results = evaluated(asked())
    lone = {"models": {"tutor": results["models"]["tutor"]}, "differences": [], "findings": []}
    changed = replace(made, answers=answers, manifests={**made.manifests, "eval": manifest("evaluate", lone)})
    shown = Page(page(changed))
    assert (shown.open, shown.wrong) == ([], [])
    assert "only base passes" not in shown.text
    assert "tutor passes (6)" in shown.text


def test_where_only_what_ollama_serves_was_asked_its_verdicts_are_shown(made: StageOutputs) -> None:
    """As `make all` leaves it: no GGUF's name, and one model."""
    answers = [{**item, "answers": {"ollama": item["answers"]["tutor"]}} for item in asked()]
    rated = {name: value for name, value in evaluated(asked())["models"]["tutor"].items() if name != "file"}
    copied = {"ollama": {"n": 9, "median": 2.0, "longest": 31, "half_copied": 1}}
    left = {name: each for name, each in made.manifests.items() if name != "eval"}
    found = {"eval-ollama": manifest("evaluate", {"models": {"ollama": rated}, "copied": copied})}
    shown = Page(page(replace(made, answers=answers, paraphrased=(), manifests={**left, **found})))
    assert (shown.open, shown.wrong) == ([], [])
    assert "ollama passes (6)" in shown.text
    assert "longest run 31 words" in shown.text
    assert "| | ollama |" in card(replace(made, answers=answers, paraphrased=(), manifests={**left, **found}))


def test_an_emoji_of_several_stays_one_and_a_lone_joiner_is_seen() -> None:
    assert visible("👩‍💻 👩🏽‍🏫 ❤️‍🔥") == "👩‍💻 👩🏽‍🏫 ❤️‍🔥"
    assert visible("a\u200db\n") == "a�b\n"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(made: StageOutputs, theme: str) -> None:
    """WCAG AA: 4.5 to 1."""
    pairs = re.findall(r"--(\w+): light-dark\(#(\w+), #(\w+)\)", page(made))
    colours = {name: dark if theme == "dark" else light for name, light, dark in pairs}
    for text in ("text", "soft", "bar", "over", "good"):
        for ground in ("page", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert min(contrast(colours["text"], colours[ground]) for ground in ("mark", "wash")) >= 4.5
    assert contrast(colours["text"], colours["within"]) >= 3


def contrast(one: str, other: str) -> float:
    values = []
    for colour in (one, other):
        parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        values.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(values) + 0.05) / (min(values) + 0.05)


# --- prompts and filters


def test_there_is_a_filter_for_every_kind_and_verdict_and_it_hides_the_others(made: StageOutputs) -> None:
    html = page(made)
    shown = Page(html)
    listed = prompts(made.answers)
    assert [(each["label"], each["count"]) for each in listed["kinds"]] == [
        ("(no kind)", 3), ("aplicacion", 3), ("correccion", 3)
    ]  # fmt: skip
    assert {each["class"]: each["count"] for each in listed["verdicts"]} == {
        "pass": 6, "fail": 3, "won": 3, "lost": 3, "f-compiles": 3
    }  # fmt: skip
    inputs = {each["id"] for each in shown.all("input")}
    classes = [set(str(each["class"]).split()) for each in shown.all("details") if "prompt" in str(each["class"])]
    assert len(classes) == 10  # one in other words
    for each in (*listed["kinds"], *listed["verdicts"]):
        assert f"show-{each['class']}" in inputs
        assert f"#prompts:has(#show-{each['class']}:checked) .prompt:not(.{each['class']})" in html
        assert sum(each["class"] in found for found in classes[:9]) == each["count"]


def test_an_answer_that_failed_and_one_that_is_empty_are_shown_as_such(made: StageOutputs) -> None:
    item = {**asked()[0], "answers": {"base": {"error": "timed out", "passed": False, "reasons": ["no answer"]},
                                      "tutor": record(passed=False, text="")}}  # fmt: skip
    text = Page(page(replace(made, answers=[item]))).text
    assert "No answer: timed out" in text
    assert "(empty)" in text


def test_a_copied_answer_says_from_where(made: StageOutputs) -> None:
    copied = {"run": 40, "share": 0.8, "line": 12, "text": "…"}
    item = {**asked()[0], "answers": {"tutor": {**record(passed=True), "copied": copied}}}
    assert "80 % of it, 40 words and signs in a row, also stands in the training row of line 12" in " ".join(
        Page(page(replace(made, answers=[item]))).text.split()
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("hola", [(False, "hola")]),
        ("a\n\n```ts\nx\n```\n\nb", [(False, "a"), (True, "```ts\nx\n```"), (False, "b")]),
        ("```\nnever closed\n\n  x", [(True, "```\nnever closed\n\n  x")]),
        ("- a\n  ```\n  x\n  ```\nb", [(False, "- a"), (True, "  ```\n  x\n  ```"), (False, "b")]),
        ("~~~\n```\n~~~\nb", [(True, "~~~\n```\n~~~"), (False, "b")]),
    ],
)
def test_an_answer_is_cut_at_its_fences_and_loses_nothing(text: str, expected: list[tuple[bool, str]]) -> None:
    assert [(part["code"], part["text"]) for part in parts(text)] == expected


# --- labels


def test_the_completion_and_eos_are_marked_and_the_prompt_is_not(tokenizer: Any) -> None:
    row = {"instruction": "¿Qué es 👩‍💻?", "response": "Una forma.\nY ñ.", "line": 3}
    found = labelled(tokenizer, row, "Eres un tutor.")
    assert [run["learnt"] for run in found["runs"]] == [False, True]
    prompt, answer = ("".join(token["text"] for token in run["tokens"]) for run in found["runs"])
    assert prompt.endswith("Eres un tutor.↵\n↵\nInstrucción: ¿Qué es 👩‍💻?↵\nRespuesta:")
    assert answer == " Una forma.↵\nY ñ.<｜end▁of▁sentence｜>"
    assert found["runs"][1]["tokens"][-1]["special"]
    assert found["runs"][0]["tokens"][0]["special"] == (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    assert 0 < found["supervised"] < found["tokens"]


def test_the_shortest_a_middle_and_the_longest_row_are_shown() -> None:
    rows = [{"instruction": "x" * size, "response": ""} for size in (5, 1, 9, 3, 7)]
    assert [len(row["instruction"]) for row in sample_rows(rows)] == [1, 5, 9]
    assert sample_rows(rows[:1]) == rows[:1]
    assert sample_rows([]) == []


# --- charts


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (2, 2), (0, 0), (1e-9, 3e6), (-3, 700)])
def test_ticks_hold_the_values_between_them(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 8


def test_every_point_is_inside_its_chart() -> None:
    chart = curves({"training": [(1, 3.0), (2, 700.0)], "held out": [(0, 3.0), (2, 0.1)]}, 2)
    assert chart
    for line in chart["lines"]:
        for dot in line["dots"]:
            assert chart["left"] <= dot["x"] <= chart["right"]
            assert chart["top"] <= dot["y"] <= chart["floor"]
    figures = {"F16": {"size": 9, "kl": 0.0}, "Q8_0": {"size": 5, "kl": 1e-9}, "Q4_0": {"size": 4.9, "kl": 2.0}}
    drawn = quantizations(figures, 0.01, "Q8_0")
    for dot in drawn["dots"]:
        assert drawn["left"] <= dot["x"] <= drawn["right"]
        assert drawn["top"] <= dot["y"] <= drawn["floor"]
    assert curves({"training": [(1, 3.0)]}) is None


# --- the model card


def test_the_card_has_the_hubs_head_and_its_figures(made: StageOutputs) -> None:
    text = card(made)
    head = dict(line.split(": ", 1) for line in text.split("---")[1].strip().split("\n"))
    assert json.loads(head["language"]) == ["es"]
    assert json.loads(head["base_model"]) == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert json.loads(head["library_name"]) == "gguf"
    assert json.loads(head["pipeline_tag"]) == "text-generation"
    assert "| tutor-Q8\\_0.gguf | 144.0 MB | 7.40 | 0.0060 |" in text
    assert "67 % (" in text
    assert "**Worse:** general texts" in text


def test_the_card_names_no_path_and_claims_no_licence_it_does_not_know(made: StageOutputs) -> None:
    trained = {**TRAINED, "base_source": "path:/home/ana/secret"}
    text = card(replace(made, manifests={**made.manifests, "adapter": manifest("train", trained)}))
    assert "/home/ana" not in text
    assert "license" not in text
    assert "base_model" not in text


def test_a_name_cannot_break_out_of_the_card() -> None:
    assert escaped("a|b\n---\n<b>[x](y)") == "a\\|b --- &lt;b&gt;\\[x\\](y)"
    assert hub_name("hub:a/b@" + "0" * 40) == "a/b"
    assert hub_name("hub:a/b\n---\n@" + "0" * 40) == ""


# --- the stage and the command


@pytest.fixture
def build(recipe_file: Path, tmp_path: Path, made: StageOutputs) -> Path:
    """A build folder where the data stage has run, and the evaluation as far as the report reads it."""
    recipe, folder = read_recipe(recipe_file), tmp_path / "build"
    run_one("data", recipe, folder)
    with writing(folder / "small" / "eval", "evaluate", {}) as (out, results):
        results.update(made.manifests["eval"].results)
        (out / "answers.json").write_text(json.dumps(made.answers))
    return folder


def state(recipe_file: Path, build: Path) -> State:
    return {each.stage.name: each for each in inspect(read_recipe(recipe_file), build)}["report"]


def test_the_stage_takes_what_is_there_and_is_made_again_when_more_is(recipe_file: Path, build: Path) -> None:
    recipe = read_recipe(recipe_file)
    assert run_one("report", recipe, build)
    made = state(recipe_file, build)
    assert made.condition == "up to date"
    assert made.manifest
    assert made.manifest.results["prompts"] == 9
    assert set(made.manifest.outputs) == {"report.html", "README.md"}
    assert "the verdicts and answers" not in made.manifest.results["missing"]
    assert not run_one("report", recipe, build)
    with writing(build / "small" / "ladder", "ladder", {}) as (_, results):
        results.update(LADDER)
    assert state(recipe_file, build).condition == "stale"
    assert run_one("report", recipe, build)


def test_a_changed_recipe_elsewhere_leaves_the_page(recipe_file: Path, build: Path) -> None:
    run_one("report", read_recipe(recipe_file), build)
    recipe_file.write_text(recipe_file.read_text() + "[train]\nrank = 4\n")
    assert state(recipe_file, build).condition == "up to date"


def test_the_last_stage_is_the_report() -> None:
    assert list(BY_NAME)[-1] == "report"
    assert set(BY_NAME["report"].reads) >= {stage.folder for stage in BY_NAME.values()} - {"data", "model", "report"}


def test_the_command_prints_where_the_page_is(tutor: Any, recipe_file: Path, build: Path) -> None:
    done = tutor("report", "-r", recipe_file, "-b", build)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.splitlines()[0])
    assert path == build / "small" / "report" / "report.html"
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert "the training" in done.stdout
    found = json.loads(tutor("report", "-r", recipe_file, "-b", build, "--json").stdout)
    assert found["page"] == str(path)
    assert found["ran"] is False


def test_open_shows_the_page_in_the_users_browser(tutor: Any, recipe_file: Path, build: Path, tmp_path: Path) -> None:
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/shown\n')
    browser.chmod(0o755)
    done = tutor("report", "--open", "-r", recipe_file, "-b", build, env={"BROWSER": f"{browser} %s"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shown").read_text().strip() == (build / "small/report/report.html").resolve().as_uri()


def test_damaged_answers_are_one_line(tutor: Any, recipe_file: Path, build: Path) -> None:
    (build / "small" / "eval" / "answers.json").write_text("{")
    done = tutor("report", "-r", recipe_file, "-b", build)
    assert done.returncode == 5
    assert "answers.json" in done.stderr
    assert "tutor eval" in done.stderr


# --- a real browser


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAME = '<iframe id="f" src="report.html" style="width:390px;height:900px;border:0"></iframe>'
PHONE = f'<!doctype html><body style="margin:0">{FRAME}'
PROBE = """<script>addEventListener('load', () => { const seen = f.contentDocument, root = seen.documentElement;
const shown = () => [...seen.querySelectorAll('#prompts .prompt')].filter(each => each.offsetParent).length;
const counts = [...seen.querySelectorAll('input')].map(one => { one.checked = true; const n = shown();
seen.getElementById(one.name === 'kind' ? 'show-kinds' : 'show-verdicts').checked = true; return [one.id, n]; });
const ground = getComputedStyle(seen.body).backgroundColor;
document.title = JSON.stringify({width: root.scrollWidth, counts, ground}); });
</script>"""


def browse(tmp_path: Path, page_file: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--v=0", "--allow-file-access-from-files", *options, page_file.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=90, check=False)


def probed(tmp_path: Path, *options: str) -> dict[str, Any]:
    """What a script of the test's own sees of the page in a frame of 390 pixels."""
    (tmp_path / "probe.html").write_text(PHONE + PROBE)
    done = browse(
        tmp_path, tmp_path / "probe.html", "--dump-dom", "--hide-scrollbars", "--window-size=800,1000", *options
    )
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found, done.stderr
    value: dict[str, Any] = json.loads(found[1])
    return value


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_shows_it_without_a_word_on_its_console(made: StageOutputs, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page(made), "utf-8")
    done = browse(
        tmp_path, tmp_path / "report.html", f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,2000"
    )
    assert "CONSOLE" not in done.stderr
    assert (tmp_path / "page.png").stat().st_size > 50_000


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_filters_work_on_a_phone_and_nothing_is_wider_than_it(made: StageOutputs, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page(made), "utf-8")
    light, dark = (probed(tmp_path, f"--blink-settings=preferredColorScheme={scheme}") for scheme in (1, 0))
    assert light["width"] == 390
    listed = prompts(made.answers)
    wanted = {f"show-{each['class']}": each["count"] for each in (*listed["kinds"], *listed["verdicts"])}
    assert dict(light["counts"]) == {"show-kinds": 9, "show-verdicts": 9, **wanted}
    assert light["ground"] != dark["ground"]
