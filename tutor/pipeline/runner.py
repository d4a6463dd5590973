"""Run the stages in order: find what is up to date, run the rest, stop at a gate that refuses.

In: a recipe and a build folder. Out: stage folders (tutor.artifacts). A stage's key is a hash over the part of the
recipe that it reads, the content of its inputs, its code and the versions of its tools; with an equal key there is
nothing to do. Does no stage's work.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutor.artifacts.disk import remove
from tutor.artifacts.hashing import cached_sha256, file_sha256, json_sha256
from tutor.artifacts.layout import BuildFolder
from tutor.artifacts.manifest import Manifest, find_manifest, inspect_folder, read_manifest, require_stage
from tutor.artifacts.provenance import SourceTree
from tutor.artifacts.stage_folder import checkpoint_folder, writing
from tutor.engines.llamacpp.build import build_key
from tutor.errors import ArtifactError, GateError, RecipeError, TutorError
from tutor.machine import distributed
from tutor.pipeline.recipe_folder import held, refuse_folder
from tutor.pipeline.registry import BY_NAME, Stage
from tutor.pipeline.staleness import file_fields, with_needs
from tutor.recipe.settings import Recipe

if TYPE_CHECKING:
    from tutor.machine.memory.plan import TrainingPlan

log = logging.getLogger(__name__)

REFUSED = "refused"
"""Key of a gate's results when it refuses: a `message` and a `hint`."""
LLAMACPP_BUILD = "engines/llamacpp/build.py"
"""Module of the pinned llama.cpp: a stage that reaches it depends on the build's key."""
NOTHING_TO_DO = ("up to date", REFUSED)
"""Conditions of a stage that has nothing to do; a gate that refused would refuse again."""


@dataclass(frozen=True)
class State:
    """One stage at this moment: the fields of its key, and whether its folder was made of them."""

    stage: Stage
    folder: Path
    manifest: Manifest | None
    fields: dict[str, Any] | None  # None while an input is missing
    problems: tuple[str, ...]  # damage of the folder
    sources: Mapping[str, str] = field(default_factory=dict)  # the files behind the key field "code"

    @property
    def condition(self) -> str:
        """missing, damaged, stale, refused (made, and its gate refused) or up to date."""
        if self.problems:
            return "damaged"
        if self.manifest is None:
            return "missing"
        if self.fields is None or not self.manifest.has_key_of(self.fields):
            return "stale"
        return "refused" if REFUSED in self.manifest.results else "up to date"


def inspect(
    recipe: Recipe, build: Path, *, content: bool = False, names: Collection[str] = tuple(BY_NAME)
) -> list[State]:
    """Return the state of the named stages, in order; `names` must include the stages that they need.

    `content` hashes every output instead of trusting its size. Raises RecipeError for the folder of another recipe.
    """
    refuse_folder(recipe, build)
    states: dict[str, State] = {}
    made = BuildFolder(build, recipe.name)
    tree = SourceTree(made.hashes)
    for stage in (BY_NAME[name] for name in BY_NAME if name in names):
        folder = made.stage(stage.name)
        manifest, problems = inspect_folder(folder, content=content)
        whole = all(states[need].manifest and not states[need].problems for need in stage.needs)
        fields, sources = key_fields(stage, recipe, made, states, tree) if whole else (None, {})
        states[stage.name] = State(stage, folder, manifest, fields, problems, sources)
    return list(states.values())


