"""The whole chain on a tiny model of every family with every kind of prompt, published where a server answers.

In: cells (a family, a prompt, a reasoning), a folder, the address of a server. Out: one outcome a cell: its hand-offs
as the parity stage records them, that to Ollama, seconds. Rows and models are made here; each cell is a recipe of its
own in the folder, which every command takes. A published model is deleted again. Trains nothing that answers questions.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tutor.artifacts.provenance import version_text
from tutor.engines.llamacpp.build import VERSION, build_key
from tutor.engines.ollama.client import connect
from tutor.errors import HostError, LockError, TutorError
from tutor.formats.models.model_config import equal_length
from tutor.pipeline import runner
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe
from tutor.serving import publish

log = logging.getLogger(__name__)

LENGTH = 512
"""Maximum number of tokens of a row and of a context."""
SEED = 7
"""Seed of models and recipes."""
PROMPTS = ("tutor", "base")
"""Values of the recipe's `prompt`."""
KIND = "Q8_0"
"""The quantization of every cell: one, so that the matrix takes minutes."""
PACKAGES = ("tutor", "torch", "transformers", "tokenizers", "peft", "gguf")
"""Packages whose versions decide an outcome."""
ROWS = "rows.jsonl"
"""File of the rows of all cells."""
THOUGHTS = "reasoning.jsonl"
"""File of the same rows with thoughts before their answers."""
ASKED = "prompts.jsonl"
"""File of the held-out prompts."""
MODELS = "models"
"""Folder of the tiny models, one folder a family."""
RECIPE = """# A cell of tutor matrix, which writes this file anew.
seed = {seed}
prompt = "{prompt}"
reasoning = "{reasoning}"

[data]
train = "{rows}"
eval = "{prompts}"
held_out = 0.2

[base]
source = "{source}"

[train]
target_modules = "all-linear"
epochs = 1
batch_size = 4
accumulation = 1
learning_rate = 5e-3
max_length = {length}
evaluations_per_epoch = 0
logging_steps = 4

[convert]
quantizations = ["{kind}"]
base = false

[generate]
max_new_tokens = 16
context = {length}

[ollama]
model = "{model}"
quantization = "{kind}"
"""
"""Recipe of a cell: the default settings where the size of the model does not matter."""
COLUMNS = {"merge": "merge", "convert": "convert", "quantize": KIND, "publish": "Ollama"}
"""Columns of the table, by the kind of the hand-off."""


@dataclass(frozen=True)
class Cell:
    """A family with a kind of prompt."""

    family: str
    prompt: str = "tutor"
    reasoning: str = "none"

    @property
    def name(self) -> str:
        """Name of the cell's recipe and folder."""
        return "-".join((self.family, *self.parts)).replace("_", "-")

    @property
    def parts(self) -> tuple[str, ...]:
        """The prompt, and the reasoning where there is one."""
        return (self.prompt,) if self.reasoning == "none" else (self.prompt, self.reasoning)


