"""engines/llamacpp/process.py: the programs of a build. write_file is tested through test_convert.py, the rest through
test_server.py.
"""

from pathlib import Path

import pytest

from tutor.engines.llamacpp.process import programs
from tutor.errors import HostError


def test_missing_build_raises_host_error_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUTOR_LLAMACPP", str(tmp_path / "nowhere"))
    with pytest.raises(HostError, match="make llamacpp") as raised:
        programs()
    assert raised.value.code == 4


def test_program_of_wrong_size_is_refused(build: Path) -> None:
    (build / "bin" / "llama-server").write_text("cut", "utf-8")
    with pytest.raises(HostError, match="incomplete"):
        programs("llama-server")


def test_image_with_the_tokenizer_alone_is_enough_for_it(build: Path) -> None:
    """The trainer's image has the converter's Python files and one program."""
    for program in (build / "bin").iterdir():
        if program.name != "llama-tokenize":
            program.unlink()
    assert programs().folder == build
    assert programs("llama-tokenize").tokenize == build / "bin" / "llama-tokenize"
    with pytest.raises(HostError, match="incomplete"):
        programs("llama-server")
