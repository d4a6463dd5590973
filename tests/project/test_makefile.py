"""The Makefile: each target works alone in a fresh clone, so it asks for all that its commands need."""

import re
import shutil
import subprocess

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


@pytest.mark.parametrize("name", ["base.txt", "wheel.txt", "build.txt", "train.txt"])
def test_development_pins_contain_each_smaller_set(name: str) -> None:
    """.venv/dev stands for the smaller environments too."""

    def pins(name: str) -> set[str]:
        text = (ROOT / "requirements" / name).read_text("utf-8")
        return set(re.findall(r"^\S+==\S+(?: ;[^\\\n]*)?", text, re.MULTILINE))

    assert pins(name)
    assert pins(name) <= pins("dev.txt")
