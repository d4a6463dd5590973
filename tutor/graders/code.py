"""Compile fenced code blocks and compare the result with what is stated for each block.

In: Markdown texts and, for each fenced block, what it must do. Out: problems in a data set's rows; verdicts on a
model's answers, as JSON values. One run of the compiler for all blocks. Does not grade prose, apart from the words
that must or must not be in an answer.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tutor.formats.markdown import TYPESCRIPT, Block, fenced_blocks, typescript_blocks
from tutor.graders.identifiers import dropped_names
from tutor.graders.typescript.compiler import MAX_SECONDS, Verdict, grade_blocks

UNCHECKED = "-"
"""Specification of a block that is not compiled."""
_SPEC = re.compile(r"(?P<codes>ok|TS\d+(?:,\s*TS\d+)*)(?P<needs>(?:\s+\+\d+)*)")
MAX_TEXT = 2**20
"""Maximum length of an answer in characters; a longer one is not graded."""
WORST_FIRST = ("grader_error", "timeout", "suppressed", "syntax_error", "type_error", "no_code", "pass")
"""Outcomes of blocks, the worst first: the worst one is the outcome of the answer."""


@dataclass(frozen=True, slots=True)
class CodeRow:
    """A row's two texts and a specification for each fenced block in them, those of the question first.

    "ok": the block compiles; "TS2322,TS2345": it fails with exactly these codes; "ok +1": it compiles after block 1;
    "-": it is not compiled. Without `code` every TypeScript block must compile. In a conversation the texts are the
    last question and answer, and a block compiles alone or after the code of the `earlier` answers.
    """

    question: str
    answer: str = ""
    code: Sequence[str] = ()
    line: int = 0
    earlier: str = ""


@dataclass(frozen=True)
class CodeReport:
    """Numbers of a data set's blocks by result; a problem is a row's line and a message."""

    compiled: int
    failed_as_stated: int
    unchecked: int
    problems: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class _Expected:
    """A block, its position in words, and the codes with which it must fail (none: it must compile)."""

    block: Block
    position: str
    codes: frozenset[str]
    earlier: str = ""  # code of earlier answers


def check_rows(rows: Iterable[CodeRow], *, seconds: float = MAX_SECONDS) -> CodeReport:
    """Compile every block of the rows and compare with its specification. Raises HostError without a compiler."""
    problems: list[tuple[int, str]] = []
    expected: list[tuple[int, _Expected]] = []
    unchecked = 0
    for row in rows:
        try:
            found, left_out = _expectations(row)
        except ValueError as error:
            problems.append((row.line, str(error)))
            continue
        expected += [(row.line, each) for each in found]
        unchecked += left_out
    verdicts = _grade_after_earlier([each for _, each in expected], seconds)
    compiled = failed = 0
    for (line, each), verdict in zip(expected, verdicts, strict=True):
        if meets_spec(verdict, each.codes):
            failed += bool(each.codes)
            compiled += not each.codes
        else:
            problems.append((line, f"{each.position} {_difference(verdict, each.codes)}"))
    return CodeReport(compiled, failed, unchecked, tuple(sorted(problems)))


def _grade_after_earlier(expected: Sequence[_Expected], seconds: float) -> list[Verdict]:
    """The verdicts on blocks; one that must compile and has type errors is tried after the code of earlier answers."""
    verdicts = list(grade_blocks([each.block for each in expected], seconds=seconds))
    again = [
        place
        for place, (each, verdict) in enumerate(zip(expected, verdicts, strict=True))
        if each.earlier and not each.codes and verdict.outcome == "type_error"
    ]
    tried = [(expected[place].block, expected[place].earlier) for place in again]
    repeated = grade_blocks([replace(one, before=code + one.before) for one, code in tried], seconds=seconds)
    for place, verdict in zip(again, repeated, strict=True):
        if verdict.outcome == "pass":
            verdicts[place] = verdict
    return verdicts


def earlier_code(history: Iterable[Mapping[str, str]]) -> str:
    """Return the TypeScript of the earlier answers of a conversation."""
    texts = (message["content"] for message in history if message["role"] == "assistant")
    return "".join(_with_newline(block.code) for text in texts for block in typescript_blocks(fenced_blocks(text)))


def _expectations(row: CodeRow) -> tuple[list[_Expected], int]:
    """The row's blocks to compile, and the number of others. Raises ValueError when `code` is wrong."""
    given = [replace(block, quoted=True) for block in fenced_blocks(row.question)]
    blocks = [*given, *fenced_blocks(row.answer)]
    specs = row.code or ["ok" if block.language in TYPESCRIPT else UNCHECKED for block in blocks]
    if len(specs) > len(blocks):
        raise ValueError(f"code has {len(specs)} entries for {len(blocks)} fenced blocks")
    found = []
    for number, (spec, block) in enumerate(zip(specs, blocks, strict=False), 1):
        if spec.strip() == UNCHECKED:
            continue
        codes, needs = parse_spec(spec)
        if bad := [need for need in needs if not 0 < need <= len(blocks) or need == number]:
            raise ValueError(f"code {number} is {spec!r}: there is no other block {bad[0]}")
        before = "".join(_with_newline(blocks[need - 1].code) for need in needs)
        side = "question" if block.quoted else "answer"
        position = f"block {number} ({side}, line {block.line})"
        found.append(_Expected(replace(block, before=before), position, codes, row.earlier))
    return found, len(blocks) - len(found)


