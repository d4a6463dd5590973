"""scripts/install.py and scripts/environment/: real scripts with a fake uv, in a checkout of their own."""

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.fakes.uv import Checkout, make_checkout
from support.processes.waiting import wait_for

PIP_ANSWER = """\
Collecting torch==2.15.0 (from -r requirements/train.txt (line 1))
  Downloading torch-2.15.0-cp311-cp311-manylinux_2_28_x86_64.whl (514.2 MB)
Installing collected packages: torch
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path)


def installs(calls: list[str]) -> list[str]:
    """Return of each installation of pins the names of their files."""
    return [
        " ".join(Path(word).stem for word in call.split() if word.endswith(".txt"))
        for call in calls
        if "--requirement" in call
    ]


def test_set_is_installed_once_with_hashes_and_wheels(checkout: Checkout) -> None:
    done = checkout.install("light")
    assert done.returncode == 0, done.stderr
    calls = checkout.calls()
    assert installs(calls) == ["base wheel"]
    assert all("--require-hashes --only-binary :all:" in call for call in calls if "--requirement" in call)
    assert "environment: 3 packages, 0.8 GB downloaded in 0 s" in done.stderr
    again = checkout.install("light")
    assert (again.returncode, again.stderr, checkout.calls()) == (0, "", [])


def test_link_to_a_folder_with_other_files_is_refused(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "thesis.txt").write_text("mine")
    shutil.rmtree(checkout.folder / ".venv")
    (checkout.folder / ".venv").symlink_to(tmp_path / "disk")
    done = checkout.install("light")
    assert done.returncode == 4
    assert ".venv is no virtual environment: it holds thesis.txt; move it away" in done.stderr
    assert (tmp_path / "disk" / "thesis.txt").read_text() == "mine"


def test_changed_pins_are_installed_again(checkout: Checkout) -> None:
    checkout.install("light")
    checkout.calls()
    (checkout.folder / "requirements" / "base.txt").write_text("base-package==2.0 --hash=sha256:00\n", "utf-8")
    assert checkout.install("light").returncode == 0
    assert installs(checkout.calls()) == ["base wheel"]


def test_demo_builds_llamacpp_after_its_tools_are_there(checkout: Checkout) -> None:
    done = checkout.install("demo")
    assert done.returncode == 0, done.stderr
    calls = checkout.calls()
    assert installs(calls) == ["build wheel", "train demo"]
    order = [call for call in calls if call in ("build_llamacpp", "install_typescript") or "demo.txt" in call]
    assert order.index("install_typescript") == 2
    assert (checkout.folder / ".venv" / "llamacpp" / "BUILD.json").exists()
    assert (checkout.folder / ".venv" / "typescript" / "INSTALL.json").exists()


def test_development_set_contains_the_light_one(checkout: Checkout) -> None:
    checkout.install("dev")
    checkout.calls()
    assert checkout.install("light").stderr == ""
    assert checkout.calls() == []


def test_pip_installs_where_it_is_chosen(checkout: Checkout) -> None:
    checkout.set_answer(PIP_ANSWER, 0)
    done = checkout.install("light", "--installer", "pip", PIP_CERT="/ca.pem")
    assert done.returncode == 0, done.stderr
    calls = checkout.calls()
    assert {call.split()[0] for call in calls} == {"pip"}
    assert installs(calls) == ["base wheel"]
    assert "environment: 1 packages, 0.5 GB downloaded in 0 s" in done.stderr


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            "error: Failed to download `torch`\n  cause: failed to write to file `/c/x`: No space left on device (os "
            "error 28)",
            "the disk is full (",
        ),
        (
            "error: Failed to fetch: https://name:secret@localhost:8443/simple/uv/\n  cause: invalid peer certificate: "
            "UnknownIssuer",
            "the certificate of localhost:8443 is not trusted here",
        ),
        (
            "error: Request failed after 3 retries in 7.0s\n  cause: Failed to fetch: http://127.0.0.1:9/simple/uv/\n"
            "  cause: tcp connect error\n  cause: Connection refused (os error 111)",
            "127.0.0.1:9 does not answer",
        ),
        (
            "error: No solution found\n  cause: Because uv was not found in the package registry and you require uv",
            "no file of a pinned package",
        ),
        ("error: something new", "error: something new; all output: "),
        ("", "no output; all output: "),
    ],
    ids=["full disk", "certificate", "network", "no package", "unknown", "silent"],
)
def test_failure_of_uv_is_one_line_with_exit_four(checkout: Checkout, answer: str, message: str) -> None:
    checkout.set_answer(answer, 2)
    done = checkout.install("light")
    assert done.returncode == 4
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "secret" not in errors[0]
    assert errors[0].endswith("; the same command continues from here")


def test_wrong_hash_is_exit_five(checkout: Checkout) -> None:
    checkout.set_answer("error: Failed to download `click==8.5.1`\n  cause: Hash mismatch for `click==8.5.1`", 2)
    done = checkout.install("light")
    assert done.returncode == 5
    assert "serves a file without its pinned hash" in done.stderr


def test_failed_set_is_written_again_until_it_is_complete(checkout: Checkout) -> None:
    """A package that was cut off while it was written looks installed to uv."""
    checkout.install("build")
    checkout.calls()
    checkout.set_answer("error: something new", 2)
    assert checkout.install("demo").returncode == 4
    assert reinstalled(checkout.calls()) == [False]
    checkout.set_answer("Resolved 3 packages in 1ms", 0)
    assert checkout.install("demo").returncode == 0
    assert reinstalled(checkout.calls()) == [True, True]
    (checkout.folder / ".venv" / "demo").unlink()
    assert checkout.install("demo").returncode == 0
    assert reinstalled(checkout.calls()) == [False]


def reinstalled(calls: list[str]) -> list[bool]:
    """Return for each installation of pins whether it writes what is there once more."""
    return ["--reinstall" in call for call in calls if "--requirement" in call]


def test_small_disk_is_refused_before_the_download(checkout: Checkout, tmp_path: Path) -> None:
    patch = tmp_path / "patch"
    patch.mkdir()
    text = "import shutil\nshutil.disk_usage = lambda path: type('Disk', (), {'free': 2 * 10**8})\n"
    (patch / "sitecustomize.py").write_text(text, "utf-8")
    done = checkout.install("light", PYTHONPATH=str(patch))
    assert done.returncode == 4
    assert "not enough disk space for " in done.stderr
    assert "0.2 GB free, 0.3 GB needed" in done.stderr
    assert installs(checkout.calls()) == []


def test_failed_tool_ends_the_installation(checkout: Checkout) -> None:
    (checkout.folder / "build_llamacpp.error").write_text("no C++ compiler (c++); apt-get install g++", "utf-8")
    checkout.install("build")
    (checkout.folder / "wait").touch()
    began = time.monotonic()
    done = checkout.install("demo")
    assert time.monotonic() - began < 30
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1].startswith("Error: no C++ compiler (c++); apt-get install g++; ")
    assert not (checkout.folder / ".venv" / "llamacpp").exists()


def test_failed_installation_ends_the_build_of_llamacpp(checkout: Checkout) -> None:
    checkout.install("build")
    (checkout.folder / "build_llamacpp.wait").touch()
    checkout.set_answer("error: something new", 2)
    began = time.monotonic()
    done = checkout.install("demo")
    assert time.monotonic() - began < 30
    assert done.returncode == 4
    assert "error: something new" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_ends_all_programs_with_one_line(checkout: Checkout, number: signal.Signals, code: int) -> None:
    checkout.install("build")
    (checkout.folder / "build_llamacpp.wait").touch()
    (checkout.folder / "wait").touch()
    checkout.calls()
    process = subprocess.Popen(checkout.command("demo"), cwd=checkout.folder, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (checkout.folder / ".venv" / "environment.log").exists() and running(checkout) == 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert errors.splitlines()[-1] == "interrupted; the same command continues from here"
    assert running(checkout) == 0


STARTS = """\
import os, signal, sys
sys.path.insert(0, "scripts")
from pathlib import Path
from environment.jobs import Job, Jobs
from environment.output import Display, ToolReader
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(143))
def start():
    command = [sys.executable, "scripts/build_llamacpp.py"]
    job = Job("tool", command, ToolReader(), Path("tool.log"), os.environ, Path.cwd())
    os.kill(os.getpid(), signal.SIGTERM)
    return job
