"""formats/visible.py: characters that a terminal obeys, secrets, JSON."""

import json

import pytest

from tutor.formats.visible import REDACTED, clean, json_text, one_line, redacted, visible

TOKEN = "hf_" + "aB3" * 8
HOSTILE = {
    "colour": ("\x1b[31m", r"\x1b[31m"),
    "clipboard": ("\x1b]52;c;cm0gLXJm\x07", r"\x1b]52;c;cm0gLXJm\x07"),
    "window title": ("\x1b]0;x\x9c", r"\x1b]0;x\x9c"),
    "C1 introducer": ("\x9b31m", r"\x9b31m"),
    "bidi override": ("\u202ecba\u2066", r"\u202ecba\u2066"),
    "erase": ("a\x08\x7f\0", r"a\x08\x7f\x00"),
    "overwrite": ("ok\rError", r"ok\rError"),
    "half a surrogate pair": ("\ud83d", r"\ud83d"),
    "byte of a file name": ("\udcf1", r"\udcf1"),
    "zero width": ("a\u200db\u200b\ufeff", r"a\u200db\u200b\ufeff"),
    "line separator": ("a\u2028b", r"a\u2028b"),
    "tag": ("\U000e0041", r"\U000e0041"),
}


@pytest.mark.parametrize(("text", "shown"), HOSTILE.values(), ids=HOSTILE)
def test_control_character_is_shown_as_its_escape(text: str, shown: str) -> None:
    assert visible(f"ñ {text}\n") == f"ñ {shown}\n"


@pytest.mark.parametrize("text", ["año\t¿qué?\n", "a\r\nb", "👩‍💻 👩🏽‍🏫 ❤️‍🔥 🐈‍⬛", "日本語 é"])
def test_visible_text_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


def test_one_line_escapes_newlines_and_tabs() -> None:
    assert one_line("a\nError: forged\r\n\tb") == r"a\nError: forged\r\n\tb"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"401 for {TOKEN}: revoked", f"401 for {REDACTED}: revoked"),
        ("Authorization: Bearer abc.def-1 sent", f"Authorization: Bearer {REDACTED} sent"),
        ("{'authorization': 'Basic YTpi', 'x': 1}", f"{{'authorization': 'Basic {REDACTED}', 'x': 1}}"),
        ("proxy http://me:secret@proxy:3128/ failed", f"proxy http://{REDACTED}@proxy:3128/ failed"),
        ("http://127.0.0.1:11434/api/tags, a@b.c", "http://127.0.0.1:11434/api/tags, a@b.c"),
        ("hf_transfer, HF_TOKEN, authorization needed", "hf_transfer, HF_TOKEN, authorization needed"),
    ],
)
def test_secret_in_a_text_is_redacted(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OLLAMA_API_KEY"])
def test_value_of_a_secret_variable_is_redacted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, " k3y-of-any-form\n")
    assert clean("sent k3y-of-any-form to it") == f"sent {REDACTED} to it"
    monkeypatch.setenv(name, "ollama")
    assert clean("ollama run tutor") == "ollama run tutor"


@pytest.mark.parametrize("indent", [None, 1])
def test_json_keeps_its_value_and_holds_no_control_character(indent: int | None) -> None:
    value = {name: text for name, (text, _) in HOSTILE.items()} | {"emoji": "👩‍💻", "lines": "a\n\tb", "ñ": [1, None]}
    text = json_text(value, indent)
    assert json.loads(text) == value
    assert all(sign.isprintable() or sign == "\n" for sign in text.replace("👩‍💻", ""))
    assert "ñ" in text


def test_json_with_a_secret_stays_json() -> None:
    text = json_text({"error": f"Authorization: Bearer {TOKEN}", "x": f'"{TOKEN}"\\'})
    assert json.loads(text) == {"error": f"Authorization: Bearer {REDACTED}", "x": f'"{REDACTED}"\\'}
