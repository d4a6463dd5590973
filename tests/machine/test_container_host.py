"""The kind of Docker on this host, and its Compose project; `docker` is a small program on PATH (docs/facts.md, 12).

Its scripted outputs are those of Docker 28.2 and 26.1, of Podman 4.3 and of Compose 2.26.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from support.fakes.docker import INFO, PROJECT

from tutor.machine import container_host
from tutor.machine.container_host import CHECKOUT, Project

WARNING = (
    "WARNING: Error loading config file: open /root/.docker/config.json: permission denied\n"
    "time=... level=warning msg=cannot connect to the Docker daemon plugin\n"
)
SSH = (
    "error during connect: Get http://docker.example.com/v1.50/info: command [ssh -T -- build.example docker system "
    "dial-stdio] has exited with status 255: stderr=x@build.example: Permission denied (publickey).\n"
)


def faults() -> list[str]:
    return [str(fault) for fault in container_host.docker_faults(container_host.daemon())]


def test_warnings_beside_an_answer_are_no_fault(host):
    host.answer("docker info", stdout=json.dumps(INFO), stderr=WARNING)
    host.answer("compose version", stdout="2.26.1-4\n", stderr=WARNING + "1.29.2\n")
    host.answer("context inspect", stdout="unix:///var/run/docker.sock\n", stderr=WARNING)
    host.answer("config --format json", stdout=json.dumps(PROJECT), stderr=WARNING)
    assert faults() == []
    assert container_host.daemon().info == INFO
    assert container_host.project().name == "tutor"


@pytest.mark.parametrize(
    ("part", "answer", "message"),
    [
        (
            "docker info",
            {"code": 1, "stdout": "{}", "stderr": "Cannot connect to the Docker daemon at unix:///x. Is it running?\n"},
            "does not answer (Cannot connect to the Docker daemon at unix:///x. Is it running?); start",
        ),
        (
            "docker info",
            {"code": 1, "stderr": "permission denied while trying to connect to the Docker daemon socket\n"},
            "this user may not use Docker; add it to the group docker",
        ),
        ("docker info", {"stdout": '{"ServerErrors": ["no daemon"]}'}, "does not answer (no daemon)"),
        ("docker info", {"stdout": "not JSON"}, "does not answer (docker info ended with exit code 0)"),
        (
            "docker info",
            {"stdout": json.dumps({**INFO, "ServerVersion": "20.10.24+dfsg1"})},
            "Docker Engine is 20.10.24",
        ),
        ("compose version", {"code": 1, "stderr": "docker: 'compose' is not a docker command."}, "no Compose plugin"),
        ("compose version", {"stdout": "v2.23.3\n"}, "Docker Compose is v2.23.3"),
        ("compose version", {"stdout": "1.29.2\n"}, "Docker Compose is 1.29.2"),
        ("docker version", {"stdout": '{"Components": [{"Name": "Podman Engine"}]}'}, "`docker` is Podman"),
        (
            "docker info",
            {"stdout": '{"host": {"arch": "amd64"}, "version": {"Version": "4.3.1"}}'},
            "`docker` is Podman",
        ),
        ("context inspect", {"stdout": "tcp://10.1.2.3:2375\n"}, "on another machine (tcp://10.1.2.3:2375)"),
    ],
)
def test_unusable_docker_is_one_fault(host, part, answer, message):
    host.answer(part, **answer)
    (found,) = faults()
    assert message in found


def test_dead_remote_context_is_not_a_missing_group(host):
    """SSH's "permission denied" is about another machine, which the stack could not use anyway."""
    host.answer("context inspect", stdout="ssh://x@build.example\n")
    host.answer("docker info", code=1, stderr=SSH)
    (found,) = faults()
    assert found.startswith("Docker's daemon is on another machine (ssh://x@build.example)")
    assert "docker context use default" in found


