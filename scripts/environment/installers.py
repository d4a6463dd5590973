"""Commands of uv and pip, and the environment variables that they run with.

In: pip's configuration, as pip itself prints it. Out: commands with pins by hash and wheels only. Does not run them.
"""

import ast
import os
import ssl
import subprocess
from collections.abc import Mapping
from pathlib import Path

PIP_TRUSTS_SYSTEM = (24, 2)
"""First version of pip that uses the system's certificates without an option."""
BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
"""Files with the system's certificates: Debian, Fedora, SUSE, Alpine and macOS."""
PINNED = ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
"""Options of both installers. The pins are complete, so no dependency is resolved."""
BOUNDED = ["--timeout", "30", "--retries", "2"]
"""Options with which pip gives up within two minutes where nothing answers, as uv does by itself."""


def pip_install(python: Path, pins: list[Path], *, again: bool) -> list[str]:
    """Return pip's command for these files of pins; `again` writes what is there once more."""
    options = ["--force-reinstall"] if again else []
    return [*_pip(python), *BOUNDED, *PINNED, *options, *_files(pins)]


def uv_install(uv: Path, python: Path, pins: list[Path], *, again: bool) -> list[str]:
    """Return uv's command for these files of pins; `again` writes what is there once more."""
    options = ["--reinstall"] if again else []
    return [*_uv(uv, python), *PINNED, *options, *_files(pins)]


def checkout_install(uv: Path | None, python: Path, root: Path) -> list[str]:
    """Return the command that installs the checkout itself, editable; the build backend is there already."""
    start = _uv(uv, python) if uv else _pip(python)
    return [*start, "--no-deps", "--no-build-isolation", "--editable", str(root)]


def _uv(uv: Path, python: Path) -> list[str]:
    return [str(uv), "pip", "install", "--python", str(python), "--system-certs", "--color", "never"]


def _pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]


def _files(pins: list[Path]) -> list[str]:
    return [text for path in pins for text in ("--requirement", str(path))]


def trusting_environment(python: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` so that an old pip, and npm, use the system's certificates instead of their own."""
    found = dict(env)
    if env.get("SSL_CERT_FILE"):
        found.setdefault("NODE_EXTRA_CA_CERTS", env["SSL_CERT_FILE"])
    if pip_configuration(python, env).get("cert") or env.get("REQUESTS_CA_BUNDLE") or env.get("CURL_CA_BUNDLE"):
        return found
    done = _output([str(python), "-m", "pip", "--version"], env).split()
    version = tuple(int(part) for part in done[1].split(".")[:2]) if len(done) > 1 else PIP_TRUSTS_SYSTEM
    if version < PIP_TRUSTS_SYSTEM:
        places = (env.get("SSL_CERT_FILE"), ssl.get_default_verify_paths().cafile, *BUNDLES)
        found.update(next(({"PIP_CERT": place} for place in places if place and Path(place).is_file()), {}))
    return found


def pip_configuration(python: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Return pip's settings from its files and its variables: name -> value, those of `pip install` last."""
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in _output([str(python), "-m", "pip", "config", "list"], env).splitlines():
        section, _, rest = line.partition(".")
        name, equals, value = rest.partition("=")
        if equals and section in found:
            found[section][name] = str(ast.literal_eval(value))
    return {**found["global"], **found["install"], **found[":env:"]}


def uv_environment(configured: Mapping[str, str], env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` with pip's settings as uv's variables; a variable that is set stays."""
    links = [link for link in configured.get("find-links", "").split() if "://" in link or Path(link).exists()]
    values = {
        "UV_DEFAULT_INDEX": configured.get("index-url", ""),
        "UV_INDEX": " ".join(configured.get("extra-index-url", "").split()),
        "UV_FIND_LINKS": ",".join(links),
        "UV_INSECURE_HOST": " ".join(configured.get("trusted-host", "").split()),
        "UV_NO_INDEX": "1" if configured.get("no-index", "").lower() in ("1", "true", "yes", "on") else "",
        # pip looks for a version in all indexes; with pins by hash none of them can bring another file.
        "UV_INDEX_STRATEGY": "unsafe-best-match" if configured.get("extra-index-url") else "",
        "SSL_CERT_FILE": configured.get("cert", ""),
        "HTTPS_PROXY": configured.get("proxy", ""),
        "HTTP_PROXY": configured.get("proxy", ""),
    }
    return {**{name: value for name, value in values.items() if value}, **env}


def _output(command: list[str], env: Mapping[str, str]) -> str:
    return subprocess.run(command, env=dict(env), capture_output=True, text=True, check=False).stdout


def uv_cache(uv: Path, env: Mapping[str, str]) -> Path:
    """Return the folder of uv's cache, which holds every package once, on the disk of .venv as hard links."""
    return Path(_output([str(uv), "cache", "dir"], env).strip() or os.devnull)
