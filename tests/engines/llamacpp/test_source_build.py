"""engines/llamacpp/source_build.py: whole builds with small programs for pip, CMake and the compiler."""

import errno
import fcntl
import json
import os
import signal
import site
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes.command import ROOT

from tutor.engines.llamacpp.build import VERSION, is_built
from tutor.engines.llamacpp.source_build import CONVERTERS, build, find_compiler, main, usable_jobs
from tutor.errors import ArtifactError, HostError

PIP = """
import io, os, pathlib, sys, tarfile
home = pathlib.Path(__file__).parent
with (home / "calls").open("a") as calls:
    calls.write("pip\\n")
if (home / "pip_fails").exists():
    sys.exit((home / "pip_fails").read_text())
with tarfile.open(pathlib.Path(sys.argv[-1]) / "llama_cpp_python-VERSION.tar.gz", "w:gz") as tar:
    for name in FILES:
        member = tarfile.TarInfo(f"llama_cpp_python-VERSION/vendor/llama.cpp/{name}")
        tar.addfile(member, io.BytesIO())
"""
"""A Python whose `-m pip download` writes a source distribution, or fails with the text in pip_fails."""
CMAKE = """
import os, pathlib, sys, time
home = pathlib.Path(__file__).parent
with (home / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[1:2]) + "\\n")
if sys.argv[1] == "-S":
    pathlib.Path(sys.argv[sys.argv.index("-B") + 1]).mkdir(exist_ok=True)
    sys.exit()
out = pathlib.Path(sys.argv[2])
print("[1/2] Building CXX object a.o", flush=True)
(out / "a.o").touch()
if (home / "sleeps").exists():
    (home / "sleeps").write_text(str(os.getpid()))
    time.sleep(60)
if (home / "cmake_fails").exists():
    sys.exit((home / "cmake_fails").read_text())
for name in sys.argv[sys.argv.index("--target") + 1 :]:
    (out / name).write_text(name)
print("[2/2] Linking CXX executable b", flush=True)
"""
"""A CMake that makes empty programs, fails with the text in cmake_fails, or waits where there is a file `sleeps`."""


def program(path: Path, text: str) -> None:
    path.write_text(f"#!{sys._base_executable}\n{text}", "utf-8")  # type: ignore[attr-defined]
    path.chmod(0o755)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the programs of a build, and the build's folder beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "python", PIP.replace("VERSION", VERSION).replace("FILES", repr(CONVERTERS)))
    program(folder / "cmake", CMAKE)
    program(folder / "c++", "print('a compiler 1.0')")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("TUTOR_LLAMACPP", str(tmp_path / "build"))
    monkeypatch.delenv("CXX", raising=False)
    return folder


def calls(home: Path) -> list[str]:
    return (home / "calls").read_text("utf-8").split()


def test_build_is_complete_and_leaves_nothing_else(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(2, None) == 0
    folder = tmp_path / "build"
    assert is_built(folder)
    assert {path.name for path in folder.iterdir()} == {"bin", "BUILD.json", *CONVERTERS}
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "build", "build.lock"}
    assert json.loads((folder / "BUILD.json").read_text())["compiler"] == "a compiler 1.0"
    output = capsys.readouterr()
    assert output.out == f"{folder}\n"
    assert [line for line in output.err.splitlines() if " of " in line] == ["llama.cpp: 1 of 2", "llama.cpp: 2 of 2"]


def test_failed_compile_names_its_log_and_continues(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "cmake_fails").write_text("a.cpp:1: error: no such type", "utf-8")
    assert main(2, None) == ArtifactError.code
    log = tmp_path / "build.partial" / "build.log"
    assert f"cannot compile llama.cpp: a.cpp:1: error: no such type; all output: {log}\n" in capsys.readouterr().err
    assert "[1/2] Building CXX object a.o" in log.read_text("utf-8")
    assert not (tmp_path / "build").exists()
    (home / "cmake_fails").unlink()
    (tmp_path / "build.partial" / "build" / "kept.o").touch()
    program(
        home / "cmake",
        f"import pathlib; assert pathlib.Path({str(tmp_path)!r}, 'build.partial/build/kept.o').exists()" + CMAKE,
    )
    assert main(2, None) == 0
    assert calls(home) == ["pip", "-S", "--build", "-S", "--build"]


