"""Does code do what was said of it: the blocks of a data set's rows, and a model's answers to prompts.

In: Markdown texts with, for each fenced block, what it must do. Out: problems of rows; verdicts on answers, as JSON
holds them. One run of the compiler for all of them. Says nothing about prose beyond the words that must be there.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tutor.formats.markdown import TYPESCRIPT, Block, fenced, typescript
from tutor.graders.identifiers import dropped
from tutor.graders.typescript.compiler import SECONDS, Verdict, judge_blocks

UNCHECKED = "-"
_SPEC = re.compile(r"(?P<codes>ok|TS\d+(?:,\s*TS\d+)*)(?P<needs>(?:\s+\+\d+)*)")
MAX_TEXT = 2**20
"""Characters of an answer that are looked at: what is longer is no answer."""
WORST = ("judge_error", "timeout", "suppressed", "syntax_error", "type_error", "no_code", "pass")
"""Of several blocks' outcomes the first of these is the answer's."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A row's two texts and, for each fenced block in them, what it must do, the question's first.

    "ok": it compiles; "TS2322,TS2345": it fails with these codes and no other; "ok +1": it compiles behind block 1;
    "-": it is not looked at. Without `code` every TypeScript block is to compile.
    """

    question: str
    answer: str = ""
    code: Sequence[str] = ()
    line: int = 0


@dataclass(frozen=True)
class Checked:
    """How a data set's blocks did; a problem is the row's line and what is wrong there."""

    compiled: int
    failed_as_stated: int
    unchecked: int
    problems: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A block, its place for a person, and the codes with which it must fail (none: it must compile)."""

    block: Block
    place: str
    codes: frozenset[str]


def check_rows(rows: Iterable[Marked], *, seconds: float = SECONDS) -> Checked:
    """Compile every block of the rows and compare with what is said of it. Raises HostError without a compiler."""
    problems: list[tuple[int, str]] = []
    wanted: list[tuple[int, _Wanted]] = []
    unchecked = 0
    for row in rows:
        try:
            found, left_out = _wanted(row)
        except ValueError as error:
            problems.append((row.line, str(error)))
            continue
        wanted += [(row.line, each) for each in found]
        unchecked += left_out
    verdicts = judge_blocks([each.block for _, each in wanted], seconds=seconds)
    good = 0
    failed = 0
    for (line, each), verdict in zip(wanted, verdicts, strict=True):
        if fulfils(verdict, each.codes):
            failed += bool(each.codes)
            good += not each.codes
        else:
            problems.append((line, f"{each.place} {_difference(verdict, each.codes)}"))
    return Checked(good, failed, unchecked, tuple(sorted(problems)))


def _wanted(row: Marked) -> tuple[list[_Wanted], int]:
    """The row's blocks that are to be compiled, and how many are not. Raises ValueError where `code` is wrong."""
    asked = [replace(block, quoted=True) for block in fenced(row.question)]
    blocks = [*asked, *fenced(row.answer)]
    specs = row.code or ["ok" if block.language in TYPESCRIPT else UNCHECKED for block in blocks]
    if len(specs) > len(blocks):
        raise ValueError(f"code has {len(specs)} entries for {len(blocks)} fenced blocks")
    found = []
    for number, (spec, block) in enumerate(zip(specs, blocks, strict=False), 1):
        if spec.strip() == UNCHECKED:
            continue
        codes, needs = read_spec(spec)
        if bad := [need for need in needs if not 0 < need <= len(blocks) or need == number]:
            raise ValueError(f"code {number} is {spec!r}: there is no other block {bad[0]}")
        before = "".join(_ended(blocks[need - 1].code) for need in needs)
        side = "question" if block.quoted else "answer"
        place = f"block {number} ({side}, line {block.line})"
        found.append(_Wanted(replace(block, before=before), place, codes))
    return found, len(blocks) - len(found)


def read_spec(spec: str) -> tuple[frozenset[str], list[int]]:
    """The codes that a spec states (none: "ok") and the numbers of the blocks in front. Raises ValueError."""
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise ValueError(f"code {spec[:40]!r} is not of the kind ok, TS2322, TS2322,TS2345, ok +1 or {UNCHECKED}")
    codes = () if match["codes"] == "ok" else re.split(r",\s*", match["codes"])
    return frozenset(codes), [int(number) for number in re.findall(r"\+(\d+)", match["needs"])]


def fulfils(verdict: Verdict, codes: frozenset[str]) -> bool:
    """Whether a block did what was said of it: compiled, or failed with exactly these codes."""
    if not codes:
        return verdict.outcome == "pass"
    return verdict.outcome in ("type_error", "syntax_error") and verdict.codes == codes


def _ended(code: str) -> str:
    return code if code.endswith("\n") or not code else f"{code}\n"


def _difference(verdict: Verdict, codes: frozenset[str]) -> str:
    wanted = f"must fail with {', '.join(sorted(codes))}" if codes else "must compile"
    said = "; ".join(
        f"{each.code or verdict.outcome} in line {each.line}: {each.message}" for each in verdict.diagnostics[:3]
    )
    return f"{wanted}, but: {said or ('it compiles' if verdict.outcome == 'pass' else verdict.outcome)}"


