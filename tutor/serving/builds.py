"""The publish stage: a rendered model onto an Ollama server, and no name for it before it is proven.

In: `create.json` of the modelfile stage with its files, a server. Out: `NAME:<build>` on the server, checked, and
`NAME:latest` as its second name. A build is a hash of all that decides what is served; the same one is published once.
What `latest` was before is `NAME:previous`: history lives on the server, and outlives a lost build folder.
Changes nothing in the build folder, and makes no GGUF.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutor.artifacts.hashing import json_sha256
from tutor.engines.ollama.client import Ollama, Tag
from tutor.engines.ollama.engine import OllamaServer
from tutor.engines.ollama.protocol import check_version, shown_parameters
from tutor.engines.protocol import Generation
from tutor.errors import ArtifactError, GateError, RecipeError, TutorError
from tutor.prompt import Message, conversation, render

log = logging.getLogger(__name__)

LATEST, PREVIOUS = "latest", "previous"
DIGITS = 12
"""Of a build's hash, as a tag shows it."""
FILES = ("files", "adapters")
QUESTION = "¿Qué es una interfaz en TypeScript?"
TOKENS = 24
"""Of the warm-up answer: fewer than make Ollama give up on a model that repeats itself."""
OWN_TEMPLATE = (
    "Ollama took the GGUF's own chat template, which promises more (tools, thinking) than TEMPLATE: convert again, "
    "so that the file carries tutor's template"
)
Checking = Callable[[Ollama, str], dict[str, Any]]
"""A further check of a tag that is not served yet: what it found, to be reported. Raises GateError."""
TURNS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "Hola"}],
    [{"role": "system", "content": "Otro sistema: «ñ».\nDos líneas."}, {"role": "user", "content": QUESTION}],
    [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": " Describe la forma de un objeto:\n\n```ts\ninterface A { b?: string }\n```"},
        {"role": "user", "content": "¿Y \"esto\" o 'aquello'?"},
        {"role": "assistant", "content": " Sí.\n"},
        {"role": "user", "content": "  Gracias \\n {{ .System }} {% raw %} <think> \t$&"},
    ],
    [{"role": "user", "content": "Sigue."}, {"role": "assistant", "content": " Una respuesta que"}],
    [{"role": "user", "content": "Emoji 👩‍💻, combinado é, ancho\u00a0fijo, 日本語, \u2028, <b>&amp;</b>"}],
)
"""Conversations whose prompts are compared; the model's own system text is in those without one."""


@dataclass(frozen=True)
class Model:
    """What is published: the body of POST /api/create, with paths where the digests will stand."""

    name: str
    quantization: str  # as /api/show must call it
    files: Mapping[str, Path]  # the GGUF, under the name that the server gets
    adapters: Mapping[str, Path]  # a LoRA GGUF, or nothing
    settings: Mapping[str, Any]  # template, system, parameters, license, parser

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file."""
        return (*self.files.values(), *self.adapters.values())


def read_model(folder: Path, quantization: str) -> Model:
    """What `folder`/create.json says, its files by their absolute paths. Raises ArtifactError when it is damaged."""
    path = folder / "create.json"
    try:
        body = json.loads(path.read_text("utf-8"))
        files, adapters = ({name: (folder / at).resolve() for name, at in body.pop(key, {}).items()} for key in FILES)
        model = Model(body.pop("name"), quantization, files, adapters, body)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"cannot read {path}: {error}", "run: tutor modelfile") from None
    for file in model.paths:
        if not file.is_file():
            raise ArtifactError(f"{file} is not there", "run: tutor convert")
    return model


def build_id(model: Model, hashes: Mapping[Path, str]) -> str:
    """The short hash of all that decides what is served: the files' content and every setting, not their names."""
    content = {key: [hashes[path] for path in getattr(model, key).values()] for key in FILES}
    return json_sha256({**content, **model.settings})[:DIGITS]