@pytest.mark.parametrize("name", ["main.cpp", "BUILD.json"])
def test_build_leaves_a_folder_that_tutor_did_not_make(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """TUTOR_LLAMACPP can name the user's own checkout, and its log can be beside it."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / name).write_text("{}", "utf-8")
    (tmp_path / "build.log").write_text("mine", "utf-8")
    assert main(2, None) == HostError.code
    assert f"{tmp_path}/build was not made by tutor: it has no BUILD.json of tutor's; set" in capsys.readouterr().err
    (tmp_path / "build" / name).write_text('{"llama_cpp_python": "0.1", "sizes": {}}', "utf-8")
    (tmp_path / "build" / name).rename(tmp_path / "build" / "BUILD.json")
    assert main(2, None) == 0
    assert (tmp_path / "build.log").read_text("utf-8") == "mine"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_build_on_a_disk_without_locks_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert main(2, None) == HostError.code
    assert f"build.lock: {os.strerror(number)}; set XDG_CACHE_HOME to a local disk\n" in capsys.readouterr().err


def test_two_processes_build_once_in_a_shared_folder(home: Path, tmp_path: Path) -> None:
    """The cache folder of two hosts: the second waits, and uses what the first has built."""
    code = (
        "import sys\nfrom tutor.engines.llamacpp import source_build\n"
        f"sys.executable = {str(home / 'python')!r}\nsys.exit(source_build.main(2, None))"
    )
    python = site.PREFIXES[0] + "/bin/python"
    run = [subprocess.Popen([python, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in run] == [f"{tmp_path}/build\n"] * 2
    assert [process.returncode for process in run] == [0, 0]
    assert calls(home) == ["pip", "-S", "--build"]


def test_objects_of_another_compiler_are_not_used(home: Path, tmp_path: Path) -> None:
    (home / "cmake_fails").touch()
    with pytest.raises(ArtifactError):
        build(tmp_path / "build", 1)
    kept = tmp_path / "build.partial" / "build" / "kept.o"
    kept.touch()
    program(home / "c++", "print('a compiler 2.0')")
    with pytest.raises(ArtifactError):
        build(tmp_path / "build", 1)
    assert not kept.exists()


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("NewConnectionError: name resolution", HostError.code, "does not answer; check the network"),
        ("OSError: [Errno 28] No space left on device", HostError.code, "the disk is full"),
        ("DO NOT MATCH THE HASHES", ArtifactError.code, "serves another file"),
    ],
)
def test_failed_download_is_one_line_with_its_code(
    home: Path, capsys: pytest.CaptureFixture[str], text: str, code: int, words: str
) -> None:
    (home / "pip_fails").write_text(text, "utf-8")
    assert main(2, None) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("llama.cpp: ")]
    assert len(errors) == 1
    assert "cannot fetch the source of llama.cpp" in errors[0]
    assert words in errors[0]


@pytest.mark.parametrize("value", ["", "c++", "ccache c++"])
def test_compiler_command_may_have_several_words(home: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    program(home / "ccache", "")
    monkeypatch.setenv("CXX", value)
    assert find_compiler() == (value.split() or ["c++"])


def test_compiler_command_with_an_open_quote_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'g++ "-O2')
    with pytest.raises(HostError, match="with an open quote"):
        find_compiler()


@pytest.mark.parametrize("value", ["", "no-compiler -O1"])
def test_main_without_compiler_returns_the_code_of_host_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    (home / "c++").unlink()
    monkeypatch.setenv("CXX", value)
    assert main(2, None) == HostError.code
    assert "on this machine; install one, on Debian: apt-get install g++" in capsys.readouterr().err
    assert not (tmp_path / "build.partial").exists()


def test_main_without_cmake_names_the_target_that_brings_it(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "cmake").unlink()
    assert main(2, None) == HostError.code
    assert "cmake not found; make llamacpp brings it" in capsys.readouterr().err


def test_main_prints_the_folder_of_a_complete_build(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(2, None)
    capsys.readouterr()
    assert main(2, None) == 0
    assert capsys.readouterr() == (f"{os.environ['TUTOR_LLAMACPP']}\n", "")
    assert calls(home).count("--build") == 1


def test_small_memory_reduces_the_number_of_compilers() -> None:
    assert usable_jobs(8, 3 << 30) == 3
    assert usable_jobs(2, 3 << 30) == 2
    assert usable_jobs(8, 1 << 20) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signal_ends_the_compiler_and_the_next_call_continues(
    home: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    (tmp_path / "build.partial" / "source" / "vendor" / "llama.cpp").mkdir(parents=True)
    (home / "sleeps").touch()
    (home / "python").unlink()
    (home / "python").symlink_to(sys._base_executable)  # type: ignore[attr-defined]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *site.getsitepackages()])}
    script = [str(home / "python"), str(ROOT / "scripts" / "build_llamacpp.py")]
    with subprocess.Popen(script, env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while not (home / "sleeps").read_text("utf-8") and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == code, errors
    with pytest.raises(ProcessLookupError):
        os.kill(int((home / "sleeps").read_text("utf-8")), 0)
    assert (tmp_path / "build.partial" / "build" / "a.o").exists()
