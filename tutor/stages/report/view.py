"""The values of the report's page, for its template. Reads no file and writes no HTML.

In: the manifests and result files of the stages that have run. Out: a dictionary a section, None where the stage has
not run; the missing sections with the commands that make them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tutor.artifacts.layout import BASELINES, OLLAMA_EVALUATION, OLLAMA_PARITY, PUBLISHED_EVALUATION, gguf_name
from tutor.artifacts.manifest import Manifest
from tutor.formats.models.served_quantization import resolve
from tutor.prompt.base_format import BaseFormat
from tutor.prompt.format import PromptFormat
from tutor.stages.report import charts
from tutor.stages.report.baselines import baselines, current
from tutor.stages.report.tables import Json, drift_rows, ladder, megabytes, parity, percent, references, verdicts

MISSING = {
    "base": ("the base model", "tutor base"),
    "adapter": ("the training", "tutor train"),
    "merged": ("the merge", "tutor merge"),
    "gguf": ("the GGUF files", "tutor convert"),
    "ladder": ("the quantization benchmark", "tutor ladder"),
    "parity": ("the parity gate", "tutor parity"),
    "eval": ("the verdicts and answers", "tutor eval"),
}
"""By folder: the section that the page lacks without the folder, and the command that makes it."""
EVALUATIONS = ("eval", PUBLISHED_EVALUATION, OLLAMA_EVALUATION)
"""Folders of answers; the first one that is there is shown."""
VARIANTS = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}
"""Names of adapters by train.variant."""
PLAIN = "plain"
"""Tone of a tile without a verdict."""


@dataclass(frozen=True)
class StageOutputs:
    """The outputs of the stages that have run."""

    name: str  # the recipe's
    model: str  # its name in Ollama
    manifests: Mapping[str, Manifest]  # by folder
    metrics: Sequence[Json] = ()
    answers: Sequence[Json] = ()
    published: Json = field(default_factory=dict)  # the hand-off to Ollama, recorded when the model was published
    paraphrased: Sequence[Json] = ()
    labels: Sequence[Json] = ()
    no_labels: str = ""  # why `labels` is empty
    language: str = ""  # of the prompts, as an HTML language code; "": unknown
    machine: Sequence[tuple[str, str]] = ()  # the machine that writes the page
    prompt: PromptFormat | None = None  # None: not known yet
    statistics: Json = field(default_factory=dict)  # of the rows, as the data stage counted them

    def results(self, folder: str) -> Json | None:
        """Return the results of a stage; None where the stage has not run."""
        manifest = self.manifests.get(folder)
        return None if manifest is None else manifest.results

    @property
    def evaluated(self) -> Json | None:
        """The results of the evaluate stage, or else those of base and tutor, or of the tutor alone, in Ollama."""
        return next((found for name in EVALUATIONS if (found := self.results(name))), None)

    @property
    def findings(self) -> list[Json]:
        """What the stages found, as sentences; changes for the worse come first."""
        found = [*(self.evaluated or {}).get("findings", ()), *(self.results("forgetting") or {}).get("findings", ())]
        return sorted(found, key=lambda each: each["conclusion"] != "worse")

    @property
    def ollama(self) -> Json:
        """The hand-off to Ollama from the last comparison, or else from publishing."""
        return self.results(OLLAMA_PARITY) or self.published


def view(outputs: StageOutputs) -> dict[str, Any]:
    """Return all values of the page."""
    compared = current(outputs.manifests.get(BASELINES), outputs.manifests.get("gguf"))
    evaluated, gate, benchmark = outputs.evaluated, outputs.results("parity"), outputs.results("ladder")
    general = (outputs.results("forgetting") or {}).get("general")
    return {
        "name": outputs.name,
        "model": outputs.model,
        "language": outputs.language,
        "newest": moment(max((each.started for each in outputs.manifests.values()), default="")),
        "tiles": tiles(outputs),
        "findings": outputs.findings,
        "missing": missing(outputs),
        "training": training(outputs),
        "labels": outputs.labels,
        "prompt_format": format_name(outputs.prompt),
        "no_labels": outputs.no_labels,
        "parity": parity(gate, outputs.ollama) if gate else None,
        "ladder": ladder(benchmark, outputs.results("gguf") or {}) if benchmark else None,
        "verdicts": verdicts(evaluated) if evaluated else None,
        "references": references(evaluated) if evaluated else None,
        "paraphrases": (evaluated or {}).get("paraphrases"),
        "general": drift_rows(general) if general else None,
        "copied": (evaluated or {}).get("copied"),
        "baselines": baselines(compared) if compared else None,
        "stages": stages(outputs),
        "versions": versions(outputs),
        "machine": outputs.machine,
    }


def missing(outputs: StageOutputs) -> list[dict[str, str]]:
    """Return the missing sections and the commands that make them."""
    there = {*outputs.manifests, *(("eval",) if outputs.evaluated else ())}
    return [{"what": what, "command": command} for name, (what, command) in MISSING.items() if name not in there]


def tiles(outputs: StageOutputs) -> list[dict[str, str]]:
    """Return the figures at the top of the page, each with a tone: good, bad or plain."""
    found = []
    if trained := outputs.results("adapter"):
        held = trained["held_out"]
        better = held["loss_after"] < held["loss_before"]
        value = f"{held['perplexity_before']:.1f} → {held['perplexity_after']:.1f}"
        found.append(_tile(value, "held-out perplexity, before and after training", "good" if better else "bad"))
    if evaluated := outputs.evaluated:
        name, last = list(evaluated["models"].items())[-1]
        change = next(iter(evaluated.get("differences") or ()), None)
        conclusion = change["all"]["passed"]["conclusion"] if change else ""
        against = f"; against {change['before']}: {conclusion}" if change else ""
        tone = {"better": "good", "worse": "bad"}.get(conclusion, PLAIN)
        rate = last["all"]["passed"]
        text = f"of {last['all']['n']} held-out prompts: {name} does all that was asked"
        found.append(_tile(percent(rate["share"]), f"{text}{against}", tone))
        if change and (overlap := change.get("reference")):
            tone = {"better": "good", "worse": "bad"}.get(overlap["conclusion"], PLAIN)
            what = f"chrF to the reference answers: {change['before']}, then {change['after']}; {overlap['conclusion']}"
            found.append(_tile(f"{overlap['before']:.1f} → {overlap['after']:.1f}", what, tone))
    if gate := outputs.results("parity"):
        hand_offs = [*gate["hand_offs"], *outputs.ollama.get("hand_offs", ())]
        same = sum(each["state"] == "same" for each in hand_offs)
        diverges = any(each["state"] == "diverges" for each in hand_offs)
        tone = "bad" if diverges else "good" if same == len(hand_offs) else PLAIN
        found.append(_tile(f"{same}/{len(hand_offs)}", "hand-offs between engines within their tolerance", tone))
    if (files := outputs.results("gguf")) and (served := served_kind(outputs)):
        entry = files["files"].get(gguf_name("tutor", served), {"size": 0})
        found.append(_tile(megabytes(entry["size"]), f"{served}, the file that is served", PLAIN))
    return found


def _tile(value: str, text: str, tone: str) -> dict[str, str]:
    return {"value": value, "text": text, "tone": tone}


def served_kind(outputs: StageOutputs) -> str:
    """Return the served quantization; "" where no stage has recorded one."""
    if benchmark := outputs.results("ladder"):
        return str(benchmark["served"])
    convert = outputs.manifests.get("gguf")
    named = str(convert.fields.get("recipe.served", "")) if convert else ""
    return resolve(named, chosen="")


def training(outputs: StageOutputs) -> dict[str, Any] | None:
    """Return the facts and the curves of the training."""
    manifest = outputs.manifests.get("adapter")
    if manifest is None:
        return None
    found, fields = manifest.results, manifest.fields
    held, kept = found["held_out"], found.get("kept_step")
    given: dict[str, list[tuple[float, float]]] = {
        key: [(line["step"], line[key]) for line in outputs.metrics if line.get(key) is not None]
        for key in ("loss", "perplexity", "held_out_loss", "held_out_perplexity")
    }
    given["held_out_loss"].insert(0, (0, held["loss_before"]))
    given["held_out_perplexity"].insert(0, (0, held["perplexity_before"]))
    last = max((line["step"] for line in outputs.metrics), default=None)
    mark = kept if kept != last else None
    draw = {"loss": ("loss", "held_out_loss"), "perplexity": ("perplexity", "held_out_perplexity")}
    return {
        "facts": _facts(outputs, found, fields, manifest.seconds),
        "held": held,
        "charts": [
            {"what": what, "chart": charts.curves({"training": given[ours], "held out": given[theirs]}, mark)}
            for what, (ours, theirs) in draw.items()
        ],
        "points": [line for line in outputs.metrics if line.get("held_out_loss") is not None],
        "rows": found["rows"],
    }


def _facts(outputs: StageOutputs, found: Json, fields: Json, seconds: float) -> list[tuple[str, str]]:
    """Labels and values, the most important first."""
    data = outputs.results("data") or {}
    facts = [
        ("base", str(found["base_source"])),
        ("base weights", f"sha256 {found['base_weights']}"),
        ("rows", f"{found['rows']} trained on, {found['held_out']['rows']} held out"),
    ]
    if data:
        facts.append(("data set", f"{data['rows']} rows; {data['prompts']} held-out prompts"))
    facts += turns(outputs.statistics)
    if outputs.prompt:
        facts.append(("prompt format", format_name(outputs.prompt)))
    if "recipe.rank" in fields:
        targets = ", ".join(fields["recipe.target_modules"])
        kind = VARIANTS[fields.get("recipe.variant", "lora")]
        facts.append(
            ("adapter", f"{kind} of rank {fields['recipe.rank']}, alpha {fields['recipe.alpha']}, on {targets}")
        )
        rate = f"learning rate {fields['recipe.learning_rate']:g}"
        facts.append(("schedule", f"{fields['recipe.epochs']} epochs, {found['steps']} steps, {rate}"))
    kept = f"; kept: step {found['kept_step']}" if "kept_step" in found else ""
    facts += [
        ("trainable parameters", f"{found['trainable_parameters']:,}{kept}"),
        ("precision", f"base {found['quantization']}, {found['precision']}"),
        ("duration", f"{duration(seconds)}, {found['samples_per_second']:.2f} rows a second"),
    ]
    if merged := outputs.results("merged"):
        facts.append(("merged into", f"the {merged.get('base', 'original')} base, {merged['dtype']}"))
    if fields.get("recipe.system"):
        facts.append(("system text", str(fields["recipe.system"])))
    return facts


def turns(statistics: Json) -> list[tuple[str, str]]:
    """Return the number of conversations among the training rows as a fact; none where every row has one turn."""
    counted = statistics.get("train", {})
    facts = []
    if several := counted.get("rows_of_several_turns"):
        text = f"{several} of {counted['rows']} training rows, up to {counted['most_turns']} turns"
        facts.append(("several turns", f"{text}; {counted['answers']} answers in all"))
    if thoughts := counted.get("rows_with_reasoning"):
        facts.append(("with reasoning", f"{thoughts} of {counted['rows']} training rows"))
    return facts


def format_name(prompt: PromptFormat | None) -> str:
    """Return a prompt format in words; "" for one that is not known."""
    if prompt is None:
        return ""
    if not isinstance(prompt, BaseFormat):
        return "the tutor's own (Instrucción, Respuesta); an answer ends with EOS"
    thoughts = {
        "none": "",
        "empty": "; thoughts are switched off (an empty one in every prompt)",
        "rows": f"; a thought between {' and '.join(prompt.tags)} comes before the answer",
    }
    return f"the base's chat template; an answer ends with {prompt.end}{thoughts[prompt.reasoning]}"


def stages(outputs: StageOutputs) -> list[dict[str, Any]]:
    """Return every stage that has run: time, duration, key and files."""
    return [
        {
            "name": manifest.stage,
            "folder": folder,
            "started": moment(manifest.started),
            "seconds": duration(manifest.seconds),
            "key": manifest.key,
            "files": [{"name": name, **entry} for name, entry in sorted(manifest.outputs.items())],
        }
        for folder, manifest in outputs.manifests.items()
    ]


def versions(outputs: StageOutputs) -> list[tuple[str, list[str]]]:
    """Return every package with its version; several versions where those of the stages differ."""
    found: dict[str, set[str]] = {}
    for manifest in outputs.manifests.values():
        for name, value in manifest.fields.items():
            if name.startswith("version."):
                found.setdefault(name.removeprefix("version."), set()).add(str(value))
    return [(name, sorted(values)) for name, values in sorted(found.items())]


def moment(iso: str) -> str:
    """Return the time of a manifest for people."""
    return iso.replace("T", " ").replace("+00:00", " UTC")


def duration(seconds: float) -> str:
    """Return a duration in seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
