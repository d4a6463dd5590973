"""scripts/environment/output.py: progress from the lines of uv, pip and the build scripts; terminals and logs."""

import io
import sys

import pytest
from support.processes.command import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from environment import output


class Stream(io.StringIO):
    """Text that a terminal gets."""

    def isatty(self) -> bool:
        return True


def uv_reader(*lines: str) -> output.UvReader:
    reader = output.UvReader()
    for line in lines:
        reader.read(line)
    return reader


BEGUN = ("Resolved 107 packages in 2ms", "Downloading torch (1.5GiB)", "Downloading triton (512.0MiB)")


def test_uv_progress_is_what_has_arrived_of_all() -> None:
    assert uv_reader().state() == "reading the package index"
    reader = uv_reader(*BEGUN)
    assert reader.state() == "0.00 of 2.1 GB, 0 of 2 files"
    reader.read(" Downloaded triton")
    assert reader.state() == "0.5 of 2.1 GB, 1 of 2 files"
    reader.read("Prepared 107 packages in 26.15s")
    assert reader.state() == "installing 107 packages"
    assert reader.summary() == "107 packages, 2.1 GB downloaded"


def test_uv_progress_moves_while_a_large_package_arrives() -> None:
    reader = uv_reader(*BEGUN)
    reader.written = 1_900_000_000
    assert reader.state() == "1.0 of 2.1 GB, 0 of 2 files"
    reader.written = 19_000_000_000
    assert reader.state() == "2.1 of 2.1 GB, 0 of 2 files"


def test_pip_progress_counts_packages_of_this_system() -> None:
    reader = output.PipReader(4)
    for line in (
        "Ignoring colorama: markers 'sys_platform == \"win32\"' don't match your environment",
        "Requirement already satisfied: click==8.5.1 in ./lib",
        "Collecting torch==2.15.0 (from -r train.txt (line 1))",
        "  Downloading torch-2.15.0-cp311-cp311-manylinux_2_28_x86_64.whl (514.2 MB)",
    ):
        reader.read(line)
    assert reader.state() == "2 of 3 packages, 0.5 GB (torch)"
    reader.read("Installing collected packages: torch")
    assert reader.state() == "installing 3 packages"


@pytest.mark.parametrize("line", ["llama.cpp: 12 of 214", "[12/214] Building CXX object x.o"])
def test_tool_progress_is_a_number_of_a_number(line: str) -> None:
    reader = output.ToolReader()
    reader.read(line)
    reader.read("-- Found Threads: TRUE")
    assert reader.state() == "12 of 214"


def test_terminal_shows_progress_in_place_and_cut_to_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "10")
    stream = Stream()
    display = output.Display(stream)
    display.progress("1 of 2 packages")
    display.line("done")
    assert stream.getvalue() == "\r\x1b[K1 of 2 pa\r\x1b[Kdone\n"


def test_log_gets_a_line_of_progress_every_five_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    stream = io.StringIO()
    display = output.Display(stream)
    for second in range(12):
        now[0] = 100.0 + second
        display.progress(f"{second} s")
    display.line("done")
    assert stream.getvalue() == "0 s\n5 s\n10 s\ndone\n"