@dataclass(frozen=True)
class Outcome:
    """What came of a cell; `problem`: why it is no full success, in one line."""

    cell: Cell
    hand_offs: tuple[Mapping[str, Any], ...]
    seconds: float  # of all stages, as their manifests record them
    ollama: str  # the version of the server; "" where none answered
    problem: str = ""

    def record(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        return {**asdict(self), "hand_offs": list(self.hand_offs)}


def cells(families: Sequence[str], prompts: Sequence[str] = PROMPTS) -> list[Cell]:
    """Return every cell of these families and prompts, the base's own with every reasoning that its template knows."""
    from tutor.stages.base.tiny_families import FAMILIES

    found = []
    for family in families:
        for prompt in prompts:
            reasonings = FAMILIES[family].reasonings if prompt == "base" else ("none",)
            found += [Cell(family, prompt, reasoning) for reasoning in reasonings]
    return found


def write_rows(folder: Path) -> None:
    """Write the rows and the held-out prompts of all cells: small sums, and constants with their code."""
    folder.mkdir(parents=True, exist_ok=True)
    sums = [(left, right) for left in range(2, 8) for right in range(2, 6)]
    rows = [{"instruction": f"¿Cuánto es {a} + {b}?", "response": f"Son {a + b}.", "category": "suma"} for a, b in sums]
    rows += [
        {
            "instruction": f"Declara la constante `n{a}` con el valor {a * b}.",
            "response": f"Se escribe así:\n\n```ts\nconst n{a}: number = {a * b};\n```",
            "category": "código",
        }
        for a, b in sums[::3]
    ]
    thoughts = [{**row, "reasoning": f"Leo la pregunta de {row['category']} y respondo."} for row in rows]
    prompts = [{"instruction": f"¿Cuánto es {a} + 9?", "category": "suma"} for a in (2, 5)]
    for name, content in ((ROWS, rows), (THOUGHTS, thoughts), (ASKED, prompts)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (folder / name).write_text(text, "utf-8")


def make_models(folder: Path, families: Sequence[str]) -> None:
    """Make the tiny models of these families; their tokenizers learn the rows."""
    from tutor.stages.base.tiny_families import make_family

    rows = [json.loads(line) for line in (folder / ROWS).read_text("utf-8").splitlines()]
    text = "\n".join(f"{row['instruction']}\n{row['response']}" for row in rows)
    for family in families:
        log.info("making the tiny model %s", family)
        make_family(folder / MODELS / family, family, text, SEED, warm=True)


def run_cell(cell: Cell, folder: Path, host: str | None, *, served: bool) -> Outcome:
    """Run every stage of a cell, publish its model where a server answers (`served`), delete it there; return all.

    A refusal of a stage or of the server is the outcome's `problem`. Raises HostError for what this machine lacks and
    LockError for a folder that another process holds.
    """
    recipe = write_recipe(cell, folder)
    version, problem, published = "", "", []
    try:
        runner.run_all(recipe, folder)
        if served:
            result = publish_once(recipe, folder, host)
            version, published = result["version"], [result["parity"]]
    except (HostError, LockError):
        raise
    except TutorError as error:
        problem = f"{error.stage}: {error}" if error.stage else str(error)
    states = [state for state in runner.inspect(recipe, folder) if state.condition in runner.NOTHING_TO_DO]
    made = {state.stage.name: state.manifest for state in states if state.manifest}
    hand_offs = made["parity"].results["hand_offs"] if "parity" in made else []
    return Outcome(cell, (*hand_offs, *published), sum(item.seconds for item in made.values()), version, problem)


def write_recipe(cell: Cell, folder: Path) -> Recipe:
    """Write the recipe of a cell into the folder, and read it."""
    path = folder / f"{cell.name}.toml"
    from tutor.stages.base.tiny_families import FAMILIES

    family = FAMILIES[cell.family]
    config = {"model_type": family.model_type, "num_hidden_layers": family.layers, "max_position_embeddings": LENGTH}
    length = equal_length({**config, **family.config}) or LENGTH
    rows = THOUGHTS if cell.reasoning == "rows" else ROWS
    values = {"seed": SEED, "rows": rows, "prompts": ASKED, "source": f"path:{MODELS}/{cell.family}", "kind": KIND}
    named = {"model": f"tutor-matrix-{cell.name}", "prompt": cell.prompt, "reasoning": cell.reasoning, "length": length}
    path.write_text(RECIPE.format(**values, **named), "utf-8")
    return read_recipe(path)


def publish_once(recipe: Recipe, folder: Path, host: str | None) -> Mapping[str, Any]:
    """Publish the cell's model, compare it, delete it from the server; return the result of publishing."""
    result = publish.publish(recipe, folder, host=host, wait=0)
    with connect(host) as server:
        server.delete(result["tag"])
    return result


def versions(outcomes: Sequence[Outcome], absent: str | None) -> dict[str, str]:
    """Return the versions of the programs and packages that decide an outcome; `absent`: why no server answered."""
    servers = sorted({each.ollama for each in outcomes if each.ollama})
    return {
        "llama.cpp": f"of llama_cpp_python {VERSION}, build {build_key()}",
        **{name: version_text(name) for name in PACKAGES},
        "Ollama": ", ".join(servers) or absent or "published nothing",
    }


def table(result: Mapping[str, Any]) -> list[str]:
    """Return a matrix (`versions` and the `cells` as records) as lines: a row a cell, each problem, the versions."""
    names = [" ".join(value for value in each["cell"].values() if value != "none") for each in result["cells"]]
    width = max(len(name) for name in ("family, prompt", *names)) + 2
    rows = [f"{'family, prompt':<{width}}" + "".join(f"{name:>10}" for name in (*COLUMNS.values(), "seconds"))]
    for name, each in zip(names, result["cells"], strict=True):
        shown = {item["kind"]: _figure(item) for item in each["hand_offs"]}
        figures = "".join(f"{shown.get(kind, '-'):>10}" for kind in COLUMNS)
        rows.append(f"{name:<{width}}{figures}{each['seconds']:>10.0f}")
    problems = [f"{name}: {each['problem']}" for name, each in zip(names, result["cells"], strict=True)]
    made_with = "; ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [*rows, *(line for line in problems if not line.endswith(": ")), f"Made with {made_with}"]


def _figure(item: Mapping[str, Any]) -> str:
    """The mean difference of a hand-off's log-probabilities in nats a token, or its state where it is not "same"."""
    figures = {check["name"]: check["figures"] for check in item["checks"]}.get("log-probabilities", {})
    return f"{figures['mean']:.2g}" if item["state"] == "same" and "mean" in figures else str(item["state"])