jobs = Jobs(Display(sys.stderr))
with jobs.ended_together():
    jobs.start(start)
"""


def test_signal_while_a_program_starts_ends_the_program_too(checkout: Checkout) -> None:
    (checkout.folder / "build_llamacpp.wait").touch()
    done = subprocess.run([sys.executable, "-c", STARTS], cwd=checkout.folder, timeout=30, check=False)
    assert (done.returncode, running(checkout)) == (143, 0)


def running(checkout: Checkout) -> int:
    """Return how many programs of the set-up run: uv and the build of llama.cpp."""
    count = 0
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = entry.read_bytes().decode().split("\0")
            place = (entry.parent / "cwd").readlink()
            count += place == checkout.folder and any("uv" in word or "build_" in word for word in command[1:2])
    return count


def test_second_set_up_at_a_time_is_refused(checkout: Checkout) -> None:
    (checkout.folder / "wait").touch()
    process = subprocess.Popen(checkout.command("light"), cwd=checkout.folder, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: running(checkout) == 1)
    done = checkout.install("light")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert (done.returncode, done.stderr) == (
        7,
        "Error: another make installs into .venv; wait for its end\n",
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")
def test_make_starts_nothing_until_a_tool_is_gone(checkout: Checkout) -> None:
    assert checkout.make("install").returncode == 0
    checkout.calls()
    again = checkout.make("install")
    assert (again.stderr, checkout.calls()) == ("", [])
    shutil.rmtree(checkout.folder / "cache" / "build_llamacpp")
    assert checkout.make("install").returncode == 0
    assert sorted(checkout.calls()) == ["build_llamacpp", "install_typescript"]
