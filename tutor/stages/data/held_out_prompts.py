"""The questions of held-out rows as prompts, for a recipe without data.eval.

In: held-out rows. Out: one prompt a question, with the row's answer as its reference; a prompt demands code where the
reference has TypeScript that compiles. Compiles nothing: the row's `code` states what its blocks do.
"""

import re
from collections.abc import Sequence

from tutor.formats.markdown import TYPESCRIPT, fence_languages
from tutor.formats.rows.examples import Example, Prompt
from tutor.stages.data.splitting import group_by_question


def prompts_of_rows(held_out: Sequence[Example]) -> list[Prompt]:
    """Return the last question of each held-out conversation, each question once, in the order of the rows."""
    return [_prompt(group[0]) for group in group_by_question(held_out).values()]


def _prompt(row: Example) -> Prompt:
    asked, answered = fence_languages(row.instruction), fence_languages(row.response)
    is_about_code = any(language in TYPESCRIPT for language in (*asked, *answered))
    return Prompt(
        instruction=row.instruction,
        category=row.category,
        topic=row.topic,
        code=_alone(row.code[: len(asked)]),
        expect={"code": _compiles(answered, row.code[len(asked) :])} if is_about_code else {},
        reference=row.response,
        line=row.line,
        history=row.history,
    )


def _alone(specs: tuple[str, ...]) -> tuple[str, ...]:
    """The specifications of a question's blocks; none where one needs a block of the answer."""
    needed = (int(number) for spec in specs for number in re.findall(r"\+(\d+)", spec))
    return specs if max(needed, default=0) <= len(specs) else ()


def _compiles(languages: Sequence[str], specs: Sequence[str]) -> bool:
    """Whether an answer has TypeScript, all of which compiles as the row states it; "ok" is the default."""
    stated = specs or ["ok"] * len(languages)
    found = [spec for language, spec in zip(languages, stated, strict=True) if language in TYPESCRIPT]
    return bool(found) and all(spec.strip().startswith("ok") for spec in found)