def parse_spec(spec: str) -> tuple[frozenset[str], list[int]]:
    """The codes of a specification (none: "ok") and the numbers of the blocks to put before. Raises ValueError."""
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise ValueError(f"code {spec[:40]!r} is not of the kind ok, TS2322, TS2322,TS2345, ok +1 or {UNCHECKED}")
    codes = () if match["codes"] == "ok" else re.split(r",\s*", match["codes"])
    return frozenset(codes), [int(number) for number in re.findall(r"\+(\d+)", match["needs"])]


def meets_spec(verdict: Verdict, codes: frozenset[str]) -> bool:
    """Whether a block meets its specification: it compiled, or it failed with exactly these codes."""
    if not codes:
        return verdict.outcome == "pass"
    return verdict.outcome in ("type_error", "syntax_error") and verdict.codes == codes


def _with_newline(code: str) -> str:
    return code if code.endswith("\n") or not code else f"{code}\n"


def _difference(verdict: Verdict, codes: frozenset[str]) -> str:
    expected = f"must fail with {', '.join(sorted(codes))}" if codes else "must compile"
    messages = "; ".join(
        f"{each.code or verdict.outcome} in line {each.line}: {each.message}" for each in verdict.diagnostics[:3]
    )
    return f"{expected}, but: {messages or ('it compiles' if verdict.outcome == 'pass' else verdict.outcome)}"


def grade_answers(
    prompts: Sequence[Mapping[str, Any]], texts: Sequence[str], *, seconds: float = MAX_SECONDS
) -> list[dict[str, Any]]:
    """Grade the code and the words of each prompt's answer; JSON values.

    `compiles`: all TypeScript blocks of the answer compile, alone or after the blocks before them in this answer and
    the conversation's earlier ones, and at least one exists if `expect` requires code or the question's code must fail.
    Code quoted unchanged from the question is left out.
    `given_fails`: the question's code fails as the prompt states (None: nothing is stated). `dropped`: names of the
    failing code that the answer's code lacks (identifiers.py). `missing`, `forbidden`: concepts of `expect.include`
    that the answer lacks, texts of `expect.exclude` that it has. `expected`: it compiles, `given_fails` is not False,
    and the three lists are empty.
    Compiles nothing when no prompt requires code. Raises HostError when one does and the compiler is not installed.
    """
    given = [_given(prompt) for prompt in prompts]
    use_compiler = any(wants_code(prompt) for prompt in prompts)
    found = [
        _own_blocks(text, [each.block for each in row]) if use_compiler else []
        for text, row in zip(texts, given, strict=True)
    ]
    flat = [each.block for row in given for each in row] + [block for blocks in found for block in blocks]
    verdicts = iter(grade_blocks(flat, seconds=seconds))
    fails = [[meets_spec(next(verdicts), each.codes) for each in row] for row in given]
    alone = [[next(verdicts) for _ in blocks] for blocks in found]
    earlier = [earlier_code(prompt.get("history") or ()) for prompt in prompts]
    graded = _retry_after_others(found, alone, earlier, seconds)
    dropped = [_dropped(row, blocks) if use_compiler else [] for row, blocks in zip(given, found, strict=True)]
    states = [
        {"corrects": any(each.codes for each in row), "fails": as_stated, "dropped": names}
        for row, as_stated, names in zip(given, fails, dropped, strict=True)
    ]
    return [
        _record(prompt, text, list(zip(blocks, outcomes, strict=True)), stated)
        for prompt, text, blocks, outcomes, stated in zip(prompts, texts, found, graded, states, strict=True)
    ]


