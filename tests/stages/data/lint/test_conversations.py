"""stages/data/lint: rows of several turns, prompts of several turns, the recipe's language and prompt format."""

from pathlib import Path
from typing import Any

from support.outputs.lint_rows import ANSWER, GOOD, kinds_and_lines, lint_rows, row

from tutor.prompt.tutor_format import TutorFormat
from tutor.stages.data.lint.page import lint_page


def talk(*texts: str, system: str = "", **other: Any) -> dict[str, Any]:
    """A row of several turns: questions and answers in turn."""
    roles = [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(texts)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *roles], **other}


def test_faults_name_their_message_in_any_turn(tmp_path: Path) -> None:
    open_fence = f"{ANSWER} (1)\n\n```ts\nlet x = 1;"
    faults = {
        "fence": talk("¿Qué es uno?", open_fence, "¿Y dos?", f"{ANSWER} (2)", category="a"),
        "placeholder": talk("¿Qué es <tu nombre>?", f"{ANSWER} (3)", "¿Y?", f"{ANSWER} (4)", system="Sé breve."),
        "language": talk("¿Qué es tres?", f"{ANSWER} (5)", "¿Y?", "The compiler checks every value before it runs."),
    }
    report = lint_rows(tmp_path, [*GOOD, *({**each, "category": "a"} for each in faults.values())])
    found = {each.kind: (each.line - len(GOOD), each.message) for each in report.findings}
    assert found["fence"] == (1, "a code fence in messages[1] does not close")
    assert found["placeholder"] == (2, "messages[1] holds <tu nombre>")
    assert found["language"][0] == 3
    assert found["language"][1].startswith("the prose of messages[3] with its question is not Spanish")
    assert "¿Qué es tres?\n\n¿Y?" in lint_page(report)


def test_rows_are_compared_by_all_their_questions(tmp_path: Path) -> None:
    rows = [
        talk("¿Qué es una tupla?", f"{ANSWER} (1)", "¿Y un ejemplo?", f"{ANSWER} (2)"),
        talk("¿Qué es un enum?", f"{ANSWER} (3)", "¿Y un ejemplo?", f"{ANSWER} (4)"),
        talk("¿Qué es una tupla?", f"{ANSWER} (1)", "¿Y un ejemplo?", f"{ANSWER} (2)"),
        talk("¿Qué es una tupla?", f"{ANSWER} (1)", "¿Y un ejemplo?", f"{ANSWER} (5)"),
    ]
    asked = [{"messages": [{"role": "user", "content": "¿Qué es un enum?"}]}]
    report = lint_rows(tmp_path, rows, asked)
    assert kinds_and_lines(report) == [("duplicate", 3), ("contradiction", 4), ("leak", 2)], "a leak in the first turn"


def test_length_is_of_the_whole_conversation(tmp_path: Path, tokenizer_file: Path) -> None:
    rows = [talk("¿A?", "b" * 300, "¿C?", "d"), row("¿E?", "f")]
    report = lint_rows(tmp_path, rows, max_length=300, tokenizer=tokenizer_file, system="Tú")
    assert [each.line for each in report.findings if each.kind == "length"] == [1]
    text = f"Tú\n\nInstrucción: ¿A?\nRespuesta: {'b' * 300}\n\nInstrucción: ¿C?\nRespuesta: d"
    assert report.figures["lengths"]["max"] == len(text.encode()) + len(["<eos>"])


class NoSystem(TutorFormat):
    """A format without a place for a system text."""

    def render(self, messages: Any) -> str:
        if messages[0]["role"] == "system":
            raise ValueError("there is no place for a system text")
        return super().render(messages)


def test_row_that_the_format_cannot_write_is_a_finding(tmp_path: Path, tokenizer_file: Path) -> None:
    rows = [*GOOD, talk("¿Qué?", ANSWER, system="Sé breve.", category="a")]
    report = lint_rows(tmp_path, rows, tokenizer=tokenizer_file, prompt=NoSystem())
    assert [(each.kind, each.line, each.message) for each in report.findings] == [
        ("schema", len(rows), "there is no place for a system text")
    ]


def test_language_is_that_of_the_recipe(tmp_path: Path) -> None:
    answer = "The compiler checks the {0} before the program runs, and nothing else happens to the {0}."
    rows = [row(f"What is a {word}?", answer.format(word)) for word in ("tuple", "class", "module", "union", "value")]
    rows.append(row("¿Qué es?", ANSWER))
    report = lint_rows(tmp_path, rows, language="en")
    assert [(each.kind, each.line) for each in report.findings] == [("language", 6)]
    assert "is not English" in report.findings[0].message
    free = lint_rows(tmp_path, rows, language="any")
    assert (free.findings, free.figures["language"]) == ((), None)
    assert "prose in" not in lint_page(free)
