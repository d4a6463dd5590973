"""recipe/language_lines.py: sentences by the language of the answers."""

from tutor.recipe.language_lines import LINES, language_line
from tutor.recipe.values import LANGUAGES


def test_line_is_in_its_language_else_in_english():
    assert language_line("es") == "Responde en español."
    assert language_line("sw") == "Answer in Swahili."
    assert language_line("any") == ""


def test_lines_are_for_known_languages_and_differ():
    assert set(LINES) <= set(LANGUAGES)
    assert len(set(LINES.values())) == len(LINES)
