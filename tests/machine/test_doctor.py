"""The checks of `tutor doctor`; nvidia-smi is a small program on PATH. The command: tests/cli/commands."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.fakes.machine import HEADING

from tutor.errors import HostError
from tutor.machine import doctor
from tutor.machine import host as hardware
from tutor.machine.container_host import Daemon
from tutor.machine.host import Gpu

GIB = 1 << 30


def states(checks: Any) -> dict[str, str]:
    return {check.what: check.state for check in checks}


def test_check_without_gpu_names_the_cpu_recipe(machine):
    (check,) = doctor.gpu_checks([])
    assert (check.state, "data/demo.toml" in check.hint) == ("warning", True)


@pytest.mark.parametrize(("capability", "state"), [((6, 1), "missing"), ((7, 5), "warning"), ((8, 0), "ok")])
def test_check_of_compute_capability_has_three_states(machine, capability, state):
    gpu = Gpu(0, "a card", "580", capability, 8 * GIB, 8 * GIB)
    assert states(doctor.gpu_checks([gpu]))["compute capability"] == state


def test_check_of_two_gpus_is_a_warning(machine):
    gpu = Gpu(0, "a card", "580", (8, 0), 8 * GIB, 8 * GIB)
    assert "CUDA_VISIBLE_DEVICES" in next(iter(doctor.gpu_checks([gpu, gpu]))).hint


def installed(folder: Path, name: str, version: str) -> None:
    """An installed package: only its metadata are read."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize(("runs", "state"), [("12.8", "missing"), ("13.0", "ok"), ("14.1", "ok")])
def test_check_of_old_driver_names_both_cuda_versions(machine, tmp_path, monkeypatch, runs, state):
    installed(tmp_path / "site", "nvidia-cuda-runtime", "13.2.86")
    monkeypatch.syspath_prepend(tmp_path / "site")
    machine.gpu()
    (machine.folder / "heading").write_text(HEADING.replace("13.0", runs))
    check = next(check for check in doctor.gpu_checks(hardware.gpus()) if check.what == "driver")
    assert check.state == state
    assert runs in check.found
    assert ("CUDA 13.2" in check.hint) == (state == "missing")


@pytest.mark.parametrize(
    ("name", "version", "state", "expected_text"),
    [
        ("transformers", "5.9.0", "missing", "drops every blank"),
        ("transformers", "5.22.1", "missing", "5.22.2 or newer"),
        ("transformers", "4.57.6", "warning", "==5.23.0"),
        ("torch", "2.9.1+cu128", "missing", "CVE-2026-24747"),
        ("trl", "1.15.0", "warning", "==1.16.0"),
        ("jinja2", "3.1.5", "missing", "sandbox"),
    ],
)
def test_check_of_faulty_library_versions_names_the_fault(tmp_path, monkeypatch, name, version, state, expected_text):
    installed(tmp_path / "site", name, version)
    monkeypatch.syspath_prepend(tmp_path / "site")
    check = next(check for check in doctor.package_checks() if check.what == name)
    assert check.state == state
    assert expected_text in f"{check.found} {check.hint}"
    assert version in check.found


@pytest.mark.parametrize(
    ("version", "specifier", "right"),
    [
        ("1.16.0", "==1.16.0", True),
        ("1.16", "==1.16.0", True),
        ("1.16.1", "==1.16.0", False),
        ("2.15.0+cpu", ">=2.13", True),
        ("2.9", ">=2.13", False),
        ("24.20.1", ">=24.19,<25", True),
        ("25.0.0", "<25,>=24.19", False),
        ("7.2", "", True),
    ],
)
def test_versions_are_compared_by_number(version, specifier, right):
    assert doctor.satisfies(version, specifier) is right


def test_wanted_versions_are_those_of_pyproject():
    wanted = dict(doctor.wanted_versions("train"))
    assert {"torch", "transformers", "trl", "peft", "bitsandbytes"} <= wanted.keys()
    assert wanted["trl"] == "==1.16.0"