def publish(
    model: Model,
    hashes: Mapping[Path, str],
    server: Ollama,
    *,
    wait: float = 5.0,
    check: Checking | None = None,
    serve: bool = True,
) -> dict[str, Any]:
    """Put a model on a server under its build and, when every check passes, under `latest`; what was done.

    Without `serve` it is proven and has its build's name alone.

    `hashes` are the files' sha256 in hex, `wait` is seconds for a server that is still starting, `check` is asked last.
    Raises GateError when the server would serve something else: that build is deleted again, `latest` is untouched.
    """
    started = time.monotonic()
    version = server.wait_ready(wait)
    check_version(version)
    build = build_id(model, hashes)
    tag = f"{model.name}:{build}"
    result = {"model": model.name, "build": build, "tag": tag, "host": server.host, "version": version}
    shown = server.show(tag)
    made = shown is None or differences(shown, model) != []
    if not made and _is_latest(server, model.name, tag):
        return {**result, "published": False, "seconds": round(time.monotonic() - started, 3)}
    with _taken_back(server, tag):
        if made:
            _create(model, hashes, server, tag)
        checks = prove(model, server, tag)
        if check:
            checks |= check(server, tag)
        if serve:
            switch(server, model.name, tag)
    checks["digest"] = digest_of(server, tag)
    return {**result, "published": True, "created": made, **checks, "seconds": round(time.monotonic() - started, 3)}


@contextmanager
def _taken_back(server: Ollama, tag: str) -> Iterator[None]:
    """A build that is not proven loses its name again, Ctrl-C included; unless it is served already."""
    try:
        yield
    except BaseException:
        try:
            name = tag.partition(":")[0]
            if server.show(tag) is not None and not _is_latest(server, name, tag):
                server.delete(tag)
        except TutorError as second:
            log.warning("%s is still on the server: %s", tag, second)
        raise


def _create(model: Model, hashes: Mapping[Path, str], server: Ollama, tag: str) -> None:
    digests = {path: f"sha256:{hashes[path]}" for path in model.paths}
    for path in model.paths:
        if not server.upload_blob(path, digests[path]):
            log.info("%s is on the server already", path.name)
    files = {key: {name: digests[path] for name, path in getattr(model, key).items()} for key in FILES}
    server.create(tag, {**{key: value for key, value in files.items() if value}, **model.settings})


def prove(model: Model, server: Ollama, tag: str) -> dict[str, Any]:
    """Show, prompts and one answer of a published tag, each as it must be; what they said. Raises GateError."""
    shown = server.show(tag)
    if problems := differences(shown or {}, model):
        hint = OWN_TEMPLATE if "{%" in str((shown or {}).get("template")) else "publish again"
        raise GateError(f"{tag} is not what was sent: {'; '.join(problems[:3])}", hint)
    latest = f"{model.name}:{LATEST}"
    if latest.lower() in map(str.lower, server.loaded()):
        server.unload(latest)  # two models need twice the memory
    prompts = check_prompts(model, server, tag)
    answer = OllamaServer(server, tag).answer(conversation(QUESTION), Generation(TOKENS, 0.0, 1.0, 1.0, 1))
    if not answer.text.strip():
        raise GateError(f"{tag} answers {QUESTION!r} with nothing", "look at its training: tutor summary")
    share = server.loaded().get(tag)  # None where another name with the same file was in memory already
    if share is not None and share < 1:
        log.info("%s runs with %.0f %% of its memory on a GPU", tag, 100 * share)
    return {"prompts": prompts, "answer": answer.text, "gpu_share": share}


def differences(shown: Mapping[str, Any], model: Model) -> list[str]:
    """What /api/show says otherwise than the model was sent, in words."""
    details = shown.get("details") or {}
    expected: dict[str, tuple[object, object]] = {
        "template": (shown.get("template"), model.settings.get("template", "")),
        "system": (shown.get("system", ""), model.settings.get("system", "")),
        "parameters": (shown_parameters(shown), dict(model.settings.get("parameters", {}))),
        "capabilities": (shown.get("capabilities"), ["completion"]),
        "family": (details.get("family"), "llama"),
        "quantization": (details.get("quantization_level"), model.quantization),
    }
    return [f"{name} is {got!r:.160} instead of {want!r:.160}" for name, (got, want) in expected.items() if got != want]


def check_prompts(model: Model, server: Ollama, tag: str) -> int:
    """How many prompts the server renders exactly as the prompt contract does. Raises GateError at the first other.

    Zero, with a warning, where the server has no way to show them.
    """
    system = model.settings.get("system", "")
    cases: list[tuple[str | Sequence[Message], str]] = []
    for turns in TURNS:
        opening: list[Message] = [{"role": "system", "content": system}] if system else []
        whole = turns if turns[0]["role"] == "system" else [*opening, *turns]
        cases.append((turns, render(whole)))
        if len(turns) == 1:
            cases.append((turns[0]["content"], render(whole)))
    for asked, expected in cases:
        prompt = server.rendered(tag, asked)
        if prompt is None:
            log.warning("this Ollama does not show its prompts: only /api/show was compared")
            return 0
        if prompt != expected:
            at = next((i for i, (a, b) in enumerate(zip(prompt, expected, strict=False)) if a != b), len(expected))
            path = "/api/generate" if isinstance(asked, str) else "/api/chat"
            raise GateError(
                f"{tag} is prompted otherwise than it was trained: {path} sends {prompt[max(at - 20, 0) : at + 60]!r} "
                f"instead of {expected[max(at - 20, 0) : at + 60]!r}",
                OWN_TEMPLATE,
            )
    return len(cases)


