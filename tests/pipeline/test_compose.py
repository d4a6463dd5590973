"""The services of the stack: their order, exit codes, logs and interrupts. Covers compose_command.py too.

`docker` and `nvidia-smi` are small programs on PATH with scripted answers (docs/facts.md, 12).
"""

import json
import os
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from support.fakes.docker import INFO, PROJECT, Host
from support.fakes.ollama import running as ollama_running
from support.processes.command import ROOT, TUTOR
from support.processes.waiting import wait_for

from tutor.errors import HostError, ServiceError
from tutor.machine.container_host import Daemon
from tutor.pipeline import compose, compose_command
from tutor.pipeline.compose_command import Stack
from tutor.pipeline.logged_command import StackError
from tutor.recipe.reading import read_recipe
from tutor.recipe.settings import Recipe


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return read_recipe(recipe_file)


# The services


def services_run(host: Host) -> list[str]:
    return [line.split()[-1] for line in host.calls if " run --rm " in line or " up " in line]


def test_run_all_runs_services_in_order_with_log_and_result(host, recipe, tmp_path):
    host.answer("run --rm", stdout='{"ran": true}', stderr="working on it\n")
    result = compose.run_all(recipe, tmp_path / "build")
    assert services_run(host) == [*compose.SERVICES_BEFORE, "ollama", *compose.SERVICES_AFTER]
    assert result["ran"] == [*compose.SERVICES_BEFORE, *compose.SERVICES_AFTER]
    assert result["host"] == "127.0.0.1:11434"
    build = next(index for index, line in enumerate(host.calls) if " build " in line)
    assert build < next(index for index, line in enumerate(host.calls) if " run " in line)
    logs = tmp_path / "build" / "small" / "logs"
    assert {path.name for path in logs.iterdir()} == {f"{name}.log" for name in ("build", *services_run(host))}
    assert "working on it" in (logs / "merger.log").read_text()


def test_result_lines_name_the_report_by_its_path_on_this_host(host, recipe, tmp_path):
    page = '{"ran": true, "page": "build/small/report/report.html"}'
    host.answer("--name tutor-reporter", stdout=page)
    host.answer("--name tutor-publisher", stdout='{"model": "tutor", "build": "0123456789ab", "version": "0.33.3"}')
    result = compose.run_all(recipe, tmp_path / "elsewhere")
    seen = tmp_path / "elsewhere" / "small" / "report" / "report.html"
    assert f"Report: {seen}" in compose.result_lines(result)


@pytest.mark.parametrize("name", ["converter", "publisher"])
def test_run_all_stops_at_a_service_whose_gate_refuses(host, recipe, tmp_path, name):
    host.answer(f"--name tutor-{name}", code=8, stderr="Error: F16 -> Q8_0 (quantize) diverges in its prompt: x\n")
    with pytest.raises(StackError, match="diverges in its prompt") as caught:
        compose.run_all(recipe, tmp_path / "build")
    assert (caught.value.code, caught.value.stage) == (8, name)
    assert services_run(host)[-1] == name


def test_run_all_again_reports_that_nothing_ran(host, recipe, tmp_path):
    host.answer("run --rm", stdout='{"ran": false}')
    host.answer("run --rm --no-deps -T --name tutor-fetcher", stdout='{"ran": []}')
    host.answer("run --rm --no-deps -T --name tutor-publisher", stdout='{"published": false}')
    assert compose.run_all(recipe, tmp_path / "build")["ran"] == []


