"""stages/base/hub.py: each reason for which the hub gives no file, with its remedy. test_hub.py has whole fetches.

A model hub at a socket refuses with the status and headers of the real one; one process asks for every repository.
"""

import errno
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.processes.command import ROOT, environment

pytest.importorskip("huggingface_hub")

import httpx2
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from tutor.errors import HostError, RecipeError, ServiceError, TutorError
from tutor.stages.base import hub

REVISION = "0123456789abcdef0123456789abcdef01234567"
LOGIN = "Access to model acme/gated is restricted. You must have access to it and be authenticated to access it."
REFUSALS: dict[str, tuple[int, dict[str, str]]] = {
    "gated": (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": LOGIN}),
    "gated-for-me": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "you are not in the authorized list."}),
    "missing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "private": (401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "no-revision": (404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}),
    "no-config": (404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}),
    "bad-token": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "expired": (401, {"X-Error-Message": 'User Access Token "mine" is expired'}),
    "forbidden": (403, {"X-Error-Message": "This token lacks permissions"}),
}
SCRIPT = """
import json, sys
from tutor.errors import TutorError
from tutor.stages.base.hub import fetch_snapshot
for name in sys.argv[2:]:
    try:
        fetch_snapshot("acme/" + name, sys.argv[1])
    except TutorError as error:
        print(json.dumps([name, error.code, str(error)]))
"""


class Refusing(BaseHTTPRequestHandler):
    """Replies of a hub that gives nothing."""

    def do_HEAD(self) -> None:
        code, headers = REFUSALS[self.path.split("/")[2]]
        self.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name upstream
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Address of a hub that refuses everything."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def refused(endpoint: str, home: Path, *names: str, **settings: str) -> dict[str, tuple[int, str]]:
    """Return exit code and message of the fetch of each repository."""
    hidden = {"HF_TOKEN": "", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
    env = environment(**{**hidden, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **settings})
    run = [sys.executable, "-c", SCRIPT, REVISION, *names]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (code, text) for name, code, text in map(json.loads, done.stdout.splitlines())}


def test_refusal_without_a_token_names_reason_and_remedy(endpoint: str, tmp_path: Path) -> None:
    found = refused(endpoint, tmp_path, *REFUSALS)
    expected = {
        "gated": ("it is gated", f"accept its licence at {endpoint}/acme/gated and set HF_TOKEN"),
        "missing": ("no such repository", "check its name (a private one needs HF_TOKEN)"),
        "private": ("no such repository", "check its name (a private one needs HF_TOKEN)"),
        "no-revision": ("no such revision", f"copy a hash from {endpoint}/acme/no-revision/commits/main"),
        "no-config": ("no config.json", "name a repository of a transformers model"),
        "forbidden": ("it is forbidden (This token lacks permissions)", "the right to read"),
    }
    for name, (reason, remedy) in expected.items():
        code, text = found[name]
        assert code == 6
        assert text.startswith(f"cannot fetch acme/{name}@{REVISION} from the model hub: {reason}; "), text
        assert remedy in text
        assert text.endswith("or name a local copy: base.source = 'path:FOLDER'")
        assert "\n" not in text
    assert {code for code, _ in found.values()} == {6}
    assert found.keys() == REFUSALS.keys()


def test_refusal_with_a_token_is_told_apart(endpoint: str, tmp_path: Path) -> None:
    """The token has blanks and a newline around it, which are left out."""
    found = refused(endpoint, tmp_path, *REFUSALS, HF_TOKEN=" hf_geheim\n")
    expected = {
        "gated-for-me": "accept its licence at {}/acme/gated-for-me with the account of your token",
        "missing": "no such repository; check its name (the token's account may not see it)",
        "bad-token": "the hub refuses the token (Invalid credentials in Authorization header); set HF_TOKEN",
        "expired": 'the hub refuses the token (User Access Token "mine" is expired); set HF_TOKEN',
    }
    for name, text in expected.items():
        assert text.format(endpoint) in found[name][1]
    assert not any("geheim" in text for _, text in found.values())


def test_offline_mode_and_client_settings_are_named(endpoint: str, tmp_path: Path) -> None:
    offline = refused(endpoint, tmp_path, "gated", HF_HUB_OFFLINE="1")["gated"]
    assert offline[0] == 6
    assert "HF_HUB_OFFLINE is set, and the cache lacks it; unset HF_HUB_OFFLINE" in offline[1]
    proxy = refused(endpoint, tmp_path, "gated", NO_PROXY="", ALL_PROXY="socks4://127.0.0.1:1")["gated"]
    assert proxy[0] == 2
    assert "the hub's client cannot be made" in proxy[1]
    assert "ALL_PROXY" in proxy[1]


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"HF_HUB_DOWNLOAD_TIMEOUT": "abc"}, "a variable of the hub's client is wrong: invalid literal"),
        ({"SSL_CERT_FILE": "/nowhere"}, "SSL_CERT_FILE is '/nowhere', which is not there"),
        ({"HF_OIDC_RESOURCE": "x"}, "the hub's token cannot be read: HF_OIDC_RESOURCE is set"),
    ],
)
def test_variable_of_the_client_that_is_wrong_is_named(
    endpoint: str, tmp_path: Path, setting: dict[str, str], text: str
) -> None:
    code, found = refused(endpoint, tmp_path, "gated", **setting)["gated"]
    assert (code, text in found) == (2, True), found


@pytest.mark.parametrize("token", ["“hf_x”", "hf_x y", "hf_ñ", "hf_x\x07", "hf_x\u200b"])
def test_token_that_no_request_can_hold_is_a_recipe_error(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(RecipeError, match=r"HF_TOKEN holds .*, which no token has; copy the token alone") as caught:
        hub.fetch_snapshot("acme/gated", REVISION)
    assert "hf_" not in str(caught.value)


def explained(error: Exception) -> TutorError:
    return hub._explained(error, "acme/small", REVISION)  # the disk and the network cannot be filled or cut here


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (OSError(errno.ENOSPC, "Kein Speicherplatz"), HostError, "it is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), HostError, "it is full"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), HostError, "it is full"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), HostError, "make the folder of HF_HOME writable"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), ServiceError, "check the network"),
        (RuntimeError("CAS service error"), ServiceError, "check the network"),
    ],
)
def test_full_disk_and_broken_network_are_told_apart(error: Exception, kind: type[TutorError], text: str) -> None:
    found = explained(error)
    assert type(found) is kind
    assert text in str(found)


@pytest.mark.parametrize(
    ("status", "text"),
    [(429, "too many requests; wait some minutes"), (503, "answers 503 (no reason given); try again")],
)
def test_busy_hub_is_named_with_the_remedy(status: int, text: str) -> None:
    answer = httpx2.Response(status, request=httpx2.Request("HEAD", "http://hub/acme"))
    assert text in str(explained(HfHubHTTPError("no", response=answer)))


def test_cause_of_a_missing_cached_file_is_explained() -> None:
    error = LocalEntryNotFoundError("Please check your connection")
    error.__cause__ = ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer")
    assert "SSL_CERT_FILE" in str(explained(error))
