"""formats/html.py: characters without a shape of their own. The report and lint pages cover the rendering."""

from tutor.formats.html import displayed


def test_composed_emoji_is_kept_and_lone_joiner_replaced() -> None:
    assert displayed("👩‍💻 👩🏽‍🏫 ❤️‍🔥") == "👩‍💻 👩🏽‍🏫 ❤️‍🔥"
    assert displayed("a\u200db\n") == "a�b\n"
