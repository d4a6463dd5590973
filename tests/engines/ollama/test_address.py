"""engines/ollama/address.py: the forms of OLLAMA_HOST, as in the tests of Ollama's envconfig and beyond them."""

import pytest

from tutor.engines.ollama.address import is_loopback, normalized_url, warn_in_clear
from tutor.errors import RecipeError


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        (":1234", "http://127.0.0.1:1234"),
        ("1.2.3.4:1234", "http://1.2.3.4:1234"),
        ("ollama", "http://ollama:11434"),
        ("example.com:1234", "http://example.com:1234"),
        ("host:", "http://host:11434"),
        (":0", "http://127.0.0.1:0"),
        ("[::1]", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("[::1]:1337", "http://[::1]:1337"),
        ("2001:0db8::0001", "http://[2001:db8::1]:11434"),
        ("http://[::1", "http://[::1]:80"),
        (" 1.2.3.4 ", "http://1.2.3.4:11434"),
        ('"1.2.3.4"', "http://1.2.3.4:11434"),
        (' " 1.2.3.4 " ', "http://1.2.3.4:11434"),
        ("'1.2.3.4'", "http://1.2.3.4:11434"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("http://1.2.3.4:4321", "http://1.2.3.4:4321"),
        ("https://1.2.3.4", "https://1.2.3.4:443"),
        ("HTTPS://models.example:4321", "https://models.example:4321"),
        ("https://example.com/ollama", "https://example.com:443/ollama"),
        ("example.com/a/b/", "http://example.com:11434/a/b"),
        ("http://ollama:11434/", "http://ollama:11434"),
        ("http://", "http://127.0.0.1:80"),
        ("ollama.com", "https://ollama.com:443"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:1234", "http://127.0.0.1:1234"),
        ("[::]", "http://[::1]:11434"),
        ("[::]:1234", "http://[::1]:1234"),
        ("https://0.0.0.0:4321", "https://127.0.0.1:4321"),
    ],
)
def test_host_is_read_as_ollama_reads_it(
    given: str, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert normalized_url(given) == url
    monkeypatch.setenv("OLLAMA_HOST", given)
    assert normalized_url(None) == url
    assert not caplog.records


@pytest.mark.parametrize(
    ("given", "url"),
    [
        (":66000", "http://127.0.0.1:11434"),
        (":-1", "http://127.0.0.1:11434"),
        ("x:port", "http://x:11434"),
        ("https://x:99999", "https://x:443"),
        ("x:" + "9" * 5000, "http://x:11434"),
    ],
)
def test_port_that_is_none_falls_back_with_a_warning(given: str, url: str, caplog: pytest.LogCaptureFixture) -> None:
    assert normalized_url(given) == url
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "which is none" in caplog.text


@pytest.mark.parametrize(
    "given",
    [
        "ftp://x",
        "a b",
        "x?y=1",
        "x/y#z",
        "x/y?z",
        "a..b",
        "999.1.1.1",
        "1.2.3",
        "::1::",
        "a" * 64,
        "ñ",
        "x/a\nb",
        "[x]",
    ],
)
def test_invalid_host_is_refused_with_valid_forms(given: str) -> None:
    with pytest.raises(RecipeError, match="NAME:PORT"):
        normalized_url(given)


def test_host_with_password_is_refused_and_not_printed() -> None:
    with pytest.raises(RecipeError) as caught:
        normalized_url("http://user:geheim@host:port")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.8.8.8:1", True),
        ("http://[::1]:1", True),
        ("http://localhost:1", True),
        ("http://192.168.1.5:1", False),
        ("http://ollama:1", False),
        ("http://127.0.0.1.example:1", False),
    ],
)
def test_loopback_address_is_recognized(url: str, *, here: bool) -> None:
    assert is_loopback(url) is here


def test_plain_http_to_another_machine_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    warn_in_clear.cache_clear()
    for _ in range(3):
        warn_in_clear("http://192.168.1.5:11434")
    for url in ("http://127.0.0.1:1", "http://localhost:1", "http://ollama:11434", "https://192.168.1.5:443"):
        warn_in_clear(url)
    (record,) = caplog.records
    expected = "http://192.168.1.5:11434 is another machine and has no TLS: weights and prompts travel unencrypted"
    assert (record.levelname, record.getMessage()) == ("WARNING", expected)
