"""What the report says, as plain values for its template: no file is read here, and no HTML is made.

In: manifests of the stages that are there, and what lies in their folders. Out: a dictionary a section, None where the
stage has not run. Whatever is missing is named with the command that makes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tutor.artifacts.layout import gguf_name
from tutor.artifacts.manifest import Manifest
from tutor.stages.report import charts
from tutor.stages.report.tables import Json, ladder, megabytes, parity, percent, verdicts

MISSING = {
    "base": ("the base model", "tutor base"),
    "adapter": ("the training", "tutor train"),
    "merged": ("the merge", "tutor merge"),
    "gguf": ("the GGUF files", "tutor convert"),
    "ladder": ("what each quantization loses", "tutor ladder"),
    "parity": ("the parity gate", "tutor parity"),
    "eval": ("the verdicts and answers", "tutor eval"),
}
"""By folder: what the page lacks without it, and what makes it."""
PLAIN = "plain"


@dataclass(frozen=True)
class Made:
    """What the stages left, as far as it is there."""

    name: str  # the recipe's
    model: str  # what Ollama calls it
    manifests: Mapping[str, Manifest]  # by folder
    metrics: Sequence[Json] = ()
    answers: Sequence[Json] = ()
    published: Json = field(default_factory=dict)  # the hand-off to Ollama, when it was published
    paraphrased: Sequence[Json] = ()
    labels: Sequence[Json] = ()
    no_labels: str = ""  # why there are none
    language: str = ""  # of the prompts, as HTML has it; "": not known
    machine: Sequence[tuple[str, str]] = ()  # where the page was written

    def results(self, folder: str) -> Json | None:
        """What a stage found out; None where it has not run."""
        manifest = self.manifests.get(folder)
        return None if manifest is None else manifest.results

    @property
    def evaluated(self) -> Json | None:
        """The verdicts: the stage's, or else those on the published model."""
        return self.results("eval") or self.results("eval-ollama")

    @property
    def ollama(self) -> Json:
        """The hand-off to Ollama: as it was compared last, or else as it was published."""
        return self.results("parity-ollama") or self.published


def view(made: Made) -> dict[str, Any]:
    """All values of the page."""
    evaluated, gate, benchmark = made.evaluated, made.results("parity"), made.results("ladder")
    return {
        "name": made.name,
        "model": made.model,
        "language": made.language,
        "made": moment(max((each.started for each in made.manifests.values()), default="")),
        "tiles": tiles(made),
        "findings": list((evaluated or {}).get("findings", ())),
        "missing": missing(made),
        "training": training(made),
        "labels": made.labels,
        "no_labels": made.no_labels,
        "parity": parity(gate, made.ollama) if gate else None,
        "ladder": ladder(benchmark, made.results("gguf") or {}) if benchmark else None,
        "verdicts": verdicts(evaluated) if evaluated else None,
        "paraphrases": (evaluated or {}).get("paraphrases"),
        "general": (evaluated or {}).get("general"),
        "copied": (evaluated or {}).get("copied"),
        "stages": stages(made),
        "versions": versions(made),
        "machine": made.machine,
    }


def missing(made: Made) -> list[dict[str, str]]:
    """What has not run, and what makes it."""
    there = {*made.manifests, *(("eval",) if made.evaluated else ())}
    return [{"what": what, "command": command} for name, (what, command) in MISSING.items() if name not in there]


def tiles(made: Made) -> list[dict[str, str]]:
    """The figures that stand first, each with a tone: good, bad or plain."""
    found = []
    if trained := made.results("adapter"):
        held = trained["held_out"]
        better = held["loss_after"] < held["loss_before"]
        value = f"{held['perplexity_before']:.1f} → {held['perplexity_after']:.1f}"
        found.append(_tile(value, "held-out perplexity, before and after training", "good" if better else "bad"))
    if evaluated := made.evaluated:
        name, last = list(evaluated["models"].items())[-1]
        change = next(iter(evaluated.get("differences") or ()), None)
        conclusion = change["all"]["passed"]["conclusion"] if change else ""
        tone = {"better": "good", "worse": "bad"}.get(conclusion, PLAIN)
        rate = last["all"]["passed"]
        text = f"of {last['all']['n']} held-out prompts: {name} does all that was asked"
        found.append(_tile(percent(rate["share"]), f"{text}{f'; {conclusion}' if conclusion else ''}", tone))
    if gate := made.results("parity"):
        handed = [*gate["hand_offs"], *made.ollama.get("hand_offs", ())]
        same = sum(each["state"] == "same" for each in handed)
        apart = any(each["state"] == "diverges" for each in handed)
        tone = "bad" if apart else "good" if same == len(handed) else PLAIN
        found.append(_tile(f"{same}/{len(handed)}", "hand-offs between engines within their tolerance", tone))
    if (files := made.results("gguf")) and (served := served_kind(made)):
        entry = files["files"].get(gguf_name("tutor", served), {"size": 0})
        found.append(_tile(megabytes(entry["size"]), f"{served}, the file that is served", PLAIN))
    return found