def test_run_all_uses_up_for_the_ollama_server_alone(host, recipe, tmp_path):
    compose.run_all(recipe, tmp_path / "build")
    up = [line for line in host.calls if " up " in line]
    assert len(up) == 1
    assert up[0].endswith("--no-deps ollama")
    assert all("--no-deps" in line for line in host.calls if " run --rm " in line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code"),
    [
        *((name, 3) for name in (*compose.SERVICES_BEFORE, *compose.SERVICES_AFTER)),
        *(("merger", code) for code in (1, 8, 137, 143)),
    ],
)
def test_run_all_ends_with_the_exit_code_of_a_failed_service(host, recipe, tmp_path, name, code):
    host.answer(
        f"--name tutor-{name}", code=code, stderr="train: step 1\nError: tutor.jsonl:3: what is wrong; do this\n"
    )
    with pytest.raises(StackError) as caught:
        compose.run_all(recipe, tmp_path / "build")
    assert caught.value.code == code
    assert f"{name} ended with exit code {code}: tutor.jsonl:3: what is wrong; do this" in str(caught.value)
    assert str(tmp_path / "build" / "small" / "logs" / f"{name}.log") in str(caught.value)
    assert services_run(host)[-1] == name


def test_run_all_of_a_killed_silent_service_suggests_memory(host, recipe, tmp_path):
    host.answer("--name tutor-trainer", code=137)
    with pytest.raises(StackError, match="memory"):
        compose.run_all(recipe, tmp_path / "build")


@pytest.mark.parametrize(
    ("part", "answer", "message"),
    [
        (
            "--name tutor-trainer",
            {
                "code": 1,
                "stderr": 'Error response from daemon: could not select device driver "nvidia" with capabilities',
            },
            "Container Toolkit",
        ),
        (
            "--name tutor-trainer",
            {"code": 125, "stderr": "Error response from daemon: no space left on device"},
            "no space",
        ),
        ("build trainer", {"code": 17, "stderr": "failed to solve: pull access denied\n"}, "pull access denied"),
        (
            "up --detach",
            {"code": 1, "stderr": "Bind for 127.0.0.1:11434 failed: port is already allocated"},
            "TUTOR_OLLAMA_PORT",
        ),
    ],
)
def test_run_all_with_a_docker_fault_raises_host_error(host, recipe, tmp_path, part, answer, message):
    host.answer(part, **answer)
    with pytest.raises(HostError, match=message):
        compose.run_all(recipe, tmp_path / "build")


def test_run_all_with_unhealthy_ollama_keeps_its_log(host, recipe, tmp_path):
    host.answer("up --detach", code=1, stderr="container tutor-ollama-1 is unhealthy\n")
    host.answer("logs --no-color", stdout="Error: could not create directory\n")
    with pytest.raises(ServiceError, match=r"ollama\.log"):
        compose.run_all(recipe, tmp_path / "build")
    assert "could not create directory" in (tmp_path / "build" / "small" / "logs" / "ollama.log").read_text()


def test_service_logs_hold_no_secret_and_no_control_character(host, recipe, tmp_path):
    text = f"fetched with hf_{'a' * 30} \x1b]0;x\x07\n"
    host.answer("--name tutor-trainer", stdout='{"ran": true}', stderr=text)
    host.answer("up --detach", code=1, stderr=text)
    host.answer("logs --no-color", stdout=f"Authorization: Bearer {text}")
    with pytest.raises(ServiceError):
        compose.run_all(recipe, tmp_path / "build")
    logs = tmp_path / "build" / "small" / "logs"
    shown = r"fetched with [redacted] \x1b]0;x\x07" + "\n"
    assert (logs / "trainer.log").read_text() == shown + '{"ran": true}'
    assert (logs / "ollama.log").read_text() == shown + f"Authorization: Bearer [redacted] {shown[8:]}"


def test_run_all_of_a_service_without_result_raises(host, recipe, tmp_path):
    host.answer("--name tutor-merger", stdout="")
    with pytest.raises(StackError, match="no result"):
        compose.run_all(recipe, tmp_path / "build")