def key_fields(
    stage: Stage, recipe: Recipe, made: BuildFolder, states: Mapping[str, State], tree: SourceTree
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the fields of a stage's key, flat, so that two keys compare line by line; and the hashes of its code."""
    fields = stage.recipe_fields(recipe) | file_fields(stage, recipe, made)
    for need in stage.needs:
        manifest = states[need].manifest
        assert manifest is not None
        fields[f"input.{need}"] = manifest.fingerprint
    manifests = {state.folder: state.manifest for state in states.values()}
    for name in stage.reads:
        path = made.path / name
        if found := manifests[path] if path in manifests else find_manifest(path):
            read = {name: value for name, value in asdict(found).items() if name != "sources"}
            fields[f"input.{name}"] = json_sha256(read)  # the report shows times and results, too
        elif path.is_file():
            fields[f"input.{name}"] = file_sha256(path)
    code = tree.provenance(stage.source)
    fields |= code.fields | {f"version.{name}": tree.version(name) for name in stage.recorded}
    if LLAMACPP_BUILD in code.left_out:
        fields["version.llama.cpp"] = build_key()
    return fields, code.sources


def stale_reasons(state: State) -> list[str]:
    """Return why a stage is not up to date, one line a reason; empty when it is."""
    if state.problems:
        return list(state.problems)
    if state.manifest is None:
        return [f"{state.folder} is not there"]
    if state.condition == "refused":
        return [str(state.manifest.results[REFUSED]["message"])]
    if state.fields is None:
        return [f"needs {', '.join(state.stage.needs)} first"]
    return state.manifest.changes(state.fields, state.sources)


def run_all(recipe: Recipe, build: Path, *, until: str | None = None) -> list[str]:
    """Run the stages that are not up to date, in order, up to the stage `until`; return the names of those that ran.

    Raises GateError, and runs no later stage, where a gate refuses.
    """
    distributed.settle_environment()
    _refuse_system(recipe)
    names = list(BY_NAME)[: list(BY_NAME).index(until) + 1] if until else list(BY_NAME)
    ran: list[str] = []
    fits = False
    with held(recipe, build):
        states = _states(recipe, build, names)
        for name in names:
            if states[name].condition in NOTHING_TO_DO:
                remove(checkpoint_folder(states[name].folder))  # the last run was killed before it could
            else:
                from tutor.machine import capacity

                if not ran:
                    _refuse_files(recipe)
                    _use_one_gpu(states.values())
                if not fits and name != "data":  # the lengths of its rows decide the memory of a training
                    to_do = [other for other in names if states[other].condition not in NOTHING_TO_DO]
                    fits = capacity.refuse_stages(recipe, build, to_do)
                _run(states[name], recipe, build)
                ran.append(name)
                states = _states(recipe, build, names)
            _refuse_at_gate(states[name].manifest)
    return ran


def _states(recipe: Recipe, build: Path, names: Collection[str]) -> dict[str, State]:
    return {found.stage.name: found for found in inspect(recipe, build, names=names)}


def run_one(name: str, recipe: Recipe, build: Path) -> bool:
    """Run one stage if it is not up to date; return whether it ran. Raises ArtifactError when an input is missing.

    In several processes rank 0 decides and writes; the other ranks only run the stage's own work.
    """
    distributed.settle_environment()
    _refuse_system(recipe)
    stage = BY_NAME[name]
    with distributed.process_group():
        if distributed.is_main_process():
            return _run_on_main_process(stage, recipe, build)
        if ready := distributed.broadcast():
            inputs, out, extra = ready
            stage.module.run(recipe, inputs, out, **extra)
        return bool(ready)


def _run_on_main_process(stage: Stage, recipe: Recipe, build: Path) -> bool:
    name = stage.name
    with held(recipe, build):
        states = _states(recipe, build, with_needs(name))
        for need in stage.needs:
            require_stage(states[need].folder, need)
            if states[need].condition == "stale":
                log.warning("%s is out of date with the recipe or its inputs; for the reason: tutor why %s", need, need)
        made = states[name].condition in NOTHING_TO_DO
        if made:
            remove(checkpoint_folder(states[name].folder))  # the last run was killed before it could
            distributed.broadcast(None)
        else:
            from tutor.machine import capacity

            _refuse_files(recipe)
            _use_one_gpu([states[name]])
            if name != "data" and not distributed.is_sharded():  # the estimate is for one GPU
                capacity.refuse_stages(recipe, build, [name])
            _run(states[name], recipe, build)
        require_gate_passed(states[name].folder)
    return not made


def require_gate_passed(folder: Path) -> None:
    """Raise GateError where a stage's gate refused. Its folder stays, with the figures of the refusal."""
    _refuse_at_gate(read_manifest(folder))


def _refuse_at_gate(manifest: Manifest | None) -> None:
    if manifest and (refused := manifest.results.get(REFUSED)):
        error = GateError(refused["message"], refused["hint"])
        error.stage = manifest.stage
        raise error


def _refuse_files(recipe: Recipe) -> None:
    """Raise DataError for files that the evaluate stage would refuse after hours of training."""
    from tutor.formats.rows.evaluation_texts import check_files

    check_files(recipe)


def _use_one_gpu(states: Iterable[State]) -> None:
    """Choose the GPU of a training that is to run, before any stage starts CUDA."""
    from tutor.machine import device

    if any(state.stage.takes_plan and state.condition not in NOTHING_TO_DO for state in states):
        device.use_one_gpu()


def _refuse_system(recipe: Recipe) -> None:
    """Raise RecipeError for a system text that the modelfile stage would refuse after hours of training."""
    from tutor.stages.modelfile.spec import representable

    if not representable(recipe.system):
        raise RecipeError(
            f"{recipe.path}: system has an invisible character that Ollama would drop, or a line ending in "
            "three quotes, where a Modelfile would end it",
            "rewrite it: a Modelfile has no escapes",
        )


def _run(state: State, recipe: Recipe, build: Path) -> None:
    stage, made = state.stage, BuildFolder(build, recipe.name)
    for need in stage.needs:  # a folder may have been removed since its stage ran
        require_stage(made.stage(need), need)
    assert state.fields is not None, f"{stage.name} lacks an input"
    if state.condition == "damaged":
        log.warning("%s: making %s again", state.problems[0], state.folder)
    scratch = writing(state.folder, stage.name, state.fields, sources=state.sources, resume=stage.resumes)
    with announced(stage.name, stage.about), scratch as (out, results):
        inputs = {need: made.stage(need) for need in stage.needs}
        inputs |= {name: made.path / name for name in stage.reads}
        # Made only now: the rows are counted with the base's tokenizer. The stage decides nothing about memory.
        extra = {"plan": _plan(recipe, inputs, state.folder)} if stage.takes_plan else {}
        distributed.broadcast((inputs, out, extra))
        results.update(stage.module.run(recipe, inputs, out, **extra))
        _require_unchanged(state, recipe, made)


def _require_unchanged(state: State, recipe: Recipe, made: BuildFolder) -> None:
    """Raise ArtifactError for a file of the user whose content is no longer that of the stage's key."""
    for name, path in state.stage.files(recipe).items():
        if state.fields and cached_sha256(path, made.hashes) != state.fields.get(f"file.{name}"):
            raise ArtifactError(f"{path} changed while the {state.stage.name} stage read it", "run again")


def _plan(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> "TrainingPlan":
    """The plan of the train stage, which writes `folder`; it keeps the precision of the checkpoints there."""
    from tutor.machine import capacity
    from tutor.stages.train.checkpoint import saved_precision

    return capacity.plan_training(recipe, inputs, saved_precision(checkpoint_folder(folder)))


@contextmanager
def announced(name: str, about: str) -> Iterator[None]:
    """Log the start and the end of the block as a stage's, for the progress display; name the stage in its errors."""
    log.info("%s: %s", name, about, extra={"stage": name})
    try:
        yield
    except TutorError as error:
        error.stage = error.stage or name
        raise
    log.info("%s: done", name, extra={"stage_done": name})