def switch(server: Ollama, name: str, tag: str) -> None:
    """Serve a tag as `latest`; what was latest is `previous` from now on."""
    tags = _tags(server, name)
    target, latest = tags[tag.partition(":")[2].lower()], tags.get(LATEST)
    if latest is not None and latest.digest != target.digest:
        server.copy(f"{name}:{LATEST}", f"{name}:{PREVIOUS}")
    server.copy(tag, f"{name}:{LATEST}")
    if not _is_latest(server, name, tag):
        raise GateError(f"{name}:{LATEST} is not {tag} after copying", "another client writes it too? publish again")


def find(server: Ollama, name: str, build: str | None = None) -> str:
    """A published build, by the beginning of its hash, or (None) the newest one. Raises RecipeError for none."""
    builds = [row for row in models(server, name) if row["build"]]
    matching = [row for row in builds if build is None or row["build"].startswith(build.lower())]
    if not matching or (build is not None and len(matching) > 1):
        known = ", ".join(row["build"] for row in builds) or "none: run tutor publish"
        raise RecipeError(f"{len(matching)} builds of {name} begin with {build or ''!r}", f"known: {known}")
    return str(matching[0]["build"])


def promote(server: Ollama, name: str, build: str | None = None) -> dict[str, Any]:
    """Serve a published build, found as `find` does, whatever it answers."""
    found = find(server, name, build)
    switch(server, name, f"{name}:{found}")
    return {"model": name, "build": found, "host": server.host}


def rollback(server: Ollama, name: str) -> dict[str, Any]:
    """Serve again what `latest` was before; a second rollback takes the first one back. Raises RecipeError for none."""
    tags = _tags(server, name)
    latest, previous = tags.get(LATEST), tags.get(PREVIOUS)
    if previous is None or (latest and latest.digest == previous.digest):
        raise RecipeError(
            f"{server.host} knows nothing that {name} was before", "see: tutor models; tutor promote BUILD"
        )
    builds = {tag.digest: build for build, tag in tags.items() if build not in (LATEST, PREVIOUS)}
    server.copy(f"{name}:{PREVIOUS}", f"{name}:{LATEST}")
    if latest and latest.digest in builds:
        server.copy(f"{name}:{builds[latest.digest]}", f"{name}:{PREVIOUS}")
    return {"model": name, "build": builds.get(previous.digest), "host": server.host}


def models(server: Ollama, name: str) -> list[dict[str, Any]]:
    """The builds of a name on the server, the newest first, and what is latest and previous of another origin."""
    tags = _tags(server, name)
    roles = {role: tags.pop(role) for role in (LATEST, PREVIOUS) if role in tags}
    rows = [(build, tag) for build, tag in tags.items()]
    rows += [("", tag) for tag in roles.values() if tag.digest not in {tag.digest for tag in tags.values()}]
    return [
        {
            "build": build,
            "digest": tag.digest[:DIGITS],
            "modified": tag.modified,
            "size": tag.size,
            **{role: role in roles and roles[role].digest == tag.digest for role in (LATEST, PREVIOUS)},
        }
        for build, tag in rows
    ]


def digest_of(server: Ollama, model: str) -> str | None:
    """What identifies a published model, tag or (without one) `latest`; None when it is not there."""
    name, _, tag = model.partition(":")
    found = _tags(server, name).get(tag or LATEST)
    return found.digest if found else None


def _tags(server: Ollama, name: str) -> dict[str, Tag]:
    """Every tag of a name, by what stands behind the colon; Ollama takes a name in any case."""
    tags = ((tag.name.lower().partition(":"), tag) for tag in server.tags())
    return {parts[2]: tag for parts, tag in tags if parts[0] == name.lower()}


def _is_latest(server: Ollama, name: str, tag: str) -> bool:
    tags = _tags(server, name)
    found = tags.get(tag.partition(":")[2].lower())
    return found is not None and LATEST in tags and tags[LATEST].digest == found.digest