def test_check_of_missing_builds_names_the_build_command(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("TUTOR_LLAMACPP", str(tmp_path / "none"))
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", str(machine.folder))
    found = {check.what: check for check in doctor.program_checks()}
    assert "g++" in found["llama.cpp"].hint
    machine.program("c++", "#!/bin/sh\n")
    found = {check.what: check for check in doctor.program_checks()}
    assert (found["llama.cpp"].state, found["llama.cpp"].hint) == ("missing", "make llamacpp")
    assert found["TypeScript compiler"].needed_by != doctor.RUN


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """An Ollama that returns the given version."""
    expected_text = {"version": ""}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(expected_text).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
    yield lambda version: expected_text.update(version=version)
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize(("version", "state"), [("0.33.3", "ok"), ("0.29.9", "missing"), ("0.0.0", "warning")])
def test_check_of_ollama_compares_its_version(machine, ollama, version, state):
    ollama(version)
    address, check = doctor.ollama_checks(gpu=False)
    assert (address.what, address.found.split()[1]) == ("OLLAMA_HOST", "is")
    assert (check.state, version in check.found) == (state, True)


def test_check_of_missing_ollama_stops_only_publishing(machine):
    *_, check = doctor.ollama_checks(gpu=False)
    assert (check.state, check.needed_by) == ("missing", "tutor publish")
    assert "ollama serve" in check.hint


def test_check_of_docker_stops_only_the_containers(machine):
    assert {check.needed_by for check in doctor.docker_checks(Daemon(), gpu=True)} == {"make all"}


def test_check_of_docker_names_its_kind_images_and_toolkit(host):
    info = {"ServerVersion": "26.1.5", "Runtimes": {}}
    assert states(doctor.docker_checks(Daemon(info), gpu=True))["NVIDIA container toolkit"] == "missing"
    with_toolkit = {**info, "Runtimes": {"nvidia": {}}}
    assert states(doctor.docker_checks(Daemon(with_toolkit), gpu=True))["NVIDIA container toolkit"] == "ok"
    rootless = Daemon({**info, "SecurityOptions": ["name=rootless"]}) if os.getuid() else Daemon(info)
    host.answer("image inspect", stdout='["ollama/ollama@sha256:ab"] sha256:cd\n')
    found = {check.what: check.found for check in doctor.docker_checks(rootless, gpu=False)}
    assert found["Docker"] == ("26.1.5, rootless" if os.getuid() else "26.1.5")
    assert "ollama/ollama:0.33.3@sha256:ab" in found["images"]


def report(*checks: doctor.HostCheck, refusal: HostError | None = None) -> doctor.HostReport:
    return doctor.HostReport(checks, None, refusal)


def test_report_with_one_way_to_train_has_no_fault():
    no_docker = doctor.HostCheck("Docker", "missing", "", needed_by=doctor.STACK)
    no_torch = doctor.HostCheck("train environment", "missing", "", needed_by=doctor.RUN)
    no_ollama = doctor.HostCheck("Ollama", "missing", "", needed_by=doctor.SERVE)
    assert report(no_docker, no_ollama).fault is None
    assert report(no_torch, no_ollama).fault is None
    fault = report(no_torch, no_docker).fault
    assert fault.message == "tutor run needs train environment; make all needs Docker"
    assert report(refusal=HostError("too large")).fault.message == "too large"


def test_report_without_packages_and_docker_names_the_demo():
    no_torch = doctor.HostCheck("train environment", "missing", "", "make install")
    docker = [doctor.HostCheck("Docker", "missing", found, needed_by=doctor.STACK) for found in ("daemon", "Compose")]
    found = report(no_torch, *docker)
    assert str(found.fault) == (
        "tutor run needs train environment; make all needs Docker; "
        "make demo installs what tutor run needs, and uses neither Docker nor a GPU"
    )
    assert found.conclusions == {
        "make demo": "installs what tutor run needs, and uses neither Docker nor a GPU",
        "tutor run": "needs train environment",
        "make all": "needs Docker",
    }
    old_gpu = doctor.HostCheck("compute capability", "missing", "6.1", "7.5 is needed")
    blocked = report(no_torch, old_gpu, *docker)
    assert "make demo" not in {**blocked.conclusions}
    assert "make demo" not in str(blocked.fault)
    assert report(refusal=HostError("too large")).conclusions == {}
    assert report(*docker).conclusions == {"tutor run": "lacks nothing", "make all": "needs Docker"}