@pytest.mark.parametrize("place", ["unix:///run/user/1000/docker.sock", "tcp://127.0.0.1:2375", "tcp://localhost:1"])
def test_daemon_of_this_machine_may_listen_anywhere(host, place):
    host.answer("context inspect", stdout=f"{place}\n")
    assert faults() == []


@pytest.mark.skipif(sys.platform == "darwin", reason="Docker Desktop everywhere")
@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("unix:///run/user/1000/docker.sock", "systemctl --user start docker"),
        ("unix:///home/x/.docker/desktop/docker.sock", "start Docker Desktop"),
        ("unix:///var/run/docker.sock", "sudo systemctl start docker"),
    ],
)
def test_stopped_daemon_is_started_by_its_kind(host, place, hint):
    host.answer("context inspect", stdout=f"{place}\n")
    host.answer("docker info", code=1, stderr="Cannot connect\n")
    assert hint in faults()[0]


def test_docker_that_never_answers_is_a_fault(host, monkeypatch):
    monkeypatch.setattr("tutor.machine.host.PROGRAM_TIMEOUT", 0.5)
    host.answer("docker info", stdout=json.dumps(INFO), seconds=30)
    assert "no answer within 0.5 s" in faults()[0]


def test_rootless_daemon_of_another_user_is_a_fault(host, monkeypatch):
    host.answer("docker info", stdout=json.dumps({**INFO, "SecurityOptions": ["name=rootless"]}))
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert "rootless and belongs to another user" in faults()[0]
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert faults() == []


@pytest.mark.parametrize("shown", ["2.24.0", "v2.40.3", "5.0.1", "2.26.1-4"])
def test_newer_compose_versions_are_accepted(host, shown):
    host.answer("compose version", stdout=shown)
    assert faults() == []


@pytest.mark.parametrize(
    "stderr",
    ["project name must not be empty\n", 'invalid project name "Mi Copia": must consist only of lowercase\n'],
)
def test_project_name_that_compose_refuses_is_a_fault(host, stderr):
    host.answer("config --format json", code=15, stderr=stderr)
    (found,) = container_host.project_faults(container_host.project())
    assert stderr.strip() in str(found)
    assert "COMPOSE_PROJECT_NAME" in found.hint


def test_containers_of_another_checkout_are_a_fault(host, tmp_path: Path):
    other = tmp_path / "mi copia"
    host.answer("working_dir", stdout=f"{CHECKOUT}\n\n{other}\n")
    project = Project("tutor")
    assert container_host.project_faults(project) == []  # it was moved or removed
    other.mkdir()
    (other / "compose.yaml").touch()
    (found,) = container_host.project_faults(project)
    assert str(found).startswith(f"the containers of the Compose project tutor belong to the checkout {other}; ")


def test_first_volumes_are_named_until_the_project_has_its_own(host):
    host.answer("project=tutor", stdout="tutor_hub\n")
    assert container_host.first_volumes(Project("tutor")) == []
    assert container_host.first_volumes(Project("copia")) == ["tutor_hub"]
    host.answer("project=copia", stdout="copia_hub\n")
    assert container_host.first_volumes(Project("copia")) == []


def test_tagged_images_are_shown_with_what_they_are_here(host):
    digest = f"ollama/ollama@sha256:{'0' * 64}"
    host.answer("image inspect", code=1, stderr="Error: No such image\n")
    host.answer("{{.Id}} debian", stdout='["debian@sha256:ab"] sha256:cd\n')
    host.answer("{{.Id}} mirror/debian", stdout="[] sha256:ef\n")
    names = ("debian:trixie-slim", "mirror/debian:trixie", "absent:1", digest)
    assert container_host.tagged_images(Project("tutor", {}, {f"x-{name}": name for name in names})) == (
        "named by tag only: debian:trixie-slim@sha256:ab; mirror/debian:trixie, image id sha256:ef; "
        "absent:1, not pulled yet"
    )
    assert container_host.tagged_images(Project("tutor", {}, {"tutor-ollama": digest})) == ""
