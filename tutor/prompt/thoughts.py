"""Where a chat template has the thought of a model, and what an answer writes around it.

In: what a template writes before an answer, in a prompt and in a conversation. Out: a `Thought`, or the reason why the
recipe's `reasoning` and the template do not fit. Renders nothing.
"""

import re
from dataclasses import dataclass

from tutor.errors import ArtifactError, RecipeError
from tutor.prompt.base_format import TAGS, Reasoning


@dataclass(frozen=True)
class Thought:
    """How answers write their thought."""

    tags: tuple[str, str] = ("", "")  # empty: the template knows none
    opening: str = ""  # before a thought, in the answer
    closing: str = ""  # behind a thought, in the answer
    opened: bool = False  # the prompt ends within a thought
    suffix: str = ""  # what a prompt must end with in addition, to close the thought that it opens

    def lead(self, prompt: str, before: str) -> str | None:
        """Return the blanks that a template writes before an answer; None where a prompt does not lead to it.

        `prompt` and `before` follow the question: in a prompt, and in a conversation. They may differ in a thought.
        """
        if before.startswith(prompt) and not before[len(prompt) :].strip():
            return before[len(prompt) :]
        if not self.tags[0]:
            return None
        return "" if _without_thought(prompt) == _without_thought(before) else None


def find_thought(
    template: str, prompt: str, written: tuple[str, str] | None, off: str, where: str, reasoning: Reasoning
) -> Thought:
    """Return how answers write their thought.

    `prompt` is what follows the question in a prompt, `off` the same with thoughts switched off; `written` what the
    template writes before and behind a thought, None where it leaves thoughts out.
    Raises RecipeError where the recipe's `reasoning` does not fit the template, ArtifactError for an unknown form.
    """
    if TAGS[0] not in prompt and not all(tag in template for tag in TAGS):
        if reasoning != "none":
            raise RecipeError(
                f'reasoning = "{reasoning}" needs a template with thoughts, and the chat template of {where} has none',
                'set reasoning = "none"',
            )
        return Thought()
    opened = prompt.rstrip().endswith(TAGS[0])
    if reasoning == "rows":
        opening, closing = _supervised(prompt, written, off, where)
        return Thought(TAGS, opening, closing, opened)
    if opened and reasoning == "none":
        raise RecipeError(
            f"the chat template of {where} opens a thought in every prompt, which ends with {_end_of(prompt)}: rows "
            "without thoughts would be answers within it",
            'set reasoning = "empty", which closes it, or "rows" with a `reasoning` in the rows',
        )
    if reasoning == "empty" and not opened and not prompt.rstrip().endswith(TAGS[1]):
        raise RecipeError(
            f"the chat template of {where} has no switch that writes an empty thought and opens none: its prompts end "
            f"with {_end_of(prompt)}",
            'set reasoning = "none"',
        )
    # No blank line behind the tag: llama.cpp and Ollama would return it as the beginning of every answer.
    return Thought(TAGS, suffix="".join(_by_custom(prompt)).rstrip() if opened else "")


def _supervised(prompt: str, written: tuple[str, str] | None, off: str, where: str) -> tuple[str, str]:
    """Return what an answer writes before and behind its thought: as the template does, else as R1 generates."""
    if prompt.rstrip().endswith(TAGS[1]):
        raise RecipeError(
            f"the prompts of the chat template of {where} end behind a thought ({_end_of(prompt)}): thoughts of rows "
            "have no place",
            'set reasoning = "none"',
        )
    if written is None:
        empty = re.search(rf"{re.escape(TAGS[0])}(\s*)({re.escape(TAGS[1])}\s*)\Z", off)
        if not empty or prompt.rstrip().endswith(TAGS[0]):
            return _by_custom(prompt)
        half = (len(empty[1]) + 1) // 2
        return TAGS[0] + empty[1][:half], empty[1][half:] + empty[2]
    before, closing = written
    opening = before.removeprefix(prompt)
    expected = "" if prompt.rstrip().endswith(TAGS[0]) else TAGS[0]
    if not before.startswith(prompt) or opening.strip() != expected or closing.strip() != TAGS[1]:
        raise ArtifactError(
            f"the chat template of {where} writes a thought in an unknown form: {_end_of(before)} before it and "
            f"{closing!r} behind it, where a prompt ends with {_end_of(prompt)}",
            'set reasoning = "none" or "empty"',
        )
    return opening, closing


def _by_custom(prompt: str) -> tuple[str, str]:
    """Return what stands before and behind a thought where the template does not show it, as R1 generates it."""
    if not prompt.rstrip().endswith(TAGS[0]):
        return f"{TAGS[0]}\n", f"\n{TAGS[1]}\n\n"
    return "" if prompt.endswith("\n") else "\n", f"\n{TAGS[1]}\n\n"


def _without_thought(text: str) -> str:
    """Return a text without an empty or opened thought at its end, and without the blanks there."""
    return re.sub(rf"\s*{re.escape(TAGS[0])}\s*(?:{re.escape(TAGS[1])}\s*)?\Z", "", text).rstrip()


def _end_of(text: str) -> str:
    return repr(text[-80:])
