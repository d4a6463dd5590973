"""formats/rows/control_tokens.py: which added tokens are control tokens, and which of them a row may hold."""

from dataclasses import dataclass

from tutor.formats.rows.control_tokens import control_tokens, llamacpp_control_texts


@dataclass(frozen=True)
class Token:
    content: str
    special: bool = False


ADDED = {
    1: Token("<s>", special=True),
    2: Token("</s>", special=True),
    3: Token("<filename>", special=True),
    4: Token("fin_de_texto", special=True),
    5: Token("<think>"),
    6: Token(" [TOOL] "),
    7: Token("ú"),
    8: Token("    "),
    9: Token("TypeScript"),
}


def test_added_tokens_that_are_text_are_no_control_tokens() -> None:
    assert set(control_tokens(ADDED, [], {}).names) == {1, 2, 3, 4, 5, 6}


def test_tokens_of_the_prompt_contract_are_not_found_in_a_row() -> None:
    tokens = control_tokens(ADDED, [1, 40, 41, 2], {})
    assert tokens.found([1, 50, 7, 8, 9, 51, 2], "") == []
    assert tokens.found([1, 50, 3, 5, 3, 2], "") == ["<filename>", "<think>"]
    assert tokens.found([1, 50, 2, 51, 2], "") == ["</s>"]
    assert tokens.found([1, 1, 50, 2], "") == ["<s>"]


def test_control_token_of_llamacpp_alone_is_found() -> None:
    """Qwen's vocabulary holds </s> as plain text; llama.cpp makes it a control token by its text."""
    vocabulary = {"</s>": 128247, "hola": 7, "<eos>": 1}
    added = {1: Token("<eos>", special=True)}
    assert llamacpp_control_texts(vocabulary, ["<eos>"]) == ("</s>",)
    tokens = control_tokens(added, [], vocabulary)
    assert tokens.found([7, 8, 9], "un </s> tachado") == ["</s>"]
    assert tokens.found([7, 8, 9], "un <s> tachado") == []
