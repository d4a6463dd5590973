""".ci/skipped.py: what .ci/run prints of the skipped tests."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.processes.command import ROOT

SKIPPED = ROOT / ".ci" / "skipped.py"
REPORTS = {
    "2-make_test.xml": {"a": "no server", "b": "no server", "c": "no server", "d": "reads every file (root)", "e": ""},
    "3-as_a_user.xml": {"d": ""},
    "10-container_tests.xml": {"f": "no image"},
    "10-container_tests.real-server.xml": {"a": "", "b": "", "c": "no program"},
}
"""Report -> test -> the reason it is skipped for; none where it ran."""


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    for name, tests in REPORTS.items():
        cases = ""
        for test, reason in tests.items():
            skip = f'<skipped message="{reason}"/>' if reason else ""
            cases += f'<testcase classname="tests.test_x" name="{test}">{skip}</testcase>'
        (tmp_path / name).write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", "utf-8")
    return tmp_path


def run(*arguments: str | Path) -> list[str]:
    done = subprocess.run([sys.executable, SKIPPED, *arguments], capture_output=True, encoding="utf-8", check=True)
    return done.stdout.splitlines()


def test_skipped_prints_each_reason_once_with_its_step(reports: Path) -> None:
    assert run(reports) == [
        "   2  no server",
        "      2 of them ran in: container tests",
        "   1  no program",
        "      1 of them ran in NO step",
        "   1  reads every file (root)",
        "      1 of them ran in: as a user",
        "   1  no image",
        "      1 of them ran in NO step",
    ]


def test_ids_select_the_tests_of_a_reason(reports: Path) -> None:
    assert run(reports, "--ids", "(root)") == ["tests/test_x.py::d"]


def test_no_skipped_test_is_printed_as_none(tmp_path: Path) -> None:
    assert run(tmp_path) == ["none"]