def test_run_all_uses_the_gpu_overlay_only_with_a_gpu(host, recipe, tmp_path):
    compose.run_all(recipe, tmp_path / "build")
    assert not any("compose.gpu.yaml" in line for line in host.calls)
    host.add("nvidia-smi")
    host.answer("nvidia-smi", stdout="GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    host.answer("docker info", stdout=json.dumps({**INFO, "Runtimes": {"nvidia": {}}}))
    before = len(host.calls)
    assert compose.run_all(recipe, tmp_path / "build")["gpu"] is True
    composed = [line for line in host.calls[before:] if " run --rm " in line]
    assert all("docker/compose.gpu.yaml" in line for line in composed)


def test_run_all_names_a_gpu_that_ollama_lost(host, recipe, tmp_path, caplog):
    """The publisher's container sees no GPU, so it cannot know."""
    host.add("nvidia-smi")
    host.answer("nvidia-smi", stdout="GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    host.answer("docker info", stdout=json.dumps({**INFO, "Runtimes": {"nvidia": {}}}))
    host.answer("--name tutor-publisher", stdout='{"model": "tutor", "published": true}')
    with ollama_running() as server:
        server.loaded, server.gpu_share = ["tutor:latest"], 0.0
        host.answer("port ollama", stdout=f"127.0.0.1:{server.server_port}\n")
        compose.run_all(recipe, tmp_path / "build")
        assert "only 0% of tutor:latest on it; restart Ollama" in caplog.text
        caplog.clear()
        server.gpu_share = 1.0
        compose.run_all(recipe, tmp_path / "build")
        assert "restart Ollama" not in caplog.text


def test_environment_has_recipe_folder_and_unprivileged_ids(host, recipe, tmp_path):
    compose.run_all(recipe, tmp_path / "build")
    seen = next(environment for line, environment in host.calls_with_environment if " run --rm " in line)
    assert seen["TUTOR_DATA"] == str(recipe.path.parent)
    assert seen["TUTOR_RECIPE"] == "data/small.toml"
    assert seen["TUTOR_BUILD"] == str((tmp_path / "build").resolve())
    uid = os.getuid() or 10001
    assert seen["TUTOR_UID"] == str(uid) != "0"
    assert (tmp_path / "build" / "small").stat().st_uid == uid


@pytest.mark.skipif(os.getuid() != 0, reason="only root can hand a folder over")
def test_prepare_as_root_changes_owners_and_follows_no_link(host, recipe, tmp_path):
    build = tmp_path / "build"
    (build / "small" / "data").mkdir(parents=True)
    (build / "small" / ".lock").touch()
    outside = tmp_path / "outside"
    outside.touch()
    (build / "small" / "link").symlink_to(outside)
    compose_command.prepare(Stack(recipe.path, build))
    assert (build / "small" / ".lock").stat().st_uid == 10001
    assert outside.stat().st_uid == 0


def test_hub_token_is_a_private_file_and_in_no_variable(host, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    compose.run_all(recipe, tmp_path / "build")
    for line, environment in host.calls_with_environment:
        if line.startswith("docker compose") and not line.endswith(("version --short", "config --format json")):
            assert "HF_TOKEN" not in environment
        if "--name tutor-fetcher" in line:
            assert (environment["token"], environment["mode"]) == ("hf_canary", oct(stat.S_IFREG | 0o600))
            assert not Path(environment["HF_TOKEN_FILE"]).exists(), "it outlived the services that may need it"
        if "--name tutor-trainer" in line:
            assert "HF_TOKEN_FILE" not in environment
    logs = "".join(path.read_text() for path in (tmp_path / "build" / "small" / "logs").iterdir())
    assert "hf_canary" not in logs


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_run_all_interrupted_stops_and_removes_the_container(host, recipe, tmp_path, monkeypatch, number, code):
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    host.answer("--name tutor-trainer", seconds=60, stderr="training\n")
    command = [TUTOR, "stack", "run", "-r", recipe.path, "-b", tmp_path / "build"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        log = tmp_path / "build" / "small" / "logs" / "trainer.log"
        wait_for(lambda: log.exists() and "training" in log.read_text())
        process.send_signal(number)
        assert process.wait(20) == code
    wait_for(lambda: not running(host.folder / "docker"))
    container = f"tutor-trainer-{process.pid}"
    assert host.calls[-2:] == [f"docker stop --time 180 {container}", f"docker rm --force {container}"]
    assert list(tmp_path.glob("tutor-*")) == [], "the file of the token is left"


def running(program: Path) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(program).encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False


@pytest.mark.parametrize(("ran", "opening"), [(["merger"], []), ([], ["Nothing to do: every service is up to date."])])
def test_result_lines_name_the_model_and_the_next_step(ran, opening):
    published = {"model": "tutor", "build": "0123456789ab", "version": "0.33.3"}
    evaluated = {
        "all": {"n": 15, "errors": 0, "language": {"n": 14, "share": 0.9333}, "ended": {"n": 9, "share": 0.6}},
        "language": "es",
    }
    services = {"publisher": published, "evaluator": evaluated}
    result = {"ran": ran, "gpu": False, "host": "127.0.0.1:11434", "project": "tutor", "services": services}
    assert compose.result_lines(result) == [
        *opening,
        "tutor is build 0123456789ab, at http://127.0.0.1:11434 in Ollama 0.33.3, without a GPU.",
        "Answers to 15 held-out prompts: in Spanish 93 %, ended by itself 60 %.",
        "Next: docker compose exec ollama ollama run tutor",
    ]


@pytest.mark.parametrize("name", list(compose.COMMANDS))
def test_run_command_uses_the_stacks_files_and_exit_code(host, recipe, tmp_path, name):
    host.answer(compose.COMMANDS[name][-1], code=3)
    assert compose.run_command(recipe, tmp_path / "build", name) == 3
    line, seen = host.calls_with_environment[-1]
    assert line.endswith(" ".join(compose.COMMANDS[name]))
    assert "compose.yaml" in line
    assert seen["TUTOR_DATA"] == str(recipe.path.parent)
    assert seen["TUTOR_UID"] != "0"


def test_followed_log_of_the_server_is_shown_escaped(host, recipe, tmp_path, capsys):
    host.answer("logs --follow", stdout="GET /api/chat \x1b]0;x\x07\n", stderr=f"key hf_{'a' * 30}\n")
    compose.run_command(recipe, tmp_path / "build", "logs")
    assert sorted(capsys.readouterr().out.splitlines()) == [r"GET /api/chat \x1b]0;x\x07", "key [redacted]"]


def test_run_command_without_docker_raises_host_error(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="Docker is not installed"):
        compose.run_command(recipe, tmp_path / "build", "down")


# Kinds of hosts


@pytest.mark.parametrize(
    ("option", "variables", "overlay"),
    [
        ("name=seccomp,profile=builtin", {}, False),
        ("name=rootless", {"TUTOR_UID": "0", "TUTOR_GID": "0"}, False),
        ("name=userns", {"TUTOR_USERNS": "host"}, False),
        ("name=selinux", {}, True),
    ],
)
def test_stack_adapts_to_the_kind_of_daemon(recipe, tmp_path, option, variables, overlay):
    """Rootless: uid 0 inside is the caller. Remapped uids: the host's are kept. SELinux: no label in the way."""
    plain = Stack(recipe.path, tmp_path / "build").environment()
    stack = Stack(recipe.path, tmp_path / "build", daemon=Daemon({"SecurityOptions": [option]}))
    assert stack.environment() == {**plain, **variables}
    assert ("docker/compose.selinux.yaml" in " ".join(stack.command("ps"))) == overlay


def test_run_all_records_what_each_tag_was(host, recipe, tmp_path, caplog):
    """A digest comes from the log of the build, or from this host's images; none is made up."""
    pulled = "sha256:" + "0123456789abcdef" * 4
    step = f"#5 [python 1/4] FROM registry.example/library/debian:trixie-slim@{pulled}\n"
    host.answer("build trainer", stderr=step)
    host.answer("image inspect --format", code=1)
    host.answer("{{.Id}} tutor-trainer", stdout="[] sha256:aa\n")
    host.answer("{{.Id}} ollama/ollama", stdout='["ollama/ollama@sha256:bb"] sha256:cc\n')
    with caplog.at_level("INFO"):
        images = compose.run_all(recipe, tmp_path / "build")["images"]
    assert images == {
        "trainer": f"tutor-trainer, image id sha256:aa, from debian:trixie-slim@{pulled}",
        "publisher": f"tutor-client, from debian:trixie-slim@{pulled}",
        "ollama": "tutor-ollama, from ollama/ollama:0.33.3@sha256:bb",
    }
    assert f"debian:trixie-slim is named by its tag only; now it is debian:trixie-slim@{pulled}" in caplog.text
    call = next(line for line in host.calls if "--name tutor-trainer" in line)
    assert f"--env TUTOR_IMAGE={images['trainer']} --env TUTOR_OLLAMA_IMAGE={images['ollama']} trainer" in call


def test_run_all_with_images_by_digest_names_no_tag(host, recipe, tmp_path, caplog):
    pinned = {"OLLAMA_IMAGE": f"ollama/ollama:0.33.3@sha256:{'0' * 64}"}
    services = {"ollama": {"image": "tutor-ollama", "build": {"args": pinned}}}
    host.answer("config --format json", stdout=json.dumps({"name": "tutor", "services": services}))
    with caplog.at_level("INFO"):
        images = compose.run_all(recipe, tmp_path / "build")["images"]
    assert images == {"ollama": f"tutor-ollama, from {pinned['OLLAMA_IMAGE']}"}
    assert "by its tag only" not in caplog.text


def test_run_all_of_a_new_project_names_the_volumes_before(host, recipe, tmp_path, caplog):
    host.answer("config --format json", stdout=json.dumps({**PROJECT, "name": "copia"}))
    host.answer("project=tutor", stdout="tutor_hub\ntutor_models\n")
    compose.run_all(recipe, tmp_path / "build")
    assert "copia is a new project; COMPOSE_PROJECT_NAME=tutor uses tutor_hub, tutor_models" in caplog.text


@pytest.mark.parametrize("name", list(compose.COMMANDS))
def test_run_command_leaves_another_checkout_alone(host, recipe, tmp_path, name):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "compose.yaml").touch()
    host.answer("working_dir", stdout=f"{tmp_path / 'other'}\n")
    with pytest.raises(HostError, match=r"belong to the checkout .*other; .*COMPOSE_PROJECT_NAME"):
        compose.run_command(recipe, tmp_path / "build", name)
    assert not any(line.endswith(" ".join(compose.COMMANDS[name])) for line in host.calls)


def test_up_with_a_taken_port_starts_nothing(host, recipe, tmp_path):
    host.answer("docker ps --filter publish", stdout="other-ollama-1\tother\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(os.environ["TUTOR_OLLAMA_PORT"])))
        taken.listen()
        with pytest.raises(HostError, match=r"held by container other-ollama-1; .*TUTOR_OLLAMA_PORT"):
            compose.run_command(recipe, tmp_path / "build", "up")
    assert not any(" up " in line for line in host.calls)


def test_next_step_names_a_project_of_the_environment(monkeypatch):
    published = {"model": "tutor", "build": "0", "version": "0.33.3"}
    services = {"publisher": published, "evaluator": {}}
    result = {"ran": ["trainer"], "gpu": True, "host": "x", "project": "copia", "services": services}
    monkeypatch.setenv("COMPOSE_PROJECT_NAME", "copia")
    assert compose.result_lines(result)[-1] == "Next: docker compose --project-name copia exec ollama ollama run tutor"
    monkeypatch.delenv("COMPOSE_PROJECT_NAME")
    assert compose.result_lines(result)[-1] == "Next: docker compose exec ollama ollama run tutor"


def test_command_outside_a_checkout_raises_host_error(monkeypatch, tmp_path):
    monkeypatch.setattr(compose_command, "CHECKOUT", tmp_path)
    with pytest.raises(HostError, match="checkout"):
        Stack(tmp_path / "a.toml", tmp_path).command("ps")
