"""A fake host with Docker and Compose: programs on PATH with scripted answers (docs/facts.md, 12)."""

import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FAKE = """#!{python} -S
import json, os, sys, time
here = {folder!r}
line = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
kept = {{name: value for name, value in os.environ.items() if name.startswith(("TUTOR_", "HF_"))}}
token = kept.get("HF_TOKEN_FILE")
if token:
    kept["mode"] = oct(os.stat(token).st_mode)
    kept["token"] = open(token).read()
with open(here + "/calls.jsonl", "a") as calls:
    calls.write(json.dumps([line, kept]) + "\\n")
for part, answer in json.load(open(here + "/answers.json")):
    if part in line:
        sys.stderr.write(answer.get("stderr", ""))
        sys.stderr.flush()
        sys.stdout.write(answer.get("stdout", ""))
        time.sleep(answer.get("seconds", 0))
        sys.exit(answer.get("code", 0))
"""


INFO = {"ServerVersion": "26.1.5", "Runtimes": {"runc": {}}, "DockerRootDir": "/"}


PROJECT = {
    "name": "tutor",
    "services": {
        "trainer": {"image": "tutor-trainer", "build": {"args": {"BASE_IMAGE": "debian:trixie-slim"}}},
        "publisher": {"image": "tutor-client", "build": {"args": {"BASE_IMAGE": "debian:trixie-slim"}}},
        "ollama": {"image": "tutor-ollama", "build": {"args": {"OLLAMA_IMAGE": "ollama/ollama:0.33.3"}}},
    },
}
"""Part of the output of `docker compose config` for compose.yaml."""


FIT_ANSWERS: list[tuple[str, dict[str, Any]]] = [
    ("docker info", {"stdout": json.dumps(INFO)}),
    ("context inspect", {"stdout": "unix:///var/run/docker.sock\n"}),
    ("config --format json", {"stdout": json.dumps(PROJECT)}),
    ("compose version", {"stdout": "2.26.1-4\n"}),
    ("port ollama", {"stdout": "127.0.0.1:11434\n"}),
    ("run --rm", {"stdout": '{"ran": true}'}),
]
"""Answers of a host without a GPU: part of a command line, its output; other commands exit with 0 and no output."""


class Host:
    """Programs on PATH, and their answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers = list(FIT_ANSWERS)

    def add(self, *names: str) -> None:
        for name in names:
            path = self.folder / name
            path.write_text(FAKE.format(python=sys.executable, folder=str(self.folder)))
            path.chmod(0o755)

    def answer(self, part: str, **answer: Any) -> None:
        """Set the answer to all later command lines that contain `part`; an earlier answer to them is overridden."""
        self.answers.insert(0, (part, answer))
        (self.folder / "answers.json").write_text(json.dumps(self.answers))

    @property
    def calls(self) -> list[str]:
        return [line for line, _ in self.calls_with_environment]

    @property
    def calls_with_environment(self) -> list[tuple[str, dict[str, str]]]:
        path = self.folder / "calls.jsonl"
        return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host with Docker and Compose, without a GPU, with 500 GB free on its disks."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=500 * 10**9))
    for name in [name for name in os.environ if name.startswith(("TUTOR_", "HF_", "COMPOSE_"))]:
        monkeypatch.delenv(name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("TUTOR_OLLAMA_PORT", str(probe.getsockname()[1]))
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    made = Host(folder)
    made.add("docker")
    made.answer("no such command")
    return made
