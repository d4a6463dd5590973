"""Grade answers: whether each one meets every demand of its question, and the reasons if it does not.

In: prompts as the data stage wrote them, and an engine's answers. Out: records, the values of answers.json. Every
answer gets a verdict, whatever it contains; the only error is a missing compiler that a prompt needs. Does not count
or compare (stages/evaluate does).

A record is the engine's answer (`text`, `finish`, `tokens`, ...), or `error` with the reason why there is none, and:
`passed`; `reasons`, texts for people; `verdicts` by property; and `code`, the compiler's results, when any prompt
states an expectation. Verdicts are about the answer alone, without the model's `thought`. Every prompt demands the
properties in FORM_REASONS, and the language of the recipe when the prompts themselves are in it.
`expect` and `code` of a prompt demand that the code compiles, that given code fails as stated and is corrected with its
names kept, and which concepts must and which texts must not be in the answer. With a `reference` of its prompt an
answer also has scores among its verdicts, `chrf` and `chrf_other` (reference.py), which demand nothing; a reference
with code demands code, of any language, where the prompt states no expectation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tutor.formats.markdown import fenced_blocks
from tutor.graders.code import MAX_TEXT, grade_answers
from tutor.graders.format import grade_format
from tutor.graders.language import is_in_language, prose
from tutor.graders.reference import grade_references
from tutor.prompt.messages import row_questions
from tutor.recipe.values import ANY_LANGUAGE, LANGUAGES

Record = dict[str, Any]
"""An engine's answer or `error`; after grading also the verdicts. JSON values."""

FORM_REASONS = {
    "answered": "it is empty",
    "stopped": "it was cut at {tokens} tokens",
    "fences_closed": "a code fence stays open",
    "no_loop": "it repeats itself",
    "no_leak": "it shows template text, a thinking tag or a special token",
}
"""Properties of the form that every answer must have, with the reason of a failure."""
NO_ANSWER = "it is a thought without an answer"
"""Reason of a failure: the model ended within or behind its thought."""
NO_CODE = "it has no code, and its reference has some"
"""Reason of a failure, for prompts without an expectation of their own."""
CODE_VERDICTS = ("compiles", "expected")
"""Verdicts on code and words, for prompts that state an expectation."""


def grade(
    prompts: Sequence[Mapping[str, Any]],
    answers: Sequence[Record],
    lengths: tuple[int, int] | None = None,
    *,
    language: str = "es",
    kind: str = "tutor",
) -> list[Record]:
    """A record for each answer. `lengths`: minimum and maximum length of the training answers in characters.

    `usual_length` (half the minimum to twice the maximum) is a verdict and not a demand. `language` is that of the
    answers, or ANY_LANGUAGE: then it is not graded. `kind` is that of the prompt format. One run of the compiler takes
    all code. Raises HostError when prompts expect code and the compiler is not installed.
    """
    demanded = language if are_in_language(prompts, language) else ""
    given = [index for index, answer in enumerate(answers) if "error" not in answer]
    texts = [answers[index]["text"] for index in given]
    compared = _compare_with_references(prompts, answers)
    code: dict[int, dict[str, Any]] = {}
    if any_expectation(prompts):
        code = dict(zip(given, grade_answers([prompts[index] for index in given], texts), strict=True))
    records = []
    for index, answer in enumerate(answers):
        if "error" in answer:
            records.append({**answer, "passed": False, "reasons": [f"no answer: {answer['error']}"]})
            continue
        verdicts = {**_verdicts(answer, lengths, language, kind), **compared[index]}
        reasons = _text_reasons(answer, verdicts, demanded)
        if not verdicts.get("reference_code", True) and not prompts[index].get("expect"):
            reasons.append(NO_CODE)
        records.append(_record(answer, verdicts, reasons, code.get(index)))
    return records


def are_in_language(prompts: Sequence[Mapping[str, Any]], language: str) -> bool:
    """Whether prompts are in a language: their prose taken together is; in Spanish, or half of them have ¿ or ¡.

    A single short question is too little for the detector: it classifies ten of the 120 in data/eval.jsonl wrongly.
    """
    if language == ANY_LANGUAGE:
        return False
    questions = [prose("\n\n".join(row_questions(prompt)), language) for prompt in prompts]
    marked = sum("¿" in text or "¡" in text for text in questions)
    if language == "es" and 2 * marked >= max(1, len(questions)):
        return True
    return is_in_language("\n\n".join(questions)[:MAX_TEXT], language)[0]


