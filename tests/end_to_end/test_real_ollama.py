"""Publish to a real Ollama and query it: the behaviour that the fake server imitates, and what needs a real one.

They run where TUTOR_TEST_OLLAMA names a server that may be written to (OLLAMA_BINARY: its program, for `ollama create`
and for a server of the tests' own that is killed), and skip elsewhere:

    TUTOR_TEST_OLLAMA=http://127.0.0.1:11434 .venv/bin/pytest tests/end_to_end/test_real_ollama.py

The model is the tiny Llama through our own pipeline, made once (a minute), or taken as it is from TUTOR_TEST_BUILD.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.processes.command import TINY
from support.shared import copied

from tutor.artifacts.hashing import file_sha256
from tutor.artifacts.manifest import require_stage
from tutor.engines.llamacpp.server import serve as serve_gguf
from tutor.engines.ollama.client import Ollama, connect
from tutor.engines.ollama.engine import OllamaServer, serve
from tutor.engines.ollama.protocol import MissingError, parse_parameters
from tutor.engines.protocol import Generation
from tutor.errors import GateError, ServiceError
from tutor.pipeline import runner
from tutor.prompt.messages import Message, conversation
from tutor.prompt.tutor_format import GO_TEMPLATE, render
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe
from tutor.serving import builds, ollama_parity, publish
from tutor.serving.evaluation import published
from tutor.stages.parity.gate import refusal

HOST = os.environ.get("TUTOR_TEST_OLLAMA", "")
BINARY = os.environ.get("OLLAMA_BINARY", shutil.which("ollama") or "")

pytestmark = [
    pytest.mark.ollama,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not HOST, reason="no real Ollama: set TUTOR_TEST_OLLAMA to the host of one to write to"),
]
needs_binary = pytest.mark.skipif(not BINARY, reason="no ollama program here: set OLLAMA_BINARY")

NAME = "tutor-test"
GREEDY = Generation(max_new_tokens=24, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=7)
LONG = replace(GREEDY, max_new_tokens=1000, temperature=2.0)
"""Sampling with which the tiny model seldom ends by itself."""
QUESTIONS = ("¿Qué es una interfaz?", "¿Cómo se declara una función genérica?", "Hola")


@pytest.fixture(scope="module")
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the build folder of the tiny recipe."""
    ready = os.environ.get("TUTOR_TEST_BUILD")
    return copied(Path(ready) if ready else request.getfixturevalue("built"), tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The tiny recipe with a model name that only these tests use."""
    read = read_recipe(TINY)
    return read.model_copy(update={"ollama": read.ollama.model_copy(update={"model": NAME}), "system": "Eres «tutor»."})


@pytest.fixture(scope="module")
def api() -> Iterator[Ollama]:
    with connect(HOST) as server:
        yield server


@pytest.fixture(autouse=True)
def clean(api: Ollama) -> Iterator[None]:
    """Delete the models of these tests before and after each."""

    def remove() -> None:
        for tag in api.tags():
            if tag.name.startswith(NAME):
                api.delete(tag.name)

    remove()
    yield
    remove()


def render_and_publish(
    recipe: Recipe, build: Path, host: str = HOST, *, adapter: bool = False, **changes: Any
) -> dict[str, Any]:
    """Run the parity and modelfile stages, publish, and serve the build as `latest` without a comparison."""
    changed = recipe.model_copy(update=changes)
    for name in ("ladder", "parity", "modelfile"):
        runner.run_one(name, changed, build)
    # The weights were trained without these system texts: the model is of an older state.
    result = publish.publish(changed, build, host=host, adapter=adapter, wait=30, force=True)
    with connect(host) as server:
        builds.serve_as_latest(server, result["model"], result["tag"])
    return result


def answer_of(model: str, question: str = QUESTIONS[0], host: str = HOST) -> str:
    with serve(model, host) as server:
        return server.answer(conversation(question), GREEDY).text


def test_build_is_published_once_and_answers(recipe: Recipe, build: Path, api: Ollama) -> None:
    first = render_and_publish(recipe, build)
    assert first["published"]
    assert first["prompts"] == 7
    assert answer_of(NAME) == answer_of(first["tag"]) != ""
    again = render_and_publish(recipe, build)
    assert again["published"] is False
    assert again["build"] == first["build"]
    assert [row["latest"] for row in builds.list_builds(api, NAME)] == [True]


def test_another_system_text_is_a_build_that_rolls_back(recipe: Recipe, build: Path, api: Ollama) -> None:
    first, second = render_and_publish(recipe, build), render_and_publish(recipe, build, system="Respondes en español.")
    assert first["build"] != second["build"]

    def system() -> str:
        return str((api.show(NAME) or {})["system"])

    assert system() == "Respondes en español."
    builds.rollback(api, NAME)
    assert system() == recipe.system
    builds.rollback(api, NAME)
    assert system() == "Respondes en español."
    builds.serve_as_latest(api, NAME, f"{NAME}:{builds.find_build(api, NAME, first['build'][:5])}")
    assert system() == recipe.system
    rows = {row["build"]: row for row in builds.list_builds(api, NAME)}
    assert rows[first["build"]]["latest"]
    assert rows[second["build"]]["previous"]


@pytest.mark.llamacpp
def test_answers_equal_those_of_llama_server(recipe: Recipe, build: Path, tmp_path: Path) -> None:
    render_and_publish(recipe, build)
    gguf = build / "tiny/gguf/tutor-Q8_0.gguf"
    with (
        serve_gguf(gguf, context=2048, threads=1, log=tmp_path / "log") as local,
        serve(NAME, HOST) as published,
    ):
        for question in QUESTIONS:
            turns = conversation(question, recipe.system)
            mine, theirs = local.answer(turns, GREEDY), published.answer(turns, GREEDY)
            assert (mine.text, mine.finish, mine.prompt_tokens) == (theirs.text, theirs.finish, theirs.prompt_tokens)
            assert published.answer(conversation(question), GREEDY).text == mine.text, "the model has its system text"


def test_stop_text_is_told_from_the_end_of_sequence(recipe: Recipe, build: Path) -> None:
    render_and_publish(recipe, build)
    turns = conversation(QUESTIONS[0], recipe.system)
    with serve(NAME, HOST) as published:
        whole = published.answer(turns, replace(GREEDY, stops=()))
        stop = whole.text[4:8]
        cut = published.answer(turns, replace(GREEDY, stops=("nowhere", stop)))
    assert (cut.text, cut.finish) == (whole.text.partition(stop)[0], "stop")
    assert cut.prompt_tokens == whole.prompt_tokens


def test_conversation_continues_from_unchanged_history(recipe: Recipe, build: Path, api: Ollama) -> None:
    render_and_publish(recipe, build)
    turns: list[Message] = conversation(QUESTIONS[0])
    with serve(NAME, HOST) as server:
        first = server.answer(turns, GREEDY)
        turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": QUESTIONS[1]}]
        second = server.answer(turns, GREEDY)
    assert second.prompt_tokens > first.prompt_tokens
    assert api.rendered(NAME, turns) == render([{"role": "system", "content": recipe.system}, *turns])


def test_chat_and_generate_give_equal_answers(recipe: Recipe, build: Path) -> None:
    render_and_publish(recipe, build)
    body = {"model": NAME, "prompt": QUESTIONS[0], "stream": False}
    options = {"num_predict": 24, "temperature": 0, "top_p": 1.0, "repeat_penalty": 1.0, "seed": 7}
    answer = httpx.post(f"{HOST}/api/generate", json={**body, "options": options}, timeout=60, trust_env=False)
    assert answer.json()["response"] == answer_of(NAME)


def test_answer_has_log_probabilities(recipe: Recipe, build: Path) -> None:
    render_and_publish(recipe, build)
    body = {"model": NAME, "messages": conversation("Hola"), "stream": False, "logprobs": True, "top_logprobs": 3}
    options = {"num_predict": 4, "temperature": 0}
    answer = httpx.post(f"{HOST}/api/chat", json={**body, "options": options}, timeout=60, trust_env=False).json()
    assert {len(entry["top_logprobs"]) for entry in answer["logprobs"]} == {3}


def first_tokens(model: str, question: str) -> dict[str, float]:
    """Return the ten most probable first tokens of an answer, with their log-probabilities."""
    body = {"model": model, "messages": conversation(question), "stream": False, "logprobs": True, "top_logprobs": 10}
    options = {"num_predict": 1, "temperature": 0}
    answer = httpx.post(f"{HOST}/api/chat", json={**body, "options": options}, timeout=60, trust_env=False).json()
    return {entry["token"]: entry["logprob"] for entry in answer["logprobs"][0]["top_logprobs"]}


def test_base_with_adapter_answers_like_the_merged_model(recipe: Recipe, build: Path, api: Ollama) -> None:
    render_and_publish(recipe, build)
    result = render_and_publish(recipe, build, adapter=True)
    assert result["model"] == f"{NAME}-lora"
    shown = api.show(f"{NAME}-lora") or {}
    assert shown["modelfile"].count("\nADAPTER ") == 1
    worst = 0.0
    for question in QUESTIONS:
        merged, apart = first_tokens(NAME, question), first_tokens(f"{NAME}-lora", question)
        assert max(merged, key=merged.__getitem__) == max(apart, key=apart.__getitem__)
        common = merged.keys() & apart.keys()
        assert len(common) >= 7
        worst = max(worst, *(abs(merged[token] - apart[token]) for token in common))
    # The adapter is on the 16-bit base; a merge into NF4 differs by up to 0.22, a base alone by 0.48.
    merge = require_stage(build / recipe.name / "merged", "merge").results["base"]
    assert worst < (0.35 if merge == "nf4" else 0.1)
    assert render_and_publish(recipe, build, adapter=True)["published"] is False


@needs_binary
@pytest.mark.parametrize("adapter", [False, True])
def test_ollama_create_makes_an_equal_model(recipe: Recipe, build: Path, api: Ollama, *, adapter: bool) -> None:
    name = render_and_publish(recipe, build, adapter=adapter)["model"]
    folder = build / "tiny" / ("lora" if adapter else "model")
    command = [BINARY, "create", f"{name}-by-hand", "-f", "Modelfile"]
    subprocess.run(command, cwd=folder, env={**os.environ, "OLLAMA_HOST": HOST}, check=True, capture_output=True)
    made, ours = api.show(f"{name}-by-hand") or {}, api.show(name) or {}
    for key in ("template", "system", "details", "capabilities", "model_info"):
        assert made.get(key) == ours.get(key), key
    assert parse_parameters(made) == parse_parameters(ours)
    assert answer_of(f"{name}-by-hand") == answer_of(name)


# Sabotage


def published_model(recipe: Recipe, build: Path) -> tuple[builds.Model, dict[Path, str]]:
    """Return the model that `publish` sends, for sabotage; it is published as `latest`."""
    render_and_publish(recipe, build)
    model = builds.read_model(build / "tiny/model", recipe.ollama.quantization)
    return model, {path: file_sha256(path) for path in model.paths}


def with_file(model: builds.Model, path: Path) -> tuple[builds.Model, dict[Path, str]]:
    return replace(model, files={path.name: path}), {path: file_sha256(path)}


def refused(api: Ollama, model: builds.Model, hashes: dict[Path, str], error: type[Exception], what: str) -> None:
    """Check that publishing fails, that its build is deleted, and that `latest` is unchanged."""
    before = {tag.name: tag.digest for tag in api.tags()}
    with pytest.raises(error, match=what):
        builds.publish_build(model, hashes, api)
    assert {tag.name: tag.digest for tag in api.tags()} == before


def test_gguf_with_the_r1_template_is_refused(recipe: Recipe, build: Path, api: Ollama) -> None:
    model, _ = published_model(recipe, build)
    base = build / "tiny/gguf/base-Q8_0.gguf"  # the tiny base has the template of R1
    refused(api, *with_file(model, base), GateError, r"template is .*User.*uses the GGUF's own chat template")


@pytest.mark.parametrize(
    "template",
    [GO_TEMPLATE.replace("Respuesta:", "Respuesta: "), "{{ .Prompt }}", GO_TEMPLATE.removesuffix("\n\n")],
)
def test_template_with_another_prompt_is_refused(recipe: Recipe, build: Path, api: Ollama, template: str) -> None:
    model, hashes = published_model(recipe, build)
    spoiled = replace(model, settings={**model.settings, "template": template})
    refused(api, spoiled, hashes, GateError, "gets another prompt than in training")


def test_parameter_that_the_server_drops_is_refused(recipe: Recipe, build: Path, api: Ollama) -> None:
    model, hashes = published_model(recipe, build)
    spoiled = replace(model, settings={**model.settings, "parameters": {"num_ctx": "many"}})
    refused(api, spoiled, hashes, ServiceError, "num_ctx")


@pytest.mark.llamacpp
@pytest.mark.parametrize("change", [{"repeat_last_n": 8}, {"repeat_penalty": 1.0}], ids=str)
def test_another_repetition_penalty_is_refused(
    recipe: Recipe, build: Path, api: Ollama, change: dict[str, Any]
) -> None:
    """The tiny model's candidates are all about as probable: only a strong penalty decides more than a near tie."""
    strong = recipe.generate.model_copy(update={"repetition_penalty": 2.0})
    model, hashes = published_model(recipe.model_copy(update={"generate": strong}), build)
    reference = ollama_parity.read_reference(build / "tiny/parity")
    assert ollama_parity.compare_model(reference, api, NAME).state == "same"
    parameters = {**model.settings["parameters"], **change}
    spoiled = replace(model, settings={**model.settings, "parameters": parameters})
    tag = builds.publish_build(spoiled, hashes, api)["tag"]
    refused = refusal([ollama_parity.compare_model(reference, api, tag)])
    assert refused is not None
    assert "diverges in its greedy answer: «repetition penalty»" in refused["message"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_gguf_is_refused(recipe: Recipe, build: Path, api: Ollama, tmp_path: Path, share: float) -> None:
    model, _ = published_model(recipe, build)
    data = (build / "tiny/gguf/tutor-Q8_0.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * share)])
    refused(api, *with_file(model, tmp_path / "cut.gguf"), ServiceError, "Ollama reports: .*damaged")


def test_adapter_of_another_base_is_refused_when_it_answers(
    recipe: Recipe, build: Path, api: Ollama, tmp_path: Path
) -> None:
    render_and_publish(recipe, build, adapter=True)
    model = builds.read_model(build / "tiny/lora", recipe.ollama.quantization)
    (adapter,) = model.adapters.values()
    data = adapter.read_bytes().replace(b"blk.1.attn_q", b"blk.7.attn_q")
    (tmp_path / "other.gguf").write_bytes(data)
    spoiled = replace(model, adapters={"other.gguf": tmp_path / "other.gguf"})
    hashes = {path: file_sha256(path) for path in spoiled.paths}
    refused(api, spoiled, hashes, ServiceError, r"\(500\)")


def test_missing_model_error_names_the_next_step() -> None:
    with pytest.raises(MissingError, match="publish it: tutor publish"):
        answer_of(f"{NAME}-nothing")


def test_prompt_longer_than_the_context_is_an_error(recipe: Recipe, build: Path, api: Ollama) -> None:
    render_and_publish(recipe, build)
    long: list[Message] = conversation(QUESTIONS[0])
    for _ in range(200):
        long += [{"role": "assistant", "content": " Sí, claro." * 3}, {"role": "user", "content": QUESTIONS[1]}]
    server = OllamaServer(api, NAME)
    for turns in (long, conversation("hola " * 5000)):
        with pytest.raises(ServiceError, match="exceeds the available context size"):
            server.answer(turns, GREEDY)
    assert server.answer(conversation(QUESTIONS[0]), GREEDY).text == answer_of(NAME)


# A second server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A second Ollama that a test can kill: its host and its process."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{reserved.getsockname()[1]}"
    settings = {"HOME": str(tmp_path), "OLLAMA_HOST": host, "OLLAMA_NO_CLOUD": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [BINARY, "serve"], env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield host, process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@needs_binary
def test_server_killed_during_an_answer_is_a_service_error(
    recipe: Recipe, build: Path, own_server: tuple[str, "subprocess.Popen[bytes]"]
) -> None:
    host, process = own_server
    render_and_publish(recipe, build, host)
    received: list[str] = []

    def kill(piece: str) -> None:
        received.append(piece)
        if len(received) == 3:
            process.kill()

    with serve(NAME, host) as server:
        with pytest.raises(ServiceError, match="broke"):
            server.answer(conversation(QUESTIONS[0]), LONG, kill)
        process.wait()  # until then its socket accepts connections, and resets them
        with pytest.raises(ServiceError, match="no Ollama at"):
            server.answer(conversation(QUESTIONS[0]), GREEDY)
    assert len(received) >= 3


@needs_binary
def test_builds_survive_a_restart_of_the_server(
    recipe: Recipe, build: Path, own_server: tuple[str, "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    host, process = own_server
    first = render_and_publish(recipe, build, host)
    before = answer_of(NAME, host=host)
    render_and_publish(recipe, build, host, system="Otro.")
    process.terminate()
    process.wait()
    settings = {"HOME": str(tmp_path), "OLLAMA_HOST": host, "OLLAMA_NO_CLOUD": "1"}
    second = subprocess.Popen([BINARY, "serve"], env={**os.environ, **settings}, stderr=subprocess.DEVNULL)
    try:
        with connect(host) as server:
            server.wait_ready(30)
            assert builds.rollback(server, NAME)["build"] == first["build"], "history is on the server"
        assert answer_of(NAME, host=host) == before
    finally:
        second.terminate()
        second.wait()


def test_published_model_is_evaluated(recipe: Recipe, build: Path) -> None:
    render_and_publish(recipe, build)
    result = published.evaluate_published(recipe, build, host=HOST)
    answers = json.loads((build / "tiny/eval-ollama/answers.json").read_text("utf-8"))
    assert result["all"]["n"] == len(answers) == 5
    assert all(row["answers"]["ollama"].get("text") for row in answers)
    assert list(result["models"]) == ["base", "base-as-tutor", "tutor"]
    sides = json.loads((build / "tiny/eval-published/answers.json").read_text("utf-8"))
    assert all("error" not in row["answers"]["base-as-tutor"] for row in sides)
    with connect(HOST) as server:
        assert not [tag.name for tag in server.tags() if "untuned" in tag.name]
