"""The Makefile: each target works alone in a fresh clone, for any path of a recipe and of the checkout."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes.command import ROOT, environment

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
INSTALL = "scripts/install.py"
DEVELOPMENT = ("pytest", "ruff", "mypy", "lint-imports")
"""Programs that only the set of packages for development has."""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")


def targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))


def commands(makefile: str, target: str) -> list[str]:
    """Every command that make would run for a target where nothing exists yet, in order; none of them is run."""
    plain = {name: value for name, value in environment().items() if not name.startswith(("MAKE", "MFLAGS", "RECIPE"))}
    command = ["make", "--file", "-", "--dry-run", "--always-make", target]
    done = subprocess.run(command, cwd=ROOT, env=plain, input=makefile, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def faults(makefile: str) -> list[str]:
    """Each target that runs a command before the commands that bring what it needs."""
    found = []
    for target in sorted(targets(makefile)):
        done = ""
        for command in commands(makefile, target):
            needs = {INSTALL} if ".venv/bin" in command else set()
            if any(f".venv/bin/{program}" in command for program in DEVELOPMENT):
                needs.add(f"{INSTALL} dev")
            # The demo's set contains llama.cpp and TypeScript, which tests of whole stages and of containers need.
            if (".venv/bin/pytest" in command and "not llamacpp" not in command) or ".venv/bin/tutor run" in command:
                needs.add(f"{INSTALL} demo")
            found += [f"{target}: {need}" for need in sorted(needs) if need not in done]
            done += f"{command}\n"
    return found


def test_target_prerequisites_install_what_its_commands_need() -> None:
    assert {"chat", "check", "lock", "status", "test", "test-docker"} <= targets(MAKEFILE)
    assert faults(MAKEFILE) == []


@pytest.mark.parametrize(
    ("target", "without", "fault"),
    [
        ("chat", "chat:", f"chat: {INSTALL}"),
        ("demo", "demo: .venv/light", f"demo: {INSTALL} demo"),
        ("check", "check: .venv/light", f"check: {INSTALL} dev"),
        ("test", "test: .venv/demo", f"test: {INSTALL} dev"),
        ("test-docker", "test-docker: .venv/dev", f"test-docker: {INSTALL} demo"),
    ],
)
def test_target_without_its_prerequisite_is_detected(target: str, without: str, fault: str) -> None:
    spoiled, count = re.subn(rf"^{target}:.*(?=##)", f"{without} ", MAKEFILE, flags=re.MULTILINE)
    assert count == 1
    assert fault in faults(spoiled)


def test_every_target_is_phony_and_has_a_help_line() -> None:
    phony = re.search(r"^\.PHONY:(.*)$", MAKEFILE, re.MULTILINE)
    assert phony
    assert set(phony[1].split()) == targets(MAKEFILE)


RECORD = """#!{python}
import json, pathlib, sys
pathlib.Path("called.json").write_text(json.dumps(sys.argv[1:]))
"""
"""Program that writes its arguments into the current folder."""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a complete environment, whose `tutor` records its arguments, in a path with blanks and quotes."""
    folder = tmp_path / "mi copia d'aquí"
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    (folder / ".venv" / "light").touch()
    program = folder / ".venv" / "bin" / "tutor"
    program.write_text(RECORD.format(python=sys.executable))
    program.chmod(0o755)
    return folder


def called(checkout: Path, *words: str, **variables: str) -> list[str]:
    """Return the arguments with which `make WORDS` starts tutor."""
    plain = {name: value for name, value in environment().items() if name not in ("MAKEFLAGS", "MFLAGS", "RECIPE")}
    done = subprocess.run(
        ["make", *words], cwd=checkout, env={**plain, **variables}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    arguments: list[str] = json.loads((checkout / "called.json").read_text())
    return arguments


@pytest.mark.parametrize(
    "recipe",
    ["data/mi receta.toml", 'd\'ella "x".toml', "a$b $$c $(shell touch made) `touch made`; touch made #.toml"],
)
def test_recipe_with_blanks_and_quotes_reaches_tutor_unchanged(checkout: Path, recipe: str) -> None:
    assert called(checkout, "status", f"RECIPE={recipe}") == ["status", "--recipe", recipe]
    assert called(checkout, "doctor", RECIPE=recipe) == ["doctor", "--recipe", recipe]
    assert called(checkout, "down", f"RECIPE={recipe}") == ["stack", "call", "down", "--recipe", recipe]
    assert not (checkout / "made").exists()


def test_targets_without_a_recipe_take_their_default(checkout: Path) -> None:
    assert called(checkout, "status") == ["status", "--recipe", "data/demo.toml"]
    assert called(checkout, "down") == ["stack", "call", "down", "--recipe", "data/tutor.toml"]


def test_audit_reads_every_pin_and_skips_none(tmp_path: Path) -> None:
    """Without --strict a package that the database does not have is skipped, with exit code 0."""
    command = next(shlex.split(line) for line in commands(MAKEFILE, "audit") if "pip-audit" in line)
    assert "--strict" in command
    read = {Path(word.partition("=")[2]).name for word in command if word.startswith("--requirement=")}
    assert read == {path.name for path in (ROOT / "requirements").glob("*.txt")}
    offline = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    program = [sys.executable, "-m", "pip_audit", *command[1:], "--dry-run"]
    done = subprocess.run(program, cwd=ROOT, env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count = re.search(r"would have audited (\d+) packages", done.stderr)
    assert count
    assert int(count[1]) > 100


@pytest.mark.parametrize("name", ["base.txt", "wheel.txt", "build.txt", "train.txt"])
def test_development_pins_contain_each_smaller_set(name: str) -> None:
    """.venv/dev stands for the smaller environments too."""

    def pins(name: str) -> set[str]:
        text = (ROOT / "requirements" / name).read_text("utf-8")
        return set(re.findall(r"^\S+==\S+(?: ;[^\\\n]*)?", text, re.MULTILINE))

    assert pins(name)
    assert pins(name) <= pins("dev.txt")
