"""stages/base/hub.py, against a model hub at a socket."""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from typing import Any

import pytest
from support.processes.command import TUTOR, environment

pytest.importorskip("torch")

from tutor.formats.models.model_folder import read_facts

pytestmark = pytest.mark.usefixtures("one_thread")

REPO, REVISION = "acme/small-8B", "0123456789abcdef0123456789abcdef01234567"


Cli = Callable[..., "CompletedProcess[str]"]


class Hub(ThreadingHTTPServer):
    """A model hub with one repository of one revision at a socket, for the requests of huggingface_hub 2."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.asked: list[str] = []
        self.cut: set[str] = set()  # files whose next answer ends half-way
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def entry(self, name: str) -> dict[str, Any]:
        """Return a file's entry in the listing: git's hash, and sha256 of a large file."""
        content = self.files[name]
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def close(self) -> None:
        """Stop listening."""
        self.shutdown()
        self.server_close()


class Answers(BaseHTTPRequestHandler):
    """Replies of the hub on one connection."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if path == f"/api/models/{REPO}/tree/{REVISION}":
            self.reply(json.dumps([self.server.entry(name) for name in self.server.files]).encode(), {})
        elif not path.startswith(f"/{REPO}/resolve/{REVISION}/"):
            self.reply(b"", {"X-Error-Code": "RevisionNotFound"}, 404)
        elif path.rpartition("/")[2] not in self.server.files:
            self.reply(b"", {"X-Error-Code": "EntryNotFound"}, 404)
        else:
            self.reply_file(path.rpartition("/")[2])

    def reply_file(self, name: str) -> None:
        entry, content = self.server.entry(name), self.server.files[name]
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(content))}
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        if found:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(content[start:], headers, 206 if found else 200, cut=name in self.server.cut)
        if self.command == "GET":
            self.server.cut.discard(name)

    def reply(self, body: bytes, headers: dict[str, str], code: int = 200, *, cut: bool = False) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = cut

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name upstream
        pass


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    (model / "pytorch_model.bin").write_bytes(b"never wanted")
    made = Hub(model)
    yield made
    made.close()


def hub_recipe(folder: Path, revision: str = REVISION) -> Path:
    path = folder / "hubbed.toml"
    path.write_text(f'[base]\nsource = "hub:{REPO}@{revision}"\n', "utf-8")
    return path


def hub_settings(address: str, folder: Path) -> dict[str, str]:
    """Environment variables that direct huggingface_hub to an address, with a cache in `folder`."""
    cache = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    return {"NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", **cache}


@pytest.fixture
def fetch(tutor: Cli, tiny_vocabulary: Path, tmp_path: Path) -> Cli:
    """Run `tutor base` on the hub's repository, with its cache in `tmp_path`."""

    def run(address: str, revision: str = REVISION, **env: str) -> "CompletedProcess[str]":
        settings = {**hub_settings(address, tmp_path), "TUTOR_LLAMACPP": str(tiny_vocabulary), **env}
        return tutor("base", "-r", hub_recipe(tmp_path, revision), "-b", tmp_path / "build", env=settings)

    return run


@pytest.fixture(scope="module", autouse=True)
def nobody_listens(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Popen[str]"]:
    """`tutor base` against a closed port, started early: huggingface_hub retries for half a minute."""
    folder = tmp_path_factory.mktemp("nobody")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [TUTOR, "base", "-r", hub_recipe(folder), "-b", folder / "build"]
    env = environment(**hub_settings(address, folder))
    with Popen(command, env=env, stdout=PIPE, stderr=PIPE, encoding="utf-8") as process:
        yield process
        process.kill()


def cached_weights(tmp_path: Path) -> Path:
    return next((tmp_path / "cache").rglob("snapshots/*/model.safetensors"))


@pytest.mark.pipeline
def test_fetched_repository_is_used_without_network(hub: Hub, fetch: Cli, tmp_path: Path) -> None:
    hub.cut.add("model.safetensors")
    first = fetch(hub.address)
    assert first.returncode == 0, first.stderr
    facts, folder = read_facts(tmp_path / "build" / "hubbed" / "base")
    assert (facts.source, facts.vocabulary, facts.add_bos) == (f"hub:{REPO}@{REVISION}", 1024, True)
    assert folder == (tmp_path / "cache" / "hub" / f"models--{REPO.replace('/', '--')}" / "snapshots" / REVISION)
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert not any("pytorch_model.bin" in line for line in hub.asked)
    assert hub.asked.count(f"GET /{REPO}/resolve/{REVISION}/model.safetensors") == 2  # it went on where it was cut
    hub.close()
    (tmp_path / "build" / "hubbed" / "base" / "base.json").unlink()
    again = fetch(hub.address, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert read_facts(tmp_path / "build" / "hubbed" / "base")[0] == facts


def test_quantized_repository_is_refused_before_download(hub: Hub, fetch: Cli) -> None:
    config = json.loads(hub.files["config.json"])
    hub.files["config.json"] = json.dumps({**config, "quantization_config": {"quant_method": "awq"}}).encode()
    done = fetch(hub.address)
    assert done.returncode == 5
    assert f"{REPO}@{REVISION} is already quantized (awq); the base must be 16-bit" in done.stderr
    assert {line.rpartition("/")[2] for line in hub.asked} == {"config.json"}


def test_damaged_configuration_on_hub_is_artifact_error(hub: Hub, fetch: Cli) -> None:
    hub.files["config.json"] = b"<html>"
    done = fetch(hub.address)
    assert done.returncode == 5, done.stderr
    assert "config.json is damaged" in done.stderr


def unreachable(done: "CompletedProcess[str]", revision: str = REVISION) -> bool:
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 6, done.stderr
    assert last.startswith(f"Error: cannot fetch {REPO}@{revision} from the model hub: ")
    assert last.endswith(", or name a local copy: base.source = 'path:FOLDER'")
    return True


@pytest.mark.slow
def test_revision_missing_on_the_hub_is_a_service_error(hub: Hub, fetch: Cli) -> None:
    assert unreachable(fetch(hub.address, "f" * 40), "f" * 40)  # 404
    assert unreachable(fetch(hub.address, HF_HUB_OFFLINE="1"))  # nothing in the cache
    assert hub.asked
    del hub.files["config.json"]
    assert unreachable(fetch(hub.address))


def test_unwritable_cache_is_a_host_error(hub: Hub, fetch: Cli, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file", "utf-8")
    done = fetch(hub.address)
    assert done.returncode == 4, done.stderr
    assert str(tmp_path / "cache") in done.stderr


@pytest.mark.pipeline
def test_flipped_bit_in_the_cache_is_an_artifact_error(hub: Hub, fetch: Cli, tmp_path: Path) -> None:
    assert fetch(hub.address).returncode == 0
    weights = cached_weights(tmp_path)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.resolve().write_bytes(content)
    (tmp_path / "build" / "hubbed" / "base" / "base.json").unlink()
    done = fetch(hub.address)
    assert done.returncode == 5, done.stderr
    assert f"{weights} is damaged" in done.stderr
    weights.resolve().unlink()  # the next step in the message
    assert fetch(hub.address).returncode == 0


@pytest.mark.pipeline
def test_unreachable_hub_is_a_service_error(nobody_listens: "Popen[str]") -> None:
    out, err = nobody_listens.communicate(timeout=120)
    assert unreachable(CompletedProcess([], nobody_listens.returncode, out, err))
