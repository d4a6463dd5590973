"""Answers of an Ollama server of any content end every command that reads them as the contract says."""

import copy
import json
import shutil
from random import Random

import pytest
from support.fakes.ollama import running
from support.fuzzing.examples import check, seeds
from support.fuzzing.guard import run
from support.fuzzing.mutations import bytes_of, json_of
from support.outputs.published import make_stages

from tutor.recipe.reading import read_recipe

pytestmark = pytest.mark.slow
COMMANDS = (
    ("models",),
    ("ask", "--engine", "ollama", "¿Qué es un tipo?"),
    ("ask", "--engine", "ollama", "--json", "¿Qué es un tipo?"),
    ("verify", "tutor:latest"),
    ("publish", "--wait", "0"),
    ("promote",),
)


class Alter:
    """Changes one of the next answers of a server, or each of them."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.skip = random.choice((None, 0, 1, 2, 3, 5, 8))
        self.answers: list[bytes] = []

    def __call__(self, raw: bytes) -> bytes:
        chosen = self.skip is None or len(self.answers) == self.skip
        self.answers.append(self._changed(raw) if chosen else raw)
        return self.answers[-1]

    def _changed(self, raw: bytes) -> bytes:
        try:
            value = json.loads(raw)
        except ValueError:
            return bytes_of(raw, self.random)
        return json_of(value, self.random) + (b"\n" if raw.endswith(b"\n") else b"")


@pytest.fixture
def server():
    with running() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "inputs").mkdir()
    return tmp_path


def test_answers_of_any_content_are_read_or_refused(server, folder):
    path = folder / "inputs" / "small.toml"
    path.write_text('system = "Eres un tutor."\n[ollama]\nquantization = "Q8_0"\n', "utf-8")
    made, env = folder / "build", {"OLLAMA_HOST": server.host}
    make_stages(read_recipe(path), made)
    assert run("publish", "-r", path, folder=folder, env=env).code == 0
    state = {name: copy.deepcopy(getattr(server, name)) for name in ("models", "order", "loaded", "blobs")}
    shutil.copytree(made, folder / "published")
    for random in seeds(20):
        shutil.rmtree(made)
        shutil.copytree(folder / "published", made)
        vars(server).update(copy.deepcopy(state))
        server.alter = alter = Alter(random)
        outcome = run(*random.choice(COMMANDS), "-r", path, folder=folder, env=env)
        check(outcome, b"\n".join(alter.answers), folder)
