"""cli/commands/serving.py: ask. tests/serving covers what the other commands call."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.fakes.ollama import FakeOllama, Model, gguf, running
from support.models.chat_templates import FACTS, SWITCH
from support.processes.command import ROOT, TUTOR, environment

from tutor.cli.commands.serving import ask_command, chat_command
from tutor.machine import host
from tutor.prompt.template_analysis import analyse_template
from tutor.prompt.tutor_format import GO_TEMPLATE


@pytest.fixture
def server() -> Iterator[FakeOllama]:
    """A fake server with one model, `tutor`."""
    with running() as fake:
        body = {"template": GO_TEMPLATE, "parameters": {"num_ctx": 64}}
        fake.models["tutor:latest"] = Model(body, {"quantization": "Q8_0", "chat_template": ""}, "sha256:0")
        fake.order.append("tutor:latest")
        fake.blobs["sha256:0"] = gguf()
        yield fake


def test_question_on_stdin_that_is_not_utf8_is_refused():
    done = subprocess.run(
        [TUTOR, "ask"], input=b"\xbfQu\xe9?", capture_output=True, env=environment(), cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert b"the question on stdin is not UTF-8 (byte 0)" in done.stderr


def test_ask_prints_the_answer_without_its_leading_blank(server: FakeOllama, recipe_file: Path, tmp_path: Path) -> None:
    where = ["--engine", "ollama", "--host", server.host, "-r", str(recipe_file), "-b", str(tmp_path)]
    done = CliRunner().invoke(ask_command, ["Hola", *where], obj={"quiet": True})
    assert done.stdout == "Una interfaz describe un objeto.\n"
    as_json = CliRunner().invoke(ask_command, ["Hola", *where, "--json"], obj={"quiet": True})
    assert json.loads(as_json.stdout)["text"] == "Una interfaz describe un objeto."


def test_ask_prints_a_thought_on_stderr_and_its_answer_on_stdout(
    server: FakeOllama, recipe_file: Path, tmp_path: Path
) -> None:
    prompt = analyse_template(SWITCH, FACTS, where="base", reasoning="rows")
    recipe_file.write_text('prompt = "base"\nreasoning = "rows"\n' + recipe_file.read_text("utf-8"), "utf-8")
    facts = {"source": "tiny", "model": "model", "weights": "", "vocabulary": 9, "add_bos": False, "bos": None}
    facts |= {"eos": 0, "pad": None, "pre_tokenizer": "", "check": {}, "prompt": prompt.to_json()}
    base = tmp_path / "build" / "small" / "base"
    base.mkdir(parents=True)
    (base / "base.json").write_text(json.dumps(facts), "utf-8")
    chat_template = prompt.chat_template(add_bos=False)
    server.models["tutor:latest"] = Model({}, {"quantization": "Q8_0", "chat_template": chat_template}, "sha256:0")
    server.pieces = ["<think>", "\nPienso", " algo.\n", "</think>", "\n\nUna ", "interfaz."]
    where = ["--engine", "ollama", "--host", server.host, "-r", str(recipe_file), "-b", str(tmp_path / "build")]
    done = CliRunner().invoke(ask_command, ["Hola", *where], obj={"quiet": False})
    assert done.stdout == "Una interfaz.\n", done.output
    assert "Pienso algo.\n" in done.stderr
    quiet = CliRunner().invoke(ask_command, ["Hola", *where], obj={"quiet": True})
    assert (quiet.stdout, quiet.stderr) == ("Una interfaz.\n", "")
    as_json = json.loads(CliRunner().invoke(ask_command, ["Hola", *where, "--json"], obj={"quiet": True}).stdout)
    assert (as_json["text"], as_json["thought"]) == ("Una interfaz.", "Pienso algo.")
    server.pieces = ["<think>", "\nPienso", " y", " y"] + [" y"] * 600
    cut = CliRunner().invoke(ask_command, ["Hola", *where], obj={"quiet": True})
    assert not cut.stdout.strip()
    assert cut.stderr.endswith(" tokens within its thought)\n")


def test_ask_takes_a_question_that_begins_with_a_dash(server: FakeOllama, recipe_file: Path, tmp_path: Path) -> None:
    where = ["--engine", "ollama", "--host", server.host, "-r", str(recipe_file), "-b", str(tmp_path)]
    done = CliRunner().invoke(ask_command, ["-5 % 3", *where, "--json"], obj={"quiet": True})
    assert done.exit_code == 0, done.output
    assert "-5 % 3" in str(server.requests)


def test_first_line_of_a_chat_names_a_lost_gpu(
    server: FakeOllama, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ["--engine", "ollama", "--host", server.host, "-r", str(recipe_file), "-b", str(tmp_path)]
    done = CliRunner().invoke(chat_command, where, obj={"quiet": True}, input="/salir\n")
    assert "GPU" not in done.stderr, "this machine has none"
    monkeypatch.setattr(host, "gpus", lambda: ["a GPU"])
    server.gpu_share = 0.0
    done = CliRunner().invoke(chat_command, where, obj={"quiet": True}, input="/salir\n")
    first = done.stderr.splitlines()[0]
    assert first.startswith("this machine has a GPU, but Ollama has only 0% of tutor:latest on it; restart Ollama")


def test_answer_with_control_characters_is_shown_escaped(server: FakeOllama, recipe_file: Path, tmp_path: Path) -> None:
    server.pieces = [
        " \x1b",
        "]52;c;eA==\x07 👩",
        "\u200d",
        "💻 \u202e\r",
        "\nfin \x9b31",
        "m hf_" + "a" * 15,
        "b" * 15,
    ]
    shown = "\\x1b]52;c;eA==\\x07 👩‍💻 \\u202e\r\nfin \\x9b31m [redacted]\n"
    where = ["--engine", "ollama", "--host", server.host, "-r", str(recipe_file), "-b", str(tmp_path)]
    done = CliRunner().invoke(ask_command, ["Hola", *where], obj={"quiet": True})
    assert done.stdout_bytes.decode() == shown
    chat = CliRunner().invoke(chat_command, where, obj={"quiet": True}, input="Hola\n/salir\n")
    assert shown in chat.stdout_bytes.decode()
    as_json = CliRunner().invoke(ask_command, ["Hola", *where, "--json"], obj={"quiet": True}).stdout
    assert json.loads(as_json)["text"].startswith("\x1b]52;c;eA==\x07 👩‍💻 \u202e\r\nfin \x9b31m")
    assert not {"\x1b", "\x9b", "\u202e"} & set(as_json)
