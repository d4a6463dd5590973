"""scripts/environment/installers.py: pip's configuration in uv's variables; certificates for an old pip."""

import stat
import sys
from pathlib import Path

from support.processes.command import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from environment import installers

CONFIGURATION = """\
global.index-url='https://index.example/simple'
global.cert='/etc/old.pem'
install.find-links='/nowhere\\nhttps://links.example'
install.cert='/etc/ca.pem'
:env:.extra-index-url='https://a.example https://b.example'
freeze.timeout='3'
"""


def fake_python(folder: Path, configuration: str, version: str = "pip 26.3 from /x (python 3.11)") -> Path:
    """Write a Python whose pip has this configuration and version."""
    path = folder / "python"
    path.write_text(
        f"#!/bin/sh\n[ $3 = config ] && cat <<'END'\n{configuration}END\n[ $3 = --version ] && echo '{version}'\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_uv_gets_the_index_and_certificates_of_pip(tmp_path: Path) -> None:
    configured = installers.pip_configuration(fake_python(tmp_path, CONFIGURATION), {"PATH": "/usr/bin:/bin"})
    assert installers.uv_environment(configured, {}) == {
        "UV_DEFAULT_INDEX": "https://index.example/simple",
        "UV_INDEX": "https://a.example https://b.example",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "https://links.example",
        "SSL_CERT_FILE": "/etc/ca.pem",
    }


def test_variable_of_the_user_stays(tmp_path: Path) -> None:
    given = {"UV_DEFAULT_INDEX": "https://mine.example", "SSL_CERT_FILE": "/mine.pem"}
    found = installers.uv_environment({"index-url": "https://x.example", "cert": "/x.pem"}, given)
    assert found == given


def test_old_pip_gets_the_certificates_of_the_system(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.touch()
    env = {"PATH": "/usr/bin:/bin", "SSL_CERT_FILE": str(bundle)}
    old, new = "pip 23.2.1 from /x (python 3.11)", "pip 24.2 from /x (python 3.13)"

    def certificates(configuration: str, version: str) -> str | None:
        python = fake_python(tmp_path, configuration, version)
        return installers.trusting_environment(python, env).get("PIP_CERT")

    assert certificates("", old) == str(bundle)
    assert certificates("", new) is None
    assert certificates("global.cert='/etc/ca.pem'\n", old) is None


def test_npm_gets_the_certificates_that_the_user_names(tmp_path: Path) -> None:
    env = {"PATH": "/usr/bin:/bin", "SSL_CERT_FILE": "/mine.pem"}
    assert installers.trusting_environment(fake_python(tmp_path, ""), env)["NODE_EXTRA_CA_CERTS"] == "/mine.pem"