def wants_code(prompt: Mapping[str, Any]) -> bool:
    """Whether a prompt is about code: a specification of its own code, or an expectation that includes code.

    As in the schema, `expect` requires code except where its `code` is false.
    """
    expect = prompt.get("expect") or {}
    return bool(prompt.get("code") or expect.get("code", bool(expect)))


def _given(prompt: Mapping[str, Any]) -> list[_Expected]:
    """The blocks of a prompt's question that have a specification."""
    number = len(fenced_blocks(prompt["instruction"]))
    code = list(prompt.get("code") or ())[:number] or [UNCHECKED] * number
    return _expectations(CodeRow(prompt["instruction"], code=code))[0]


def _own_blocks(text: str, given: Sequence[Block]) -> list[Block]:
    """The TypeScript blocks of an answer, without those quoted from the question: an explanation may repeat them."""
    if len(text) > MAX_TEXT:
        return []
    quoted = {" ".join(block.code.split()) for block in given}
    return [block for block in typescript_blocks(fenced_blocks(text)) if " ".join(block.code.split()) not in quoted]


def _dropped(given: Sequence[_Expected], blocks: Sequence[Block]) -> list[str]:
    """Names in the code to correct that the correction lacks."""
    return dropped_names([each.block.code for each in given if each.codes], [block.code for block in blocks])


def _retry_after_others(
    found: list[list[Block]], alone: list[list[Verdict]], earlier: Sequence[str], seconds: float
) -> list[list[Verdict]]:
    """The verdicts after a second run for blocks with type errors, each after the blocks before it.

    `earlier`: the code of the earlier answers of each conversation.
    """
    again: list[tuple[int, int, Block]] = []
    for row, (blocks, verdicts) in enumerate(zip(found, alone, strict=True)):
        for position in range(0 if earlier[row] else 1, len(blocks)):
            if verdicts[position].outcome == "type_error":
                before = earlier[row] + "".join(
                    _with_newline(block.code)
                    for block, verdict in zip(blocks[:position], verdicts, strict=False)
                    if verdict.outcome in ("pass", "type_error")
                )
                again.append((row, position, replace(blocks[position], before=before)))
    graded = [list(verdicts) for verdicts in alone]
    repeated = grade_blocks([block for _, _, block in again], seconds=seconds)
    for (row, position, _), verdict in zip(again, repeated, strict=True):
        if verdict.outcome == "pass":
            graded[row][position] = verdict
    return graded


def _record(
    prompt: Mapping[str, Any], text: str, blocks: Sequence[tuple[Block, Verdict]], given: Mapping[str, Any]
) -> dict[str, Any]:
    expect = prompt.get("expect") or {}
    outcomes = {verdict.outcome for _, verdict in blocks} or {"no_code" if len(text) <= MAX_TEXT else "grader_error"}
    outcome = next(name for name in WORST_FIRST if name in outcomes)
    folded = fold_text(text)
    missing = [group for group in expect.get("include", ()) if not any(fold_text(name) in folded for name in group)]
    forbidden = [name for name in expect.get("exclude", ()) if fold_text(name) in folded]
    # A correction that only repeats the given code corrects nothing.
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


def fold_text(text: str) -> str:
    """A text for the search of words: lower case, no accents, single blanks."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return " ".join("".join(character for character in plain if not unicodedata.combining(character)).split())
