"""The stages in order: what each reads, what is up to date, what runs.

In: a recipe and a build folder. Out: stage folders (artifacts.py). A stage's key is a hash over the part of the recipe
that it reads, the content of its inputs, and the versions of its code and tools; same key, nothing to do.
"""

import importlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tutor import artifacts, capacity
from tutor.engines import llamacpp_build, processes
from tutor.errors import GateError, RecipeError
from tutor.recipe import Recipe
from tutor.stages import checkpoint
from tutor.stages.lineage import TOOLS, recipe_hash

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent
REFUSED = "refused"
"""The key of a gate's results that says no: a `message` and a `hint`."""
MADE = ("up to date", REFUSED)
"""The conditions of a stage that has nothing to do: asked again, a gate says the same."""


@dataclass(frozen=True)
class Stage:
    """One step: a module, a folder, and all that decides whether it has to run."""

    name: str
    folder: str
    about: str
    needs: tuple[str, ...]
    settings: Callable[[Recipe], dict[str, Any]]
    sources: tuple[str, ...]  # files of tutor/ whose change means another result
    packages: tuple[str, ...] = ()
    llamacpp: bool = False
    files: Callable[[Recipe], Mapping[str, Path]] = lambda _: {}  # the user's, beside the folders of `needs`
    beside: str = ""  # a pattern: what commands outside the pipeline make of its folder, removed with it
    resumes: bool = False  # goes on after a kill with what it had finished
    reads: tuple[str, ...] = ()  # folders and files that it takes where they are there, and needs none of

    @property
    def module(self) -> Any:
        """The stage's module, imported now: some bring torch."""
        return importlib.import_module(f"tutor.stages.{self.name}")


def _data(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.data.model_dump(exclude={"train", "eval"}), "seed": recipe.seed}


def _base(recipe: Recipe) -> dict[str, Any]:
    made_here = {"seed": recipe.seed} if recipe.base.source == "tiny" else {}
    return {"source": recipe.base.source, **made_here}


def _train(recipe: Recipe) -> dict[str, Any]:
    return {**recipe.train.model_dump(), "system": recipe.system, "seed": recipe.seed}


def _merge(recipe: Recipe) -> dict[str, Any]:
    trained = {"quantization": recipe.train.quantization, "system": recipe.system}
    return {**recipe.merge.model_dump(), **(trained if recipe.merge.base == "auto" else {})}


def _convert(recipe: Recipe) -> dict[str, Any]:
    made = recipe.convert.model_dump(exclude={"budget"})
    text = {"system": recipe.system} if recipe.convert.imatrix else {}
    return {**made, **text, "served": recipe.ollama.quantization, "lineage": recipe_hash(recipe)}


def _ladder(recipe: Recipe) -> dict[str, Any]:
    chosen_from = {"quantizations": recipe.convert.quantizations, "base": recipe.convert.base}
    how = {"budget": recipe.convert.budget, "context": recipe.generate.context, "system": recipe.system}
    return {**chosen_from, **how, "served": recipe.ollama.quantization}


def _parity(recipe: Recipe) -> dict[str, Any]:
    served = {"served": recipe.ollama.quantization, "context": recipe.generate.context}
    return {**recipe.parity.model_dump(), **served, "system": recipe.system}


def _modelfile(recipe: Recipe) -> dict[str, Any]:
    served = {"generate": recipe.generate.model_dump(), "ollama": recipe.ollama.model_dump()}
    return {**served, "system": recipe.system, "seed": recipe.seed}


def _evaluate(recipe: Recipe) -> dict[str, Any]:
    names = ("max_new_tokens", "context", "repetition_penalty")
    greedy = {name: getattr(recipe.generate, name) for name in names}
    return {**greedy, "served": recipe.ollama.quantization, "system": recipe.system, "seed": recipe.seed}


def _report(recipe: Recipe) -> dict[str, Any]:
    return {"name": recipe.name, "model": recipe.ollama.model, "system": recipe.system}


def _evaluate_files(recipe: Recipe) -> Mapping[str, Path]:
    from tutor.stages.honesty import named_files

    return named_files(recipe)


