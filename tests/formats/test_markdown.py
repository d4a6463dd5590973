"""formats/markdown.py: fenced blocks of CommonMark, blocks of TypeScript."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from tutor.formats.markdown import fence_languages, fenced_blocks, typescript_blocks


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Sin código.", []),
        ("con `en línea` nada más", []),
        ("    sangrado\n", []),
        ("```ts\na;\n```", [("ts", "a;\n", 2, True)]),
        (
            "x\n\n```TypeScript title=a\na;\nb;\n```\ny\n```ts\nc;\n```",
            [("typescript", "a;\nb;\n", 4, True), ("ts", "c;\n", 9, True)],
        ),
        ("~~~ts\n```\n~~~", [("ts", "```\n", 2, True)]),
        ("```ts\na;", [("ts", "a;", 2, False)]),
        ("```ts\na;\n", [("ts", "a;\n", 2, False)]),
        ("```ts", [("ts", "", 2, False)]),
        ("```\n```", [("", "", 2, True)]),
        ("````md\n```ts\na;\n```\n````", [("md", "```ts\na;\n```\n", 2, True)]),
        ("- uno\n  ```ts\n  a;\n  ```", [("ts", "a;\n", 3, True)]),
        ("> ```ts\n> a;\n> ```", [("ts", "a;\n", 2, True)]),
        ("```ts\r\na;\r\n```", [("ts", "a;\n", 2, True)]),
    ],
)
def test_fenced_blocks_equal_commonmark(text: str, found: list[tuple[str, str, int, bool]]) -> None:
    assert [(block.language, block.code, block.line, block.closed) for block in fenced_blocks(text)] == found


def test_unlabelled_blocks_are_typescript_if_none_is_labelled() -> None:
    assert [block.code for block in typescript_blocks(fenced_blocks("```\na\n```\n```js\nb\n```"))] == ["a\n"]
    assert [block.code for block in typescript_blocks(fenced_blocks("```\na\n```\n```ts\nb\n```"))] == ["b\n"]
    assert typescript_blocks(fenced_blocks("```tsx\n<a/>\n```")) == []


MARKDOWN = ["```", "```ts", "~~~", "````", " ```", "- ```js", "> x", "<div>", "a", "", "\r", "\t```", "- b", "`c`"]


@given(st.lists(st.sampled_from(MARKDOWN), max_size=9).map("\n".join))
@example("<pre>\n```ts\nx\n```\n")
@example("a\r<pre>\n```\nx\n```")
def test_fence_languages_equal_commonmark(text: str) -> None:
    tokens = [token for token in MarkdownIt("commonmark").parse(text) if token.type == "fence"]
    assert fence_languages(text) == [(token.info.split() or [""])[0].lower() for token in tokens]