def any_expectation(prompts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any prompt states an expectation of the answer or of the code in its question."""
    return any(prompt.get("expect") or prompt.get("code") for prompt in prompts)


def _verdicts(answer: Record, lengths: tuple[int, int] | None, language: str, kind: str) -> dict[str, Any]:
    text = answer["text"][:MAX_TEXT]
    verdicts: dict[str, Any] = {**grade_format(text, answer["finish"], kind)}
    if language != ANY_LANGUAGE:
        verdicts["language"], verdicts["language_confidence"] = is_in_language(text, language)
    if lengths:
        verdicts["usual_length"] = lengths[0] / 2 <= verdicts["characters"] <= lengths[1] * 2
    return verdicts


def _compare_with_references(prompts: Sequence[Mapping[str, Any]], answers: Sequence[Record]) -> list[dict[str, Any]]:
    """The verdicts that depend on references; `reference_code` for every answer, where any reference has code."""
    texts = [None if "error" in answer else answer["text"][:MAX_TEXT] for answer in answers]
    references = [prompt.get("reference", "") for prompt in prompts]
    overlaps = grade_references(texts, references)
    needed = [_has_code(reference) for reference in references]
    return [
        {**(overlap or {}), **({"reference_code": not need or _has_code(text or "")} if any(needed) else {})}
        for text, overlap, need in zip(texts, overlaps, needed, strict=True)
    ]


def _has_code(text: str) -> bool:
    return any(block.code.strip() for block in fenced_blocks(text))


def _text_reasons(answer: Record, verdicts: Mapping[str, Any], demanded: str) -> list[str]:
    """Reasons why the text of an answer fails, in the `demanded` language; a thought without an answer is one reason.

    `demanded` is "" where no language is.
    """
    tokens = answer["tokens"]
    if answer.get("thought") and not verdicts["answered"]:
        return [f"its thought has no end: cut at {tokens} tokens" if answer["finish"] == "length" else NO_ANSWER]
    reasons = [why.format(tokens=tokens) for name, why in FORM_REASONS.items() if not verdicts[name]]
    if demanded and not verdicts["language"]:
        confidence = verdicts["language_confidence"]
        reasons.append(f"its prose is not {LANGUAGES[demanded]} (confidence {confidence:.2f})")
    return reasons


def _record(
    answer: Record, verdicts: dict[str, Any], reasons: list[str], code: Mapping[str, Any] | None
) -> dict[str, Any]:
    if code is None:
        return {**answer, "verdicts": verdicts, "passed": not reasons, "reasons": reasons}
    reasons = [*reasons, *_code_reasons(code)]
    verdicts |= {name: code[name] for name in CODE_VERDICTS}
    rest = {name: value for name, value in code.items() if name not in CODE_VERDICTS}
    return {**answer, "verdicts": verdicts, "code": rest, "passed": not reasons, "reasons": reasons}


def _code_reasons(code: Mapping[str, Any]) -> list[str]:
    """Reasons why an answer's code and words fail."""
    reasons = []
    if not code["compiles"]:
        reasons.append(_compile_reason(code))
    if code["given_fails"] is False:
        reasons.append("the question's own code does not fail as its row states: tutor data check")
    if code["dropped"]:
        reasons.append(f"it lacks {', '.join(code['dropped'])} of the given code")
    reasons += [f"it lacks {' or '.join(group[:4])}{' …' * (len(group) > 4)}" for group in code["missing"]]
    reasons += [f"it has {name}" for name in code["forbidden"]]
    return reasons


def _compile_reason(code: Mapping[str, Any]) -> str:
    if code["outcome"] == "no_code":
        return "it has no TypeScript of its own"
    outcome = code["outcome"].replace("_", " ")
    for block in code["blocks"]:
        if block["outcome"] == code["outcome"]:
            first: dict[str, Any] = {"code": "", "line": 0, "message": "", **next(iter(block["diagnostics"]), {})}
            line = block["line"] + max(0, first["line"] - 1)
            message = " ".join(part for part in (first["code"], first["message"]) if part)
            return f"its code in line {line}: {outcome}{f': {message[:200]}' if message else ''}"
    return f"its code: {outcome}"