STAGES = (
    Stage(
        "data",
        "data",
        "check the rows and split them",
        needs=(),
        settings=_data,
        sources=("stages/data.py", "stages/rows.py", "stages/jsonl.py", "judges/fences.py", "template.py"),
        packages=("pydantic", "markdown-it-py"),
    ),
    Stage(
        "base",
        "base",
        "fetch or make the base model and check it",
        needs=(),
        settings=_base,
        sources=("stages/base.py", "stages/tiny.py", "modelfolder.py", "engines/gguf_file.py", "template.py"),
        packages=("transformers", "tokenizers", "torch", "gguf"),
    ),
    Stage(
        "train",
        "adapter",
        "train the LoRA adapter",
        needs=("data", "base"),
        settings=_train,
        sources=checkpoint.SOURCES,
        packages=checkpoint.PACKAGES,
        beside="lora*",
    ),
    Stage(
        "merge",
        "merged",
        "merge the adapter into the 16-bit base",
        needs=("data", "base", "train"),
        settings=_merge,
        sources=(
            "stages/merge.py",
            "engines/layerwise.py",
            "engines/lora.py",
            "engines/merging.py",
            "engines/nf4.py",
            "engines/tensor_files.py",
            "modelfolder.py",
            "template.py",
        ),
        packages=("torch", "transformers", "safetensors", "bitsandbytes"),
        resumes=True,
    ),
    Stage(
        "convert",
        "gguf",
        "convert to GGUF and quantize",
        needs=("data", "base", "train", "merge"),
        settings=_convert,
        sources=(
            "stages/convert.py",
            "stages/gguf_says.py",
            "stages/lineage.py",
            "stages/readback.py",
            "stages/splits.py",
            "modelfolder.py",
            "engines/llamacpp_convert.py",
            "engines/llamacpp_process.py",
            "engines/gguf_file.py",
            "engines/gguf_weights.py",
            "engines/llamacpp_src/convert.py",
            "template.py",
        ),
        packages=("tutor", *TOOLS),
        llamacpp=True,
    ),
    Stage(
        "ladder",
        "ladder",
        "measure what each quantization loses",
        needs=("data", "base", "convert"),
        settings=_ladder,
        sources=(
            "stages/ladder.py",
            "stages/ladder_plot.py",
            "stages/splits.py",
            "served.py",
            "engines/llamacpp.py",
            "engines/llamacpp_process.py",
            "engines/llamacpp_score.py",
            "template.py",
        ),
        llamacpp=True,
    ),
    Stage(
        "parity",
        "parity",
        "compare every engine that the model passes",
        needs=("data", "base", "train", "merge", "convert", "ladder"),
        settings=_parity,
        sources=(
            "stages/parity.py",
            "stages/parity_collect.py",
            "stages/parity_compare.py",
            "stages/parity_gate.py",
            "stages/parity_ollama.py",
            "stages/parity_set.py",
            "served.py",
            "engines/hf.py",
            "engines/hf_trace.py",
            "engines/llamacpp.py",
            "engines/llamacpp_process.py",
            "engines/llamacpp_score.py",
            "engines/llamacpp_trace.py",
            "engines/trace.py",
            "modelfolder.py",
            "template.py",
        ),
        packages=("torch", "transformers", "peft", "bitsandbytes"),
        llamacpp=True,
        beside="parity-*",
    ),
    Stage(
        "modelfile",
        "model",
        "render the Modelfile",
        needs=("base", "convert", "ladder"),
        settings=_modelfile,
        sources=("stages/modelfile.py", "served.py", "template.py"),
        packages=("jinja2",),
    ),
    Stage(
        "evaluate",
        "eval",
        "answer the held-out prompts and judge",
        needs=("data", "base", "convert", "ladder"),
        settings=_evaluate,
        sources=(
            "stages/evaluate.py",
            "stages/splits.py",
            "served.py",
            "stages/asked.py",
            "stages/honesty.py",
            "stages/rates.py",
            "statistics.py",
            "engines/answer.py",
            "engines/llamacpp.py",
            "engines/llamacpp_process.py",
            "judges/code.py",
            "judges/fences.py",
            "judges/format.py",
            "judges/kept.py",
            "judges/language.py",
            "judges/overlap.py",
            "judges/typescript.py",
            "judges/typescript_install.py",
            "judges/typescript_scan.py",
            "judges/verdict.py",
            "template.py",
        ),
        packages=("markdown-it-py", "lingua-language-detector"),
        llamacpp=True,
        files=_evaluate_files,
        beside="eval-*",
    ),
    Stage(
        "report",
        "report",
        "write the page and the model card",
        needs=("data",),
        settings=_report,
        sources=(
            "stages/report.py",
            "stages/page.py",
            "stages/page.css",
            "stages/rates.py",
            "stages/report.html.j2",
            "stages/report_card.py",
            "stages/report_charts.py",
            "stages/report_labels.py",
            "stages/report_prompts.py",
            "stages/report_tables.py",
            "stages/report_view.py",
            "stages/splits.py",
            "host.py",
            "judges/language.py",
            "judges/verdict.py",
            "modelfolder.py",
            "template.py",
        ),
        packages=("jinja2", "lingua-language-detector", "transformers"),
        reads=(
            *("base", "adapter", "merged", "gguf", "ladder", "parity", "eval"),
            *("model/published.json", "parity-ollama", "eval-ollama"),
        ),
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}


@dataclass(frozen=True)
class State:
    """One stage now: what it would be made of, and whether its folder is exactly that."""

    stage: Stage
    folder: Path
    manifest: artifacts.Manifest | None
    fields: dict[str, Any] | None  # None where an input does not exist yet
    problems: tuple[str, ...]  # damage of the folder

    @property
    def condition(self) -> str:
        """missing, damaged, stale, refused (made, and its own results say no) or up to date."""
        if self.manifest is None:
            return "missing"
        if self.problems:
            return "damaged"
        if self.fields is None or self.manifest.key != artifacts.digest(self.fields):
            return "stale"
        return "refused" if REFUSED in self.manifest.results else "up to date"


def inspect(
    recipe: Recipe, build: Path, *, content: bool = False, names: Collection[str] = tuple(BY_NAME)
) -> list[State]:
    """The state of the named stages, in order, with `names` holding all that they need.

    `content` hashes every output instead of trusting its size.
    """
    states: dict[str, State] = {}
    for stage in (BY_NAME[name] for name in BY_NAME if name in names):
        folder = build / recipe.name / stage.folder
        manifest = artifacts.read_manifest(folder)
        problems = tuple(artifacts.check(folder, content=content)) if manifest else ()
        whole = all(states[need].manifest and not states[need].problems for need in stage.needs)
        fields = key_fields(stage, recipe, build, states) if whole else None
        states[stage.name] = State(stage, folder, manifest, fields, problems)
    return list(states.values())


def key_fields(stage: Stage, recipe: Recipe, build: Path, states: Mapping[str, State]) -> dict[str, Any]:
    """What decides a stage's result, flat, so that two of them can be compared line by line."""
    fields: dict[str, Any] = {f"recipe.{name}": value for name, value in stage.settings(recipe).items()}
    cache = build / recipe.name / artifacts.HASHES
    files = stage.files(recipe) if stage.needs else stage.module.input_files(recipe)
    fields |= {f"file.{name}": artifacts.cached_sha256(path, cache) for name, path in files.items()}
    for need in stage.needs:
        manifest = states[need].manifest
        assert manifest is not None
        fields[f"input.{need}"] = manifest.fingerprint
    for name in stage.reads:
        path = build / recipe.name / name
        if found := artifacts.read_manifest(path):
            fields[f"input.{name}"] = artifacts.digest(asdict(found))  # its times and results are read, too
        elif path.is_file():
            fields[f"input.{name}"] = artifacts.file_sha256(path)
    fields |= artifacts.provenance(stage.sources, stage.packages)
    if stage.llamacpp:
        fields["version.llama.cpp"] = llamacpp_build.build_key()
    return fields


def differences(state: State) -> list[str]:
    """Why a stage is not up to date, a line a reason; empty when it is."""
    if state.manifest is None:
        return [f"{state.folder} is not there"]
    if state.problems:
        return list(state.problems)
    if state.condition == "refused":
        return [str(state.manifest.results[REFUSED]["message"])]
    if state.fields is None:
        return [f"needs {', '.join(state.stage.needs)} first"]
    return artifacts.compare(state.manifest.fields, state.fields)


def run_all(recipe: Recipe, build: Path, *, until: str | None = None) -> list[str]:
    """Run what is not up to date, in order, at most to the stage `until`; the names of the stages that ran.

    Raises GateError, and runs no stage behind it, where a gate says no.
    """
    _refuse_early(recipe)
    names = list(BY_NAME)[: list(BY_NAME).index(until) + 1] if until else list(BY_NAME)
    ran: list[str] = []
    weighed = False
    with artifacts.locked(build / recipe.name):
        for name in names:
            states = {found.stage.name: found for found in inspect(recipe, build, names=names)}
            state = states[name]
            if state.condition in MADE:
                artifacts.remove(artifacts.checkpoints(state.folder))  # the last run was killed before it could
            else:
                if not weighed and name != "data":  # its rows tell how long a training's are
                    to_do = [other for other in names if states[other].condition not in MADE]
                    weighed = capacity.refuse(recipe, build, to_do)
                _run(state.stage, recipe, build, state)
                ran.append(name)
            pass_gate(state.folder)
    return ran


def run_one(name: str, recipe: Recipe, build: Path) -> bool:
    """Run one stage where it is not up to date; whether it ran. Raises ArtifactError when an input is missing.

    In several processes the first does all this, and the others only what the stage itself gives them to do.
    """
    _refuse_early(recipe)
    stage = BY_NAME[name]
    with processes.joined():
        if processes.is_first():
            return _run_first(stage, recipe, build)
        if ready := processes.tell():
            stage.module.run(recipe, *ready)
        return bool(ready)


def _run_first(stage: Stage, recipe: Recipe, build: Path) -> bool:
    name = stage.name
    with artifacts.locked(build / recipe.name):
        states = {found.stage.name: found for found in inspect(recipe, build, names=_with_needs(name))}
        for need in stage.needs:
            artifacts.require(states[need].folder, need)
            if states[need].condition == "stale":
                log.warning("%s is out of date with the recipe or its inputs; tutor why %s says why", need, need)
        made = states[name].condition in MADE
        if made:
            artifacts.remove(artifacts.checkpoints(states[name].folder))  # the last run was killed before it could
            processes.tell(None)
        else:
            if name != "data" and not processes.is_sharded():  # it knows one GPU
                capacity.refuse(recipe, build, [name])
            _run(stage, recipe, build, states[name])
        pass_gate(states[name].folder)
    return not made


def pass_gate(folder: Path) -> None:
    """Raise GateError where a stage's own results say no; its folder stays, for those who ask why."""
    manifest = artifacts.read_manifest(folder)
    if manifest and (refused := manifest.results.get(REFUSED)):
        raise GateError(refused["message"], refused["hint"])


def _with_needs(name: str) -> set[str]:
    """A stage and all before it that it depends on: another stage's fault must not stop this one."""
    return {name}.union(*(_with_needs(need) for need in BY_NAME[name].needs))


def _refuse_early(recipe: Recipe) -> None:
    """Raise RecipeError or DataError for what only the last stages would refuse, after hours of training."""
    from tutor.stages.honesty import check_files
    from tutor.stages.modelfile import representable

    check_files(recipe)
    if not representable(recipe.system):
        raise RecipeError(
            f"{recipe.path}: system has an invisible character that Ollama would drop, or a line ending in "
            "three quotes, where a Modelfile would end it",
            "rewrite it: a Modelfile has no escapes",
        )


def _run(stage: Stage, recipe: Recipe, build: Path, state: State) -> None:
    for need in stage.needs:  # someone may have removed it since its stage ran
        artifacts.require(build / recipe.name / BY_NAME[need].folder, need)
    assert state.fields is not None, f"{stage.name} lacks an input"
    scratch = artifacts.writing(state.folder, stage.name, state.fields, resume=stage.resumes)
    with announced(stage.name, stage.about), scratch as (out, results):
        inputs = {need: build / recipe.name / BY_NAME[need].folder for need in stage.needs}
        inputs |= {name: build / recipe.name / name for name in stage.reads}
        processes.tell((inputs, out))
        results.update(stage.module.run(recipe, inputs, out))


@contextmanager
def announced(name: str, about: str) -> Iterator[None]:
    """Progress as a stage's, for what runs inside."""
    log.info("%s: %s", name, about, extra={"stage": name})
    yield
    log.info("%s: done", name, extra={"stage_done": name})


def clean(recipe: Recipe, build: Path, names: tuple[str, ...]) -> list[Path]:
    """Remove the folders of the named stages, or of all; what was removed."""
    if unknown := [name for name in names if name not in BY_NAME]:
        raise RecipeError(f"no stage {unknown[0]!r}; known: {', '.join(BY_NAME)}")
    removed = []
    with artifacts.locked(build / recipe.name):
        for stage in (BY_NAME[name] for name in names or BY_NAME):
            made = build / recipe.name / stage.folder
            found = [made, *(sorted(made.parent.glob(stage.beside)) if stage.beside else ())]
            ends = (artifacts.PARTIAL, artifacts.OLD, artifacts.CHECKPOINTS, artifacts.LOG)
            for folder in found:
                if not folder.name.endswith(ends):
                    artifacts.refuse_foreign(folder)
            for path in (*found, *(made.with_name(made.name + end) for end in ends)):
                if path.exists():
                    artifacts.remove(path)
                    removed.append(path)
    return removed
