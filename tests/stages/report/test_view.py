"""stages/report/view.py, tables.py and page.html.j2: the content of the page, its safety and its contrast."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from support.models.chat_templates import FACTS, SWITCH
from support.models.small_tokenizer import make_tokenizer
from support.outputs.report import (
    EVIL,
    Page,
    evaluated,
    hand_off_record,
    manifest,
    prompts_with_answers,
    record,
    without,
)

from tutor.prompt.encoding import RowEncoder
from tutor.prompt.template_analysis import analyse_template
from tutor.stages.report.labels import labelled_runs
from tutor.stages.report.model_card import card
from tutor.stages.report.stage import page
from tutor.stages.report.view import MISSING, StageOutputs, view


def test_page_is_well_formed_with_ordered_headings(outputs: StageOutputs) -> None:
    shown = Page(page(outputs))
    assert (shown.open, shown.wrong) == ([], [])
    levels = [int(tag[1]) for tag, _ in shown.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= before + 1 for before, later in pairwise(levels))
    ids = [attributes["id"] for _, attributes in shown.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in shown.all("a")} <= {f"#{name}" for name in ids}


def test_page_loads_and_runs_nothing(outputs: StageOutputs) -> None:
    html = page(outputs)
    shown = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in shown.tags}
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on") or name == "src"]
    assert "url(" not in html
    assert "@import" not in html
    assert "http://" not in html
    assert "https://" not in html


def test_page_shows_training_and_results(outputs: StageOutputs) -> None:
    text = " ".join(Page(page(outputs)).text.split())
    for part in (
        "hub:deepseek-ai/DeepSeek-R1-Distill-Llama-8B@", "35 trained on, 5 held out", "LoRA of rank 8, alpha 16",
        "kept: step 2", "Eres un tutor.", "20.1 → 7.4", "F16 → Q8_0", "41/96", "✓ in budget", "the nf4 base, float16",
        "Worse: general texts", "+0.10 %", "perplexity of 20.50", "code compiles", "aplicacion", "(no kind)",
        "2.14.0, 2.15.0", "ab" * 32, "a CPU", "carry loss", "1 min 1 s",
        "Spanish72.723.32+22.1 % (+22.1 to +22.1)worse", "poem72.72",
        "F16 is larger and less accurate than Q8_0", "Q8_0 in place of Q5_1 in 3 tensors",
        "not correctness: a right answer in other words scores low", "36.7 → 36.7", "Reference answer", "chrF 40",
    ):  # fmt: skip
        assert part in text, part


def test_page_names_the_prompt_format_and_the_turns(outputs: StageOutputs) -> None:
    prompt = analyse_template(SWITCH, FACTS, where="base", reasoning="rows")
    history = [{"role": "user", "content": "¿A?"}, {"role": "assistant", "content": "B."}]
    row = {"instruction": "¿Y?", "response": "No.", "history": history, "line": 5}
    counted = {"rows": 30, "rows_of_several_turns": 4, "answers": 41, "most_turns": 3, "rows_with_reasoning": 2}
    labels = labelled_runs(RowEncoder(make_tokenizer(add_bos=True)), row)
    text = " ".join(
        Page(page(replace(outputs, prompt=prompt, labels=labels, statistics={"train": counted}))).text.split()
    )
    assert "ends with <|im_end|>; a thought between <think> and </think> comes before the answer" in text
    assert "4 of 30 training rows, up to 3 turns; 41 answers in all" in text
    assert "The row of line 5, 2 turns, text 2 of 2" in text
    assert "each answer is trained with its own prompt" in text
    one = [{**labels[0], "parts": 1}]
    assert "The row of line 5, 2 turns" in " ".join(Page(page(replace(outputs, labels=one))).text.split())


def test_equal_outputs_give_equal_bytes(outputs: StageOutputs) -> None:
    assert page(outputs) == page(outputs)
    assert card(outputs) == card(outputs)


def test_texts_of_rows_are_never_markup(outputs: StageOutputs) -> None:
    answers = prompts_with_answers(EVIL)
    for item in answers:
        item["category"] = f"kind {EVIL}"
        item["topic"] = EVIL
        item["answers"] = {EVIL: {**record(passed=False, text=f"{EVIL}\n```{EVIL}\n\u202e\x1b\x07"), "reasons": [EVIL]}}
    evil = evaluated(prompts_with_answers())
    evil["findings"] = [{"conclusion": "worse", "text": EVIL}]
    row = {"instruction": EVIL, "response": EVIL}
    changed = replace(
        outputs, name=EVIL, model=EVIL, answers=answers, machine=[(EVIL, EVIL)],
        labels=labelled_runs(RowEncoder(make_tokenizer(add_bos=False), system=EVIL), row),
        manifests={**outputs.manifests, "eval": manifest(EVIL, evil, {f"version.{EVIL}": EVIL})},
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
def test_missing_stage_is_listed_with_its_command(outputs: StageOutputs, folder: str) -> None:
    shown = Page(page(without(outputs, folder)))
    assert (shown.open, shown.wrong) == ([], [])
    assert MISSING[folder][1] in shown.text
    assert card(without(outputs, folder)).startswith("---\n")


def test_page_without_any_stage_is_well_formed(outputs: StageOutputs) -> None:
    nothing = StageOutputs(name="demo", model="tutor", manifests={}, no_labels="No row can be shown.")
    shown = Page(page(nothing))
    assert (shown.open, shown.wrong) == ([], [])
    assert all(command in shown.text for _, command in MISSING.values())
    assert "The model has not been evaluated." in card(nothing)


def test_refused_gate_is_shown_before_the_sections(outputs: StageOutputs) -> None:
    refused = {"message": "F16 -> Q8_0 (quantize) diverges", "hint": "most likely: the file is damaged"}
    gate = {**outputs.manifests["parity"].results, "hand_offs": [hand_off_record(state="diverges")], "refused": refused}
    text = Page(page(replace(outputs, manifests={**outputs.manifests, "parity": manifest("parity", gate)}))).text
    assert text.index("The parity gate refuses this model.") < text.index("which tokens carry loss")
    assert "✗ diverges" in text


def test_unchecked_hand_off_shows_the_reason(outputs: StageOutputs) -> None:
    lone = hand_off_record(checks=[], tolerance=None, missing="too little memory", state="not checked")
    gate = {**outputs.manifests["parity"].results, "transformers": None, "hand_offs": [lone]}
    changed = replace(outputs, manifests={**outputs.manifests, "parity": manifest("parity", gate)})
    assert "too little memory" in Page(page(changed)).text
    assert view(changed)["tiles"][3] == {"value": "0/1", "text": view(changed)["tiles"][3]["text"], "tone": "plain"}


def test_hand_off_to_ollama_is_shown_once_compared(outputs: StageOutputs) -> None:
    ollama = manifest("parity-ollama", {"hand_offs": [hand_off_record(kind="publish", ours="Q8_0", theirs="Ollama")]})
    assert "tutor parity --host" in Page(page(outputs)).text
    text = Page(page(replace(outputs, manifests={**outputs.manifests, "parity-ollama": ollama}))).text
    assert "Q8_0 → Ollama" in text
    assert "tutor parity --host" not in text
    once = {"hand_offs": [hand_off_record(kind="publish", ours="Q8_0", theirs="Ollama, as published")]}
    assert "Ollama, as published" in Page(page(replace(outputs, published=once))).text


def test_page_without_base_shows_only_the_tutor(outputs: StageOutputs) -> None:
    answers = [{**item, "answers": {"tutor": item["answers"]["tutor"]}} for item in prompts_with_answers()]
    results = evaluated(prompts_with_answers())
    lone = {"models": {"tutor": results["models"]["tutor"]}, "differences": [], "findings": []}
    changed = replace(outputs, answers=answers, manifests={**outputs.manifests, "eval": manifest("evaluate", lone)})
    shown = Page(page(changed))
    assert (shown.open, shown.wrong) == ([], [])
    assert "base passes, tutor fails" not in shown.text
    assert "tutor passes (6)" in shown.text


def test_page_shows_verdicts_of_the_published_model_alone(outputs: StageOutputs) -> None:
    """The state after `make all`: no name of a GGUF, and one model."""
    answers = [{**item, "answers": {"ollama": item["answers"]["tutor"]}} for item in prompts_with_answers()]
    rated = {
        name: value for name, value in evaluated(prompts_with_answers())["models"]["tutor"].items() if name != "file"
    }
    copied = {"ollama": {"n": 9, "median": 2.0, "longest": 31, "half_copied": 1}}
    left = {name: each for name, each in outputs.manifests.items() if name != "eval"}
    found = {"eval-ollama": manifest("evaluate", {"models": {"ollama": rated}, "copied": copied})}
    shown = Page(page(replace(outputs, answers=answers, paraphrased=(), manifests={**left, **found})))
    assert (shown.open, shown.wrong) == ([], [])
    assert "ollama passes (6)" in shown.text
    assert "longest run 31 words" in shown.text
    assert "| | ollama |" in card(replace(outputs, answers=answers, paraphrased=(), manifests={**left, **found}))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_has_enough_contrast(outputs: StageOutputs, theme: str) -> None:
    """WCAG AA: 4.5 to 1."""
    pairs = re.findall(r"--(\w+): light-dark\(#(\w+), #(\w+)\)", page(outputs))
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


def test_page_names_no_host(outputs: StageOutputs) -> None:
    """The page is given to others."""
    private = {name: replace(made, host="portatil-de-ana") for name, made in outputs.manifests.items()}
    assert "portatil-de-ana" not in page(replace(outputs, manifests=private))
