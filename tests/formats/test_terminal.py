"""formats/terminal.py: streams, pieces of an answer, rich; and no other module that writes."""

import ast
import io
import sys
from pathlib import Path

import pytest
from support.processes.command import ROOT

from tutor.formats import terminal
from tutor.formats.terminal import AnswerStream, CleanStream, ThoughtStream

CHILD_PROGRAMS = "tutor/engines/llamacpp/src/"
"""Programs that the parent reads through a pipe; they write to no terminal."""
WRITERS = {"print", "breakpoint"}
ATTRIBUTES = {"stdout", "stderr", "__stdout__", "__stderr__"}
METHODS = {"echo", "secho", "print_exc", "print_exception", "print_stack", "StreamHandler", "basicConfig", "Console"}
LIBRARIES = {"tqdm", "rich.console", "termcolor", "colorama", "getpass", "pprint"}


def writers(path: Path) -> list[str]:
    """Return what writes to the standard streams in a module, or hands them to something that does."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id] if node.func.id in WRITERS | METHODS else []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = node.value.id
            names = [node.attr] if (owner == "sys" and node.attr in ATTRIBUTES) or node.attr in METHODS else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("subprocess.run", "subprocess.Popen"):
            given = {keyword.arg for keyword in node.keywords}
            names = [] if given & {"stdout", "capture_output"} else ["a program"]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name in LIBRARIES]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module in LIBRARIES else []
            names += [alias.name for alias in node.names if node.module == "sys" and alias.name in ATTRIBUTES]
        found += [f"{path.relative_to(ROOT).as_posix()}:{getattr(node, 'lineno', 0)} {name}" for name in names]
    return found


def test_no_other_module_writes_to_the_terminal() -> None:
    """exit.py knows stdout besides: it replaces what a reader has closed."""
    here = {ROOT / "tutor" / "formats" / "terminal.py", ROOT / "tutor" / "cli" / "exit.py"}
    modules = [path for path in sorted((ROOT / "tutor").rglob("*.py")) if path not in here]
    found = [line for path in modules for line in writers(path) if not line.startswith(CHILD_PROGRAMS)]
    assert found == []
    assert [line.split()[-1] for line in writers(ROOT / "tutor" / "cli" / "exit.py")] == ["stdout"] * 2
    assert writers(ROOT / "tutor" / "formats" / "terminal.py")


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (("a\x1b", "]52;c;eA==\x07b\n"), "a\\x1b]52;c;eA==\\x07b\n"),
        (("\x1b[", "31m", "\n"), "\\x1b[31m\n"),
        (("👩", "\u200d", "💻 es", "\n"), "👩‍💻 es\n"),
        (("👩\u200d", "x", "\n"), "👩\\u200dx\n"),
        (("👩\u200d", "\n"), "👩\\u200d\n"),
        (("a\r", "\nb\r", "c\n"), "a\r\nb\\rc\n"),
        (("h", "f_abcdefghij", "klmnopqrstuvw, ha", "\n"), "[redacted], ha\n"),
        (("Un eco", "h", "\n"), "Un ecoh\n"),
    ],
)
def test_answer_in_pieces_is_shown_as_in_one(
    pieces: tuple[str, ...], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = AnswerStream()
    for piece in pieces:
        stream.write(piece)
    assert capsys.readouterr().out == shown


def test_answer_is_printed_while_it_is_generated(capsys: pytest.CaptureFixture[str]) -> None:
    stream = AnswerStream()
    stream.write("Una interfaz")
    assert capsys.readouterr().out == "Una interfaz"


def test_thought_is_notes_on_stderr_and_dim_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def show() -> str:
        thought = ThoughtStream()
        for piece in ("Un\x1b[2J ", "tipo\ny", " más"):
            thought.write(piece)
        thought.close()
        thought.close()
        found = capsys.readouterr()
        assert not found.out
        return found.err

    assert show() == "Un\\x1b[2J tipo\ny más\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = show()
    assert shown.replace("\x1b[2m", "").replace("\x1b[0m", "") == "Un\\x1b[2J tipo\ny más\n"
    assert shown.startswith("\x1b[2mUn")


def test_line_on_stderr_cannot_forge_another(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.write_note("a\nError: forged \x1b[2J")
    terminal.write_lines("Traceback\n  a \x9b2J")
    assert capsys.readouterr().err == "a\\nError: forged \\x1b[2J\nTraceback\n  a \\x9b2J\n"


def test_library_that_writes_to_stderr_is_cleaned() -> None:
    stream = io.StringIO()
    cleaned = CleanStream(stream)
    print("warning of a server: \x1b]0;x\x07", file=cleaned)  # type: ignore[call-overload]
    cleaned.writelines(["hf_abcdefghijklmnopqrstuvw\n"])
    assert stream.getvalue() == "warning of a server: \\x1b]0;x\\x07\n[redacted]\n"
    assert not cleaned.isatty()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_closed_stream_is_no_error(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, stream, None)
    terminal.write_result("a")
    terminal.write_note("a")
    assert not terminal.is_terminal(stream)


def test_table_keeps_its_colours_and_escapes_its_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    table = Table(box=None)
    table.add_row("[red]missing[/]", "GPU \x1b]0;x\x07 \u202e")
    terminal.console("stdout").print(table)
    sent = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[31mmissing" in sent
    assert "\x1b]" not in sent
    assert "\u202e" not in sent
    assert r"\x1b]" in sent


def test_long_note_keeps_its_beginning_and_its_end(capsys):
    terminal.write_note("what is wrong " + "x" * 70_000 + "\x1b; what next")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("what is wrong xxx")
    assert line.endswith(r"xxx\x1b; what next")
    assert len(line) < terminal.NOTE_LENGTH + 100
