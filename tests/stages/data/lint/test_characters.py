"""stages/data/lint/characters.py: garbled, invisible and separate characters, and what is none of them."""

import json
from pathlib import Path

import pytest
from support.outputs.lint_rows import ANSWER, GOOD, kinds_and_lines, lint_rows, row
from support.processes.command import ROOT

from tutor.stages.data.lint.characters import doubtful_characters


@pytest.mark.parametrize(
    ("meant", "first"),
    [
        ("¿Qué es?", "'Â¿', which is '¿'"),
        ("el título", "'Ã\\xad', which is 'í'"),
        ("Árbol", "'Ã\\x81', which is 'Á'"),
        ("la «unión»", "'Â«', which is '«'"),
        ("y así…", "'Ã\\xad', which is 'í'"),
        ("un «si»".replace("«", "“").replace("»", "”"), "'â€œ', which is '“'"),
        ("vale — o no", "'â€”', which is '—'"),
        ("bien 👍", "'ðŸ‘\\x8d', which is '👍'"),
        ("\ufeffhola", "'ï»¿', which is '\\ufeff'"),
    ],
)
def test_utf8_read_as_windows_1252_is_found(meant: str, first: str) -> None:
    garbled = "".join(bytes([byte]).decode("cp1252" if _is_known(byte) else "latin-1") for byte in meant.encode())
    assert doubtful_characters(garbled) == f"holds {first} read as Windows-1252"
    latin = meant.encode().decode("latin-1")
    assert "read as Windows-1252" in (doubtful_characters(latin) or "")
    assert meant.startswith("\ufeff") or doubtful_characters(meant) is None


def _is_known(byte: int) -> bool:
    return byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\ufffdo", "holds U+FFFD, the mark of a character that could not be read"),
        ("la\u200b unión", "holds U+200B, which is invisible"),
        ("\ufeffla unión", "holds U+FEFF, which is invisible"),
        ("x\u202e = 1", "holds U+202E, which is invisible"),
        ("co\u00adsa", "holds U+00AD, which is invisible"),
        ("a\u200db", "holds U+200D, which is invisible"),
        ("\uf0b7 uno", "holds U+F0B7, which is of private use"),
        ("el nin\u0303o", "has accents as characters of their own (NFD)"),
    ],
)
def test_lost_invisible_and_separate_characters_are_found(text: str, expected: str) -> None:
    assert (doubtful_characters(text) or "").startswith(expected)


@pytest.mark.parametrize(
    "text",
    [
        "plain ASCII",
        "«¡ÁRBOL, ÑANDÚ!»: ¿SÍ?",
        "«JOSÉ» y «PERÚ», 5 € — 20 ºC…",
        "👩\u200d💻 y 👨\u200d👩\u200d👧, ❤\ufe0f\u200d🔥",
        "NÃO É, PÂNICO, âmbar, João",
        "naïve façade, Größe, œuvre",
        "日本語 и русский",
        "a\u00a0b",
    ],
)
def test_text_as_its_author_saw_it_is_no_finding(text: str) -> None:
    assert doubtful_characters(text) is None


def test_shipped_rows_have_no_such_character() -> None:
    for name in ("tutor", "eval"):
        for line in (ROOT / "data" / f"{name}.jsonl").read_text("utf-8").splitlines():
            found = json.loads(line)
            assert doubtful_characters(found["instruction"] + "\n" + found.get("response", "")) is None


def test_doubtful_characters_are_a_finding_on_their_line(tmp_path: Path) -> None:
    report = lint_rows(tmp_path, [*GOOD, row("Â¿QuÃ© es un nivel de la torre?", f"{ANSWER}\ufffd", category="a")])
    assert kinds_and_lines(report) == [("characters", len(GOOD) + 1)] * 2
    assert [each.message.split()[0] for each in report.findings] == ["instruction", "response"]
