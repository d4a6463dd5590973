"""Builds of a model on an Ollama server: create, check, serve as `latest`, list, roll back.

In: `create.json` of the modelfile stage with its files, a server. Out: `NAME:<build>` on the server, checked, and
`NAME:latest` as its second name. A build is named by a hash of all that decides its answers, and is created once. The
build that was `latest` before is `NAME:previous`: the history is on the server, and survives a lost build folder.
Changes nothing in the build folder, and makes no GGUF.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutor.artifacts.hashing import json_sha256
from tutor.engines.ollama.answers import Tag
from tutor.engines.ollama.client import Ollama
from tutor.engines.ollama.health import gpu_notice, gpu_share
from tutor.engines.ollama.prompts import check_prompts
from tutor.engines.ollama.protocol import check_version
from tutor.engines.ollama.served_model import Description, check_answer, check_description, differences
from tutor.errors import ArtifactError, GateError, RecipeError, TutorError
from tutor.machine import host
from tutor.prompt.format import PromptFormat
from tutor.prompt.tutor_format import TUTOR
from tutor.recipe.ollama_names import canonical, split_tag
from tutor.recipe.settings import Recipe

log = logging.getLogger(__name__)

LATEST = "latest"
"""Tag of the build in service."""
PREVIOUS = "previous"
"""Tag of the build that was in service before."""
TAG_DIGITS = 12
"""Number of hex digits of the build hash in a tag."""
FILE_KINDS = ("files", "adapters")
"""Keys of the create body whose values are files."""
RENDERS_NO_GGUF = ': older ones do not render the chat template in a GGUF, which prompt = "base" serves'
"""Why a server that is too old cannot serve a model with the template of its base."""
LastProof = Callable[[str, str], Mapping[str, str]]
"""The server's `version` and the model's `digest` at the last check of a build on a host; empty without one."""
TagCheck = Callable[[Ollama, str], dict[str, Any]]
"""Further check of a tag before it is served; returns findings for the result. Raises GateError."""


@dataclass(frozen=True)
class Model:
    """A model to publish: the body of POST /api/create, with paths in place of digests."""

    name: str
    quantization: str  # as /api/show names it
    files: Mapping[str, Path]  # name on the server -> the GGUF
    adapters: Mapping[str, Path]  # name on the server -> the LoRA GGUF; can be empty
    settings: Mapping[str, Any]  # template, system, parameters, license, parser
    prompt: PromptFormat = TUTOR
    family: str = "llama"  # as /api/show names it: general.architecture of the GGUF
    own_template: str = ""  # of the GGUF, which the server renders where `settings` has no template

    @property
    def is_native(self) -> bool:
        """Whether the server renders the GGUF's own template."""
        return "template" not in self.settings

    @property
    def description(self) -> Description:
        """What the server must show of the model."""
        return Description(
            template=self.own_template if self.is_native else self.settings["template"],
            system=self.settings.get("system", ""),
            parameters=self.settings.get("parameters", {}),
            capabilities=(*(("thinking",) if self.prompt.think is not None else ()), "completion"),
            family=self.family,
            quantization=self.quantization,
        )

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return (*self.files.values(), *self.adapters.values())


def served_name(recipe: Recipe, *, adapter: bool = False) -> str:
    """Return the name of the recipe's model in Ollama, without a tag; base plus adapter have a name of their own."""
    return f"{recipe.ollama.model}-lora" if adapter else recipe.ollama.model


def read_model(folder: Path, quantization: str, **facts: Any) -> Model:
    """Read `folder`/create.json, with absolute paths; `facts` are `prompt`, `family` and `own_template` of the model.

    Raises ArtifactError when it or a file of it is missing.
    """
    path = folder / "create.json"
    try:
        body = json.loads(path.read_text("utf-8"))
        files, adapters = (
            {name: (folder / at).resolve() for name, at in body.pop(key, {}).items()} for key in FILE_KINDS
        )
        model = Model(body.pop("name"), quantization, files, adapters, body, **facts)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", "run: tutor modelfile") from None
    for file in model.paths:
        if not file.is_file():
            raise ArtifactError(f"{file} is not there", "run: tutor convert")
    return model


