"""One verdict an answer: does it have all that its question demands, and if not, why not.

In: prompts as the data stage wrote them, what an engine gave. Out: records, as answers.json holds them. Whatever an
answer is, it gets a verdict; a machine without the compiler that a prompt needs is the only error.

A record is the engine's answer (`text`, `finish`, `tokens`, ...) or `error`, why there is none, and then:
`passed`; `reasons`, why not, for a person; `verdicts`, each property alone; and, where any prompt says what it
expects, `code`, what the compiler said. Every prompt demands FORM; Spanish where the prompts are in Spanish; what
`expect` and `code` of the prompt say: that the code compiles, that given code fails as stated and is corrected with
its names kept, concepts that must be there and texts that must not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tutor.graders.code import MAX_TEXT, judge_answers
from tutor.graders.format import judge_format
from tutor.graders.language import is_spanish, prose

Record = dict[str, Any]
"""An answer as an engine gave it or `error`, later with its verdicts; JSON values."""

FORM = {
    "answered": "it is empty",
    "stopped": "it was cut at {tokens} tokens",
    "fences_closed": "a code fence stays open",
    "no_loop": "it repeats itself",
    "no_leak": "it shows template text, a thinking tag or a special token",
}
"""What every answer must be, and what is said of one that is not."""
CODE = ("compiles", "expected")
"""Verdicts on code and words, where prompts say what they expect."""

LABELS = {
    "passed": "all that was asked",
    "spanish": "in Spanish",
    "stopped": "stopped by itself",
    "answered": "not empty",
    "code_block": "with code",
    "fences_closed": "code fences closed",
    "no_loop": "without a loop",
    "no_leak": "no template text",
    "usual_length": "length as trained",
    "compiles": "code compiles",
    "expected": "as expected",
}
"""The yes-or-no verdicts as they are counted, and what people call them; yes is good."""


def judge(
    prompts: Sequence[Mapping[str, Any]], answers: Sequence[Record], lengths: tuple[int, int] | None = None
) -> list[Record]:
    """A record for each answer. `lengths`: characters of the shortest and the longest answer that was trained on.

    `usual_length` (half the one to twice the other) is a verdict and not a demand. All code takes one run of the
    compiler. Raises HostError when prompts expect code and the compiler is not installed.
    """
    spanish = in_spanish(prompts)
    given = [place for place, answer in enumerate(answers) if "error" not in answer]
    texts = [answers[place]["text"] for place in given]
    code: dict[int, dict[str, Any]] = {}
    if expects_something(prompts):
        code = dict(zip(given, judge_answers([prompts[place] for place in given], texts), strict=True))
    return [
        _judged(answer, code.get(place), lengths, spanish=spanish)
        if "error" not in answer
        else {**answer, "passed": False, "reasons": [f"no answer: {answer['error']}"]}
        for place, answer in enumerate(answers)
    ]


def in_spanish(prompts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a set asks in Spanish: half of it has Spanish's own signs (¿ ¡), or its prose as a whole is Spanish.

    Short questions alone tell the detector little: of the 120 of data/eval.jsonl it takes ten for other languages.
    """
    asked = [prose(prompt["instruction"]) for prompt in prompts]
    if 2 * sum("¿" in text or "¡" in text for text in asked) >= max(1, len(asked)):
        return True
    return is_spanish("\n\n".join(asked)[:MAX_TEXT])[0]


def expects_something(prompts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any prompt says what a right answer has, or what the code in its question does."""
    return any(prompt.get("expect") or prompt.get("code") for prompt in prompts)


def _judged(answer: Record, code: dict[str, Any] | None, lengths: tuple[int, int] | None, *, spanish: bool) -> Record:
    text = answer["text"][:MAX_TEXT]
    is_it, confidence = is_spanish(text)
    verdicts: dict[str, Any] = {**judge_format(text, answer["finish"]), "spanish": is_it}
    verdicts["spanish_confidence"] = confidence
    if lengths:
        verdicts["usual_length"] = lengths[0] / 2 <= verdicts["characters"] <= lengths[1] * 2
    reasons = [why.format(tokens=answer["tokens"]) for name, why in FORM.items() if not verdicts[name]]
    if spanish and not is_it:
        reasons.append(f"its prose is not Spanish (confidence {confidence:.2f})")
    if code is None:
        return {**answer, "verdicts": verdicts, "passed": not reasons, "reasons": reasons}
    reasons += _faults(code)
    verdicts |= {name: code[name] for name in CODE}
    rest = {name: value for name, value in code.items() if name not in CODE}
    return {**answer, "verdicts": verdicts, "code": rest, "passed": not reasons, "reasons": reasons}


def _faults(code: Mapping[str, Any]) -> list[str]:
    """What an answer's code and words lack, a line each."""
    reasons = []
    if not code["compiles"]:
        reasons.append(_why_it_does_not_compile(code))
    if code["given_fails"] is False:
        reasons.append("the question's own code does not fail as its row states: tutor data check")
    if code["dropped"]:
        reasons.append(f"the given code's {', '.join(code['dropped'])} is gone")
    reasons += [f"it lacks {' or '.join(group[:4])}{' …' * (len(group) > 4)}" for group in code["missing"]]
    reasons += [f"it has {name}" for name in code["forbidden"]]
    return reasons


def _why_it_does_not_compile(code: Mapping[str, Any]) -> str:
    if code["outcome"] == "no_code":
        return "it has no TypeScript of its own"
    outcome = code["outcome"].replace("_", " ")
    for block in code["blocks"]:
        if block["outcome"] == code["outcome"]:
            said: dict[str, Any] = {"code": "", "line": 0, "message": "", **next(iter(block["diagnostics"]), {})}
            where = block["line"] + max(0, said["line"] - 1)
            what = " ".join(part for part in (said["code"], said["message"]) if part)
            return f"its code in line {where}: {outcome}{f': {what[:200]}' if what else ''}"
    return f"its code: {outcome}"
