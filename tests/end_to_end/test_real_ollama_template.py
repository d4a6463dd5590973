"""The template of the base on a real Ollama: a tiny Llama, and a Qwen2 with the thoughts of R1, in the whole chain.

They run where TUTOR_TEST_OLLAMA names a server that may be written to, as test_real_ollama.py does:

    TUTOR_TEST_OLLAMA=http://127.0.0.1:11434 .venv/bin/pytest tests/end_to_end/test_real_ollama_template.py
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tutor.artifacts.hashing import file_sha256
from tutor.artifacts.layout import BuildFolder
from tutor.engines.llamacpp.convert import Conversion, to_gguf
from tutor.engines.llamacpp.server import serve as serve_gguf
from tutor.engines.ollama.client import Ollama, connect
from tutor.engines.ollama.engine import OllamaServer, serve
from tutor.engines.protocol import Generation
from tutor.errors import GateError
from tutor.formats.models.model_folder import read_facts
from tutor.pipeline import runner
from tutor.prompt.messages import conversation
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe
from tutor.serving import builds, matrix, publish
from tutor.serving.chat import Terminal, converse
from tutor.serving.models import prompt_of
from tutor.stages.base.tiny_families import CHATML, DISTILLED

HOST = os.environ.get("TUTOR_TEST_OLLAMA", "")
pytestmark = [
    pytest.mark.ollama,
    pytest.mark.llamacpp,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not HOST, reason="no real Ollama: set TUTOR_TEST_OLLAMA to the host of one to write to"),
]
CELLS = (matrix.Cell("llama", "base"), matrix.Cell(DISTILLED, "base", "rows"))
QUESTIONS = ("¿Cuánto es 2 + 3?", "Declara la constante `n2` con el valor 4.")
GREEDY = Generation(max_new_tokens=40, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=7, stops=())


@pytest.fixture(scope="module")
def api() -> Iterator[Ollama]:
    with connect(HOST) as server:
        yield server


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: cell.name)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, api: Ollama) -> Iterator[Recipe]:
    """The recipe of a cell of the matrix, beside its build folder after all stages; its models are deleted."""
    cell, folder = request.param, tmp_path_factory.mktemp("chain")
    matrix.write_rows(folder)
    matrix.make_models(folder, [cell.family])
    path = matrix.write_recipe(cell, folder).path
    path.write_text(path.read_text("utf-8").replace("base = false", "base = true"), "utf-8")
    recipe = read_recipe(path)
    runner.run_all(recipe, folder)
    yield recipe
    for tag in api.tags():
        if tag.name.startswith(recipe.ollama.model):
            api.delete(tag.name)


@pytest.fixture(scope="module")
def published(chain: Recipe, api: Ollama) -> str:
    """The name of the published model, after its own checks."""
    result = publish.publish(chain, chain.path.parent, host=HOST, wait=30)
    assert result["parity"]["state"] == "same"
    assert result["prompts"] >= 7
    builds.serve_as_latest(api, result["model"], result["tag"])
    return str(result["model"])


def folder_of(chain: Recipe) -> BuildFolder:
    return BuildFolder(chain.path.parent, chain.name)


def test_server_renders_the_template_in_the_file(chain: Recipe, published: str, api: Ollama) -> None:
    prompt = prompt_of(chain, folder_of(chain))
    shown = api.show(published) or {}
    assert shown["template"] == prompt.chat_template(add_bos=read_facts(folder_of(chain).stage("base"))[0].add_bos)
    assert ("thinking" in shown["capabilities"]) is (chain.reasoning == "rows")
    assert publish.compare_published(chain, chain.path.parent, host=HOST)["hand_offs"][0]["state"] == "same"


def test_answers_and_thoughts_equal_those_of_llama_server(
    chain: Recipe, published: str, api: Ollama, tmp_path: Path
) -> None:
    """Of a model that was just loaded: a cached beginning of a prompt changes the last digits."""
    prompt, gguf = prompt_of(chain, folder_of(chain)), folder_of(chain).gguf("tutor", matrix.KIND)
    with (
        serve_gguf(gguf, context=512, threads=1, log=tmp_path / "log", prompt=prompt) as local,
        serve(published, HOST, prompt) as server,
    ):
        for question in QUESTIONS:
            api.unload(published)
            mine, theirs = (each.answer(conversation(question), GREEDY) for each in (local, server))
            assert (mine.thought, mine.text) == (theirs.thought, theirs.text)
            assert (mine.prompt_tokens, mine.tokens, mine.finish) == (
                theirs.prompt_tokens,
                theirs.tokens,
                theirs.finish,
            )
            assert bool(theirs.thought) is (chain.reasoning == "rows")


def test_chat_shows_thoughts_apart_from_answers(chain: Recipe, published: str, api: Ollama) -> None:
    prompt, lines = prompt_of(chain, folder_of(chain)), [*QUESTIONS, "/salir"]
    screen, thoughts = list[str](), list[str]()
    terminal = Terminal(lambda _: lines.pop(0), screen.append, lambda _: None, thoughts.append)
    engine = OllamaServer(api, published, prompt)
    assert converse(engine, GREEDY, terminal, system="", prompt=prompt) == 0
    assert bool("".join(thoughts).strip()) is (chain.reasoning == "rows")
    assert "".join(screen).strip() or thoughts
    assert "think>" not in "".join([*screen, *thoughts])


def test_base_and_adapter_apart_have_the_same_prompts(chain: Recipe, published: str) -> None:
    result = publish.publish(chain, chain.path.parent, host=HOST, adapter=True)
    assert result["model"] == f"{published}-lora"
    assert result["prompts"] >= 7
    assert {check["name"]: check["ok"] for check in result["parity"]["checks"]}["prompt"]


def test_template_that_ollama_knows_is_refused_by_its_name(
    chain: Recipe, published: str, api: Ollama, tmp_path: Path
) -> None:
    if chain.reasoning == "rows":
        pytest.skip("Ollama knows no template with thoughts")
    assert published
    target = tmp_path / "plain.gguf"
    to_gguf(Conversion(folder_of(chain).stage("merge"), target, "llama-bpe", chat_template=CHATML))
    prompt = prompt_of(chain, folder_of(chain))
    given = {"prompt": prompt, "family": "llama", "own_template": CHATML}
    model = builds.read_model(folder_of(chain).stage("modelfile"), "F16", **given)
    plain = replace(model, files={target.name: target})
    with pytest.raises(GateError, match=r"template is .*range .Messages.* instead of .*took it for 'chatml'"):
        builds.publish_build(plain, {target: file_sha256(target)}, api)
