"""The Makefile: each target works alone in a fresh clone, so it asks for all that its commands need."""

import re
import shutil
import subprocess

import pytest
from support.processes.command import ROOT, environment

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
CREATED = "-m venv .venv"
DEVELOPMENT = ("pytest", "ruff", "mypy", "lint-imports")
"""Programs that only requirements/dev.txt installs."""
TOOLS = ("scripts/build_llamacpp.py", "scripts/install_typescript.py")
"""Commands that bring the tools which the tests of whole stages and of containers need."""

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
            needs = {CREATED} if ".venv/bin" in command else set()
            if any(f".venv/bin/{program}" in command for program in DEVELOPMENT):
                needs.add("-r requirements/dev.txt")
            if ".venv/bin/pytest" in command and "not llamacpp" not in command:
                needs.update(TOOLS)
            found += [f"{target}: {need}" for need in sorted(needs) if need not in done]
            done += f"{command}\n"
    return found


def test_target_prerequisites_install_what_its_commands_need() -> None:
    assert {"chat", "check", "lock", "status", "test", "test-docker"} <= targets(MAKEFILE)
    assert faults(MAKEFILE) == []


@pytest.mark.parametrize(
    ("target", "without", "fault"),
    [
        ("chat", "chat:", f"chat: {CREATED}"),
        ("lock", "lock:", f"lock: {CREATED}"),
        ("check", "check: .venv/light", "check: -r requirements/dev.txt"),
        ("test", "test: .venv/demo typescript", f"test: {TOOLS[0]}"),
        ("test-docker", "test-docker: .venv/demo llamacpp", f"test-docker: {TOOLS[1]}"),
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


@pytest.mark.parametrize("name", ["base.txt", "wheel.txt", "build.txt"])
def test_development_pins_contain_each_smaller_set(name: str) -> None:
    """.venv/base stands for the smaller environments too."""

    def pins(name: str) -> set[str]:
        text = (ROOT / "requirements" / name).read_text("utf-8")
        return set(re.findall(r"^\S+==\S+(?: ;[^\\\n]*)?", text, re.MULTILINE))

    assert pins(name)
    assert pins(name) <= pins("dev.txt")