def _tile(value: str, text: str, tone: str) -> dict[str, str]:
    return {"value": value, "text": text, "tone": tone}


def served_kind(made: Made) -> str:
    """The quantization that is served; "" where nothing says."""
    if benchmark := made.results("ladder"):
        return str(benchmark["served"])
    convert = made.manifests.get("gguf")
    named = str(convert.fields.get("recipe.served", "")) if convert else ""
    return "" if named == "auto" else named


def training(made: Made) -> dict[str, Any] | None:
    """What was trained on what, and its curves."""
    manifest = made.manifests.get("adapter")
    if manifest is None:
        return None
    found, asked = manifest.results, manifest.fields
    held, kept = found["held_out"], found.get("kept_step")
    given: dict[str, list[tuple[float, float]]] = {
        key: [(line["step"], line[key]) for line in made.metrics if line.get(key) is not None]
        for key in ("loss", "perplexity", "held_out_loss", "held_out_perplexity")
    }
    given["held_out_loss"].insert(0, (0, held["loss_before"]))
    given["held_out_perplexity"].insert(0, (0, held["perplexity_before"]))
    last = max((line["step"] for line in made.metrics), default=None)
    mark = kept if kept != last else None
    draw = {"loss": ("loss", "held_out_loss"), "perplexity": ("perplexity", "held_out_perplexity")}
    return {
        "facts": _trained(made, found, asked, manifest.seconds),
        "held": held,
        "charts": [
            {"what": what, "chart": charts.curves({"training": given[ours], "held out": given[theirs]}, mark)}
            for what, (ours, theirs) in draw.items()
        ],
        "points": [line for line in made.metrics if line.get("held_out_loss") is not None],
        "rows": found["rows"],
    }


def _trained(made: Made, found: Json, asked: Json, seconds: float) -> list[tuple[str, str]]:
    """Labels and values, in the order in which one asks."""
    data = made.results("data") or {}
    facts = [
        ("base", str(found["base_source"])),
        ("base weights", f"sha256 {found['base_weights']}"),
        ("rows", f"{found['rows']} trained on, {found['held_out']['rows']} held out"),
    ]
    if data:
        facts.append(("of a set of", f"{data['rows']} rows; {data['prompts']} held-out prompts"))
    if "recipe.rank" in asked:
        targets = ", ".join(asked["recipe.target_modules"])
        facts.append(("adapter", f"LoRA of rank {asked['recipe.rank']}, alpha {asked['recipe.alpha']}, on {targets}"))
        rate = f"learning rate {asked['recipe.learning_rate']:g}"
        facts.append(("passes", f"{asked['recipe.epochs']} epochs, {found['steps']} steps, {rate}"))
    kept = f"; kept: step {found['kept_step']}" if "kept_step" in found else ""
    facts += [
        ("trained weights", f"{found['trainable_parameters']:,}{kept}"),
        ("computed in", f"base {found['quantization']}, {found['precision']}"),
        ("took", f"{duration(seconds)}, {found['samples_per_second']:.2f} rows a second"),
    ]
    if merged := made.results("merged"):
        facts.append(("merged into", f"the {merged.get('base', 'original')} base, {merged['dtype']}"))
    if asked.get("recipe.system"):
        facts.append(("system text", str(asked["recipe.system"])))
    return facts


def stages(made: Made) -> list[dict[str, Any]]:
    """Every stage that is there: when, how long, where, its key and its files."""
    return [
        {
            "name": manifest.stage,
            "folder": folder,
            "started": moment(manifest.started),
            "seconds": duration(manifest.seconds),
            "host": manifest.host,
            "key": manifest.key,
            "files": [{"name": name, **entry} for name, entry in sorted(manifest.outputs.items())],
        }
        for folder, manifest in made.manifests.items()
    ]


def versions(made: Made) -> list[tuple[str, list[str]]]:
    """Every package that had a part, with its version; several where stages had different ones."""
    found: dict[str, set[str]] = {}
    for manifest in made.manifests.values():
        for name, value in manifest.fields.items():
            if name.startswith("version."):
                found.setdefault(name.removeprefix("version."), set()).add(str(value))
    return [(name, sorted(values)) for name, values in sorted(found.items())]


def moment(iso: str) -> str:
    """A manifest's time as people read it."""
    return iso.replace("T", " ").replace("+00:00", " UTC")


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
