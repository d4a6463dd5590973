"""engines/ollama/protocol.py: versions, parameters. Error texts are tested through test_engine.py."""

import pytest

from tutor.engines.ollama.protocol import (
    check_version,
    parse_parameters,
)
from tutor.errors import ServiceError


@pytest.mark.parametrize("version", ["0.30.0", "0.33.0-rc2", "1.0.0", "v0.31.2"])
def test_new_enough_version_is_accepted_without_warning(version: str, caplog: pytest.LogCaptureFixture) -> None:
    check_version(version)
    assert not caplog.records


def test_old_version_is_refused() -> None:
    with pytest.raises(ServiceError, match=r"0\.17\.7 is too old: 0\.30"):
        check_version("0.17.7")


@pytest.mark.parametrize("version", ["0.0.0", "main"])
def test_unknown_version_is_accepted_with_one_warning(version: str, caplog: pytest.LogCaptureFixture) -> None:
    check_version(version)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_parameters_in_go_format_are_parsed() -> None:
    text = (
        'num_ctx                        4096\nstop                           "\\nInstrucción:"\nstop    "\\"a\\" b"\n'
    )
    text += "temperature                    1e-05\nuse_mmap    true\nodd    {1 2}"
    expected = {"num_ctx": 4096, "stop": ["\nInstrucción:", '"a" b'], "temperature": 1e-5, "use_mmap": True}
    assert parse_parameters({"parameters": text}) == {**expected, "odd": "{1 2}"}
    assert parse_parameters({}) == {}