def judge_answers(
    prompts: Sequence[Mapping[str, Any]], texts: Sequence[str], *, seconds: float = SECONDS
) -> list[dict[str, Any]]:
    """A verdict for each prompt's answer; JSON values.

    `compiles`: all of its TypeScript compiles, a block alone or behind the answer's blocks before it, and there is
    some if the prompt's `expect` wants code or its own code must fail; the question's own code, quoted unchanged, is
    left out. `given_fails`: the question's code fails as the prompt states (None where it states nothing). `dropped`:
    the names of failing code that the answer's lacks (kept.py). `expected`: it compiles, the given code fails and is
    kept, every concept of `expect` is there and nothing of its `exclude`; `missing` and `forbidden` say which. Where no
    prompt wants code none is compiled; else raises HostError without a compiler.
    """
    given = [_given(prompt) for prompt in prompts]
    compiled = any(wants_code(prompt) for prompt in prompts)
    found = [
        _own_blocks(text, [each.block for each in row]) if compiled else []
        for text, row in zip(texts, given, strict=True)
    ]
    flat = [each.block for row in given for each in row] + [block for blocks in found for block in blocks]
    verdicts = iter(judge_blocks(flat, seconds=seconds))
    fails = [[fulfils(next(verdicts), each.codes) for each in row] for row in given]
    alone = [[next(verdicts) for _ in blocks] for blocks in found]
    judged = _behind_others(found, alone, seconds)
    lost = [_lost(row, blocks) if compiled else [] for row, blocks in zip(given, found, strict=True)]
    states = [
        {"corrects": any(each.codes for each in row), "fails": as_stated, "dropped": gone}
        for row, as_stated, gone in zip(given, fails, lost, strict=True)
    ]
    return [
        _answer(prompt, text, list(zip(blocks, outcomes, strict=True)), stated)
        for prompt, text, blocks, outcomes, stated in zip(prompts, texts, found, judged, states, strict=True)
    ]


def wants_code(prompt: Mapping[str, Any]) -> bool:
    """Whether a prompt is about code: its own states what it does, or a right answer has some.

    As the schema has it: who states expectations wants code unless they say otherwise.
    """
    expect = prompt.get("expect") or {}
    return bool(prompt.get("code") or expect.get("code", bool(expect)))


def _given(prompt: Mapping[str, Any]) -> list[_Wanted]:
    """The blocks of a prompt's question of which it says what they do."""
    asked = len(fenced(prompt["instruction"]))
    return _wanted(Marked(prompt["instruction"], code=list(prompt.get("code") or ())[:asked] or [UNCHECKED] * asked))[0]


def _own_blocks(text: str, given: Sequence[Block]) -> list[Block]:
    """An answer's TypeScript without the question's: who explains a fault may show it again."""
    if len(text) > MAX_TEXT:
        return []
    quoted = {" ".join(block.code.split()) for block in given}
    return [block for block in typescript(fenced(text)) if " ".join(block.code.split()) not in quoted]


def _lost(given: Sequence[_Wanted], blocks: Sequence[Block]) -> list[str]:
    """What a correction dropped of the code that it was to correct."""
    return dropped([each.block.code for each in given if each.codes], [block.code for block in blocks])


def _behind_others(found: list[list[Block]], alone: list[list[Verdict]], seconds: float) -> list[list[Verdict]]:
    """The verdicts, with a second try for a block that only fails for want of what its answer showed before it."""
    again: list[tuple[int, int, Block]] = []
    for row, (blocks, verdicts) in enumerate(zip(found, alone, strict=True)):
        for place in range(1, len(blocks)):
            if verdicts[place].outcome == "type_error":
                before = "".join(
                    _ended(block.code)
                    for block, verdict in zip(blocks[:place], verdicts, strict=False)
                    if verdict.outcome in ("pass", "type_error")
                )
                again.append((row, place, replace(blocks[place], before=before)))
    judged = [list(verdicts) for verdicts in alone]
    if again:
        for (row, place, _), verdict in zip(
            again, judge_blocks([block for _, _, block in again], seconds=seconds), strict=True
        ):
            if verdict.outcome == "pass":
                judged[row][place] = verdict
    return judged


def _answer(
    prompt: Mapping[str, Any], text: str, blocks: Sequence[tuple[Block, Verdict]], given: Mapping[str, Any]
) -> dict[str, Any]:
    expect = prompt.get("expect") or {}
    outcomes = {verdict.outcome for _, verdict in blocks} or {"no_code" if len(text) <= MAX_TEXT else "judge_error"}
    outcome = next(name for name in WORST if name in outcomes)
    folded = fold(text)
    missing = [group for group in expect.get("include", ()) if not any(fold(name) in folded for name in group)]
    forbidden = [name for name in expect.get("exclude", ()) if fold(name) in folded]
    # Who is asked to correct code and only shows it again has corrected nothing.
    needs_none = not expect.get("code", bool(expect) or given["corrects"])
    compiles = outcome == "pass" or (needs_none and outcome == "no_code" and not blocks)
    given_fails = all(given["fails"]) if given["fails"] else None
    good_words = not missing and not forbidden
    return {
        "compiles": compiles,
        "outcome": outcome,
        "given_fails": given_fails,
        "expected": compiles and given_fails is not False and good_words and not given["dropped"],
        "dropped": given["dropped"],
        "missing": missing,
        "forbidden": forbidden,
        "blocks": [
            {
                "line": block.line,
                "outcome": verdict.outcome,
                "diagnostics": [asdict(each) for each in verdict.diagnostics[:5]],
            }
            for block, verdict in blocks
        ],
    }


def fold(text: str) -> str:
    """A text as words are looked for in it: without case, accents and kinds of blanks."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return " ".join("".join(sign for sign in plain if not unicodedata.combining(sign)).split())
