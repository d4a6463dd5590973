"""scripts/install.py on machines that lack something: a new Python, ensurepip, a network, a trusted certificate."""

import http.server
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fakes.uv import Checkout, make_checkout

UV_PIN = "uv==0.13.9 --hash=sha256:00\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A checkout without an environment."""
    (tmp_path / "checkout").mkdir()
    made = make_checkout(tmp_path / "checkout")
    shutil.rmtree(made.folder / ".venv")
    return made


def patched(folder: Path, code: str) -> dict[str, str]:
    """Return the variables with which each Python that starts runs `code` first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code, "utf-8")
    return {"PYTHONPATH": str(folder)}


def test_old_python_is_refused_before_anything_is_made(checkout: Checkout, tmp_path: Path) -> None:
    newer = tmp_path / "python3.13"
    newer.write_text("#!/bin/sh\n")
    newer.chmod(0o755)
    env = patched(tmp_path / "patch", "import sys\nsys.version_info = (3, 9, 2)\n")
    done = checkout.install("demo", PATH=str(tmp_path), **env)
    assert done.returncode == 4
    assert done.stderr.endswith(
        " is Python 3.9.2; tutor needs 3.11 or newer: add PYTHON=python3.13 to the make command\n"
    )
    assert len(done.stderr.splitlines()) == 1
    assert not (checkout.folder / ".venv").exists()


def test_script_starts_on_python_three_six(checkout: Checkout) -> None:
    import ast

    ast.parse((checkout.folder / "scripts" / "install.py").read_text("utf-8"), feature_version=(3, 6))


def test_python_without_ensurepip_is_refused(checkout: Checkout, tmp_path: Path) -> None:
    env = patched(tmp_path / "patch", "import sys\nsys.modules['ensurepip'] = None\n")
    done = checkout.install("light", **env)
    assert done.returncode == 4
    assert "it has no venv or no ensurepip; install it, on Debian: apt-get install python3." in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_index_that_refuses_connections_is_one_line(checkout: Checkout) -> None:
    """The virtual environment is made, and the next call continues from there."""
    (checkout.folder / "requirements" / "uv.txt").write_text(UV_PIN, "utf-8")
    env = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_CACHE_DIR": "1", "NO_PROXY": "*"}
    done = checkout.install("light", **env)
    assert done.returncode == 4
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: cannot install uv: 127.0.0.1:9 does not answer; check the network")
    assert checkout.install("light", **env).stderr.splitlines()[-1] == error


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[str]:
    """The address of a server with a certificate that no machine trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, capture_output=True, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Index(http.server.BaseHTTPRequestHandler):
        """An index without packages."""

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://localhost:{server.server_port}/simple"
        server.shutdown()


@pytest.mark.slow
def test_certificate_is_refused_until_the_system_trusts_it(checkout: Checkout, tls_server: str, tmp_path: Path) -> None:
    (checkout.folder / "requirements" / "uv.txt").write_text(UV_PIN, "utf-8")
    other = dict.fromkeys(("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "PIP_FIND_LINKS"), "")
    env = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": tls_server, "NO_PROXY": "*", **other}
    done = checkout.install("light", **env)
    assert done.returncode == 4
    assert ": the certificate of localhost:" in done.stderr
    assert "SSL_CERT_FILE=FILE" in done.stderr
    trusted = checkout.install("light", **env, SSL_CERT_FILE=str(tmp_path / "certificate.pem"))
    assert "no file of a pinned package" in trusted.stderr
