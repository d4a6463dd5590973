"""Every prompt with its answers side by side, and the filters of the page. Pure.

In: the entries of answers.json. Out: values for the template.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tutor.formats.markdown import fenced_blocks
from tutor.graders.labels import LABELS, verdict_labels
from tutor.prompt.messages import display_text, row_questions

Json = Mapping[str, Any]

LINE_END = re.compile(r"\r\n?|\n")
"""Line ends of Markdown."""


def prompts(answers: Sequence[Json], language: str = "") -> dict[str, Any]:
    """Return `items`, and the filters `kinds` and `verdicts`, each with its CSS class and the number of its prompts.

    `language` is the one in which the answers were graded.
    """
    kinds = sorted({str(item.get("category", "")) for item in answers})
    models = list(answers[0]["answers"]) if answers else []
    items = [_item(number, item, kinds) for number, item in enumerate(answers, 1)]
    counted = Counter(name for item in items for name in item["classes"])
    last = models[-1] if models else ""
    offered = {"pass": f"{last} passes", "fail": f"{last} fails"}
    if len(models) > 1:
        first = models[0]
        offered |= {"won": f"{last} passes, {first} fails", "lost": f"{first} passes, {last} fails"}
    labels = verdict_labels(language)
    offered |= {f"f-{name}": f"{last} fails: {label}" for name, label in labels.items() if counted[f"f-{name}"]}
    return {
        "items": items,
        "models": models,
        "kinds": [
            {"class": f"k{place}", "label": kind or "(no kind)", "count": counted[f"k{place}"]}
            for place, kind in enumerate(kinds)
        ],
        "verdicts": [{"class": name, "label": label, "count": counted[name]} for name, label in offered.items()],
    }


def _item(number: int, item: Json, kinds: Sequence[str]) -> dict[str, Any]:
    """One prompt. Its CSS classes contain no text of a row."""
    given = [_answer(name, record) for name, record in item["answers"].items()]
    kind = str(item.get("category", ""))
    classes = [f"k{kinds.index(kind)}"]
    if given:
        first, last = given[0], given[-1]
        classes.append("pass" if last["passed"] else "fail")
        if len(given) > 1 and first["passed"] != last["passed"]:
            classes.append("won" if last["passed"] else "lost")
        classes += [f"f-{name}" for name in last["failed"]]
    expect = item.get("expect") or {}
    return {
        "number": number,
        "classes": classes,
        "kind": kind,
        "topic": item.get("topic", ""),
        "question": item["instruction"],
        "history": [
            {"role": message["role"], "parts": parts(display_text(message["content"]))}
            for message in item.get("history") or ()
        ],
        "turns": len(row_questions(item)),
        "original": item.get("original", ""),
        "wanted": [" or ".join(group) for group in expect.get("include", ())],
        "unwanted": list(expect.get("exclude", ())),
        "reference": parts(str(item.get("reference", ""))),
        "answers": given,
    }


def _answer(name: str, record: Json) -> dict[str, Any]:
    verdicts = record.get("verdicts", {})
    copied = record.get("copied") or {}
    return {
        "model": name,
        "passed": bool(record.get("passed")),
        "thought": str(record.get("thought", "")).strip(),
        "parts": parts(display_text(str(record.get("text", "")))),
        "error": record.get("error", ""),
        "reasons": list(record.get("reasons", ())),
        "failed": [label for label in LABELS if verdicts.get(label) is False],
        "tokens": record.get("tokens"),
        "finish": record.get("finish", ""),
        "chrf": verdicts.get("chrf"),
        "copied": copied if copied.get("share", 0) >= 0.25 else None,
    }


def parts(text: str) -> list[dict[str, Any]]:
    """Split a text at its code fences, without loss; `code`: whether the part is a block with its fences."""
    lines = LINE_END.split(text)
    found: list[dict[str, Any]] = []
    start = 0
    for block in fenced_blocks(text):
        first = block.line - 2
        code_lines = block.code.removesuffix("\n").count("\n") + 1 if block.code else 0
        end = first + 1 + code_lines + block.closed
        found.append({"code": False, "text": "\n".join(lines[start:first]).strip("\n")})
        found.append({"code": True, "text": "\n".join(lines[first:end])})
        start = end
    found.append({"code": False, "text": "\n".join(lines[start:]).strip("\n")})
    return [part for part in found if part["text"]]