def build_id(model: Model, hashes: Mapping[Path, str]) -> str:
    """Return the short hash of all that decides the answers: the content of the files and every setting, no names."""
    content = {key: [hashes[path] for path in getattr(model, key).values()] for key in FILE_KINDS}
    return json_sha256({**content, **model.settings})[:TAG_DIGITS]


def publish_build(
    model: Model,
    hashes: Mapping[Path, str],
    server: Ollama,
    *,
    wait: float = 5.0,
    check: TagCheck | None = None,
    last_proof: LastProof = lambda _build, _host: {},
) -> dict[str, Any]:
    """Create a build on a server, without tagging it `latest`, and check it; return what was done.

    A build that is `latest` already is checked again only when `last_proof` is of another version of the server or of
    another digest; in the latter case it is created again. `hashes` has the sha256 of each file in hex, `wait` is the
    maximum number of seconds for the start of the server, `check` runs after all other checks. Raises GateError when
    the server would serve another model: the build is then deleted, if it was made here.
    """
    started = time.monotonic()
    version = server.wait_ready(wait)
    check_version(version, "" if model.prompt.go_template else RENDERS_NO_GGUF)
    build = build_id(model, hashes)
    tag = f"{model.name}:{build}"
    result = {"model": model.name, "build": build, "tag": tag, "host": server.host, "version": version}
    shown = server.show(tag)
    proof, digest = last_proof(build, server.host), model_digest(server, tag)
    made = (
        shown is None
        or differences(shown, model.description, is_native=model.is_native) != []
        or proof.get("digest", digest) != digest
    )
    is_proven = proof.get("version") == version and proof.get("digest") == digest
    if not made and is_proven and _is_latest(server, model.name, tag):
        return {**result, "published": False, "seconds": round(time.monotonic() - started, 3)}
    with _taken_back_on_failure(server, tag):
        recognised = _create(model, hashes, server, tag) if made else None
        checks = check_build(model, server, tag, recognised)
        if check:
            checks |= check(server, tag)
    checks["digest"] = model_digest(server, tag)
    return {**result, "published": True, "created": made, **checks, "seconds": round(time.monotonic() - started, 3)}


@contextmanager
def _taken_back_on_failure(server: Ollama, tag: str) -> Iterator[None]:
    """Delete the tag when a check inside fails, or after Ctrl-C, if it was made inside and is not `latest`.

    A build that was on the server before stays: an earlier run has proven it, and it may be the one to roll back to.
    """
    before = model_digest(server, tag)
    try:
        yield
    except BaseException:
        try:
            now = model_digest(server, tag)
            if now not in (None, before) and not _is_latest(server, split_tag(tag)[0], tag):
                server.delete(tag)
        except TutorError as second:
            log.warning("%s is still on the server: %s", tag, second)
        raise


def _create(model: Model, hashes: Mapping[Path, str], server: Ollama, tag: str) -> str | None:
    """Create a tag; return the name of the template that the server recognised, None for none."""
    digests = {path: f"sha256:{hashes[path]}" for path in model.paths}
    for path in model.paths:
        if not server.upload_blob(path, digests[path]):
            log.info("%s is on the server already", path.name)
    files = {key: {name: digests[path] for name, path in getattr(model, key).items()} for key in FILE_KINDS}
    return server.create(tag, {**{key: value for key, value in files.items() if value}, **model.settings})


def check_build(model: Model, server: Ollama, tag: str, recognised: str | None = None) -> dict[str, Any]:
    """Check settings, prompts and one answer of a published tag; return the findings. Raises GateError."""
    check_description(server, tag, model.description, is_native=model.is_native, recognised=recognised)
    latest = f"{model.name}:{LATEST}"
    if canonical(latest) in map(canonical, server.loaded()):
        server.unload(latest)  # two models need twice the memory
    prompts = check_prompts(server, tag, model.settings.get("system", ""), model.prompt)
    answer = check_answer(server, tag, model.prompt)
    share = gpu_share(server, tag)  # None when another name of the same file was loaded already
    if notice := gpu_notice(server, host_has_gpu=bool(host.gpus()), model=tag):
        log.warning("%s", notice)
    thought = {"thought": answer.thought} if answer.thought else {}
    return {"prompts": prompts, "answer": answer.text, **thought, "gpu_share": share}


