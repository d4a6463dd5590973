"""engines/llamacpp/build_output.py: the progress line, and the error for known and other failures."""

import io
from pathlib import Path

import pytest

from tutor.engines.llamacpp.build_output import BuildProgress, explain
from tutor.errors import ArtifactError, HostError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_overwrites_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    progress = BuildProgress()
    for line in ("-- Configuring done\n", "[1/80] Building CXX object a.o\n", "[2/80] Building CXX object b.o\n"):
        progress.read(line)
    progress.end()
    assert stream.getvalue() == "\r\033[Kllama.cpp: 1 of 80\r\033[Kllama.cpp: 2 of 80\r\033[K"


def test_progress_elsewhere_prints_the_first_and_last_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines are seconds apart, so of steps that come at once only these two are printed."""
    progress = BuildProgress()
    for step in range(1, 81):
        progress.read(f"[{step}/80] Building CXX object {step}.o\n")
    progress.end()
    assert capsys.readouterr().err == "llama.cpp: 1 of 80\nllama.cpp: 80 of 80\n"


@pytest.mark.parametrize(
    ("output", "kind", "words"),
    [
        ("x.cpp:3:1: fatal error: cannot write: No space left on device\n", HostError, "the disk is full"),
        ("c++: fatal error: Killed signal terminated program cc1plus\n", HostError, "ran out of memory"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError'\n", HostError, "check the network"),
        ("SSLError(SSLCertVerificationError: CERTIFICATE_VERIFY_FAILED)\n", HostError, "PIP_CERT=FILE"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n", ArtifactError, "serves another file"),
        ("/usr/bin/python: No module named pip\n", HostError, "has no pip"),
        (
            "a.cpp:1: error: no type\nb.cpp:2: error: no name\nninja: stopped\n",
            ArtifactError,
            "b.cpp:2: error: no name",
        ),
        ("one\ntwo\n", ArtifactError, "two; all output: build.log"),
        ("", ArtifactError, "exit code 3"),
    ],
)
def test_failure_is_explained_by_its_output(output: str, kind: type, words: str) -> None:
    error = explain("compile llama.cpp", output.splitlines(keepends=True), 3, Path("build.log"))
    assert type(error) is kind
    assert words in str(error)
    assert "\n" not in str(error)
