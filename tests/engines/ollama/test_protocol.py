"""engines/ollama/protocol.py: hosts, versions, parameters. Error texts are tested through test_engine.py."""

import pytest

from tutor.engines.ollama.protocol import (
    check_version,
    normalized_url,
    parse_parameters,
)
from tutor.errors import RecipeError, ServiceError


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("ollama", "http://ollama:11434"),
        ("http://ollama", "http://ollama:11434"),
        ("http://ollama/", "http://ollama:11434"),
        ("ollama:80", "http://ollama:80"),
        ("https://models.example", "https://models.example:443"),
        ("https://models.example/ollama/", "https://models.example:443/ollama"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:11999", "http://127.0.0.1:11999"),
        ("[::1]", "http://[::1]:11434"),
        ("http://[::]:5", "http://[::1]:5"),
    ],
)
def test_host_without_port_gets_the_port_of_ollama(given: str, address: str) -> None:
    assert normalized_url(given) == address


def test_missing_host_is_read_from_environment_or_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", ' "ollama" ')
    assert normalized_url(None) == "http://ollama:11434"
    monkeypatch.setenv("OLLAMA_HOST", "")
    assert normalized_url(None) == "http://127.0.0.1:11434"


@pytest.mark.parametrize("given", ["ftp://x", "http://", "x:port", "x:99999", "a b", "x?y=1", "http://[::1", "x/y#z"])
def test_invalid_host_is_refused_with_valid_forms(given: str) -> None:
    with pytest.raises(RecipeError, match="NAME:PORT"):
        normalized_url(given)


def test_host_with_password_is_refused_and_not_printed() -> None:
    with pytest.raises(RecipeError) as caught:
        normalized_url("http://user:geheim@host:port")
    assert "geheim" not in str(caught.value)


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