def serve_as_latest(server: Ollama, name: str, tag: str) -> None:
    """Tag a build `latest`, and the build that was latest `previous`."""
    tags = _tags(server, name)
    target, latest = tags[canonical(tag)[1]], tags.get(LATEST)
    if latest is not None and latest.digest != target.digest:
        server.copy(f"{name}:{LATEST}", f"{name}:{PREVIOUS}")
    server.copy(tag, f"{name}:{LATEST}")
    if not _is_latest(server, name, tag):
        raise GateError(
            f"{name}:{LATEST} is not {tag} after copying", "does another client write this tag? publish again"
        )


def find_build(server: Ollama, name: str, build: str | None = None) -> str:
    """Return the published build whose hash begins with `build`; None: the newest. Raises RecipeError without one."""
    builds = [row for row in list_builds(server, name) if row["build"]]
    matching = [row for row in builds if build is None or row["build"].startswith(build.lower())]
    if not matching or (build is not None and len(matching) > 1):
        known = ", ".join(row["build"] for row in builds) or "none: run tutor publish"
        raise RecipeError(f"{len(matching)} builds of {name} begin with {build or ''!r}", f"known: {known}")
    return str(matching[0]["build"])


def rollback(server: Ollama, name: str) -> dict[str, Any]:
    """Serve the build that was `latest` before; a second rollback undoes it. Raises RecipeError without one."""
    tags = _tags(server, name)
    latest, previous = tags.get(LATEST), tags.get(PREVIOUS)
    if previous is None or (latest and latest.digest == previous.digest):
        raise RecipeError(f"{server.host} has no previous build of {name}", "see: tutor models; tutor promote BUILD")
    builds = {tag.digest: build for build, tag in tags.items() if build not in (LATEST, PREVIOUS)}
    server.copy(f"{name}:{PREVIOUS}", f"{name}:{LATEST}")
    if latest and latest.digest in builds:
        server.copy(f"{name}:{builds[latest.digest]}", f"{name}:{PREVIOUS}")
    return {"model": name, "build": builds.get(previous.digest), "host": server.host}


def list_builds(server: Ollama, name: str) -> list[dict[str, Any]]:
    """List the builds of a name on the server, the newest first, and `latest` and `previous` of another origin."""
    tags = _tags(server, name)
    roles = {role: tags.pop(role) for role in (LATEST, PREVIOUS) if role in tags}
    rows = [(build, tag) for build, tag in tags.items()]
    rows += [("", tag) for tag in roles.values() if tag.digest not in {tag.digest for tag in tags.values()}]
    return [
        {
            "build": build,
            "digest": tag.digest[:TAG_DIGITS],
            "modified": tag.modified,
            "size": tag.size,
            **{role: role in roles and roles[role].digest == tag.digest for role in (LATEST, PREVIOUS)},
        }
        for build, tag in rows
    ]


def model_digest(server: Ollama, model: str) -> str | None:
    """Return the digest of a published model, by tag or (without a tag) of `latest`; None when it is missing."""
    found = _tags(server, split_tag(model)[0]).get(canonical(model)[1])
    return found.digest if found else None


def _tags(server: Ollama, name: str) -> dict[str, Tag]:
    """Return every tag of a name without a tag, by its text after the colon in lower case."""
    wanted = canonical(name)[0]
    tags = ((canonical(tag.name), tag) for tag in server.tags())
    return {parts[1]: tag for parts, tag in tags if parts[0] == wanted}


def _is_latest(server: Ollama, name: str, tag: str) -> bool:
    tags = _tags(server, name)
    found = tags.get(canonical(tag)[1])
    return found is not None and LATEST in tags and tags[LATEST].digest == found.digest
