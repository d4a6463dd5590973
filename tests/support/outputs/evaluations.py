"""Prompts, and folders with the answers of an evaluation."""

import json
from pathlib import Path
from typing import Any

PROMPTS = [
    {"instruction": f"¿Qué es el tipo {name} en TypeScript?", "category": "ab"[number % 2], "code": [], "expect": {}}
    for number, name in enumerate(("any", "never", "void", "unknown", "object", "symbol", "bigint", "null"))
]


def write_evaluation(folder: Path, passed: list[bool], prompts: list[dict[str, Any]], **others: Any) -> Path:
    """Write a build folder with the answers of an evaluation; return its path."""
    rows = [
        {
            **prompt,
            "answers": {
                "tutor": {"text": " Sí.", "verdicts": {"language": good}, "passed": good, "reasons": []},
                **others,
            },
        }
        for prompt, good in zip(prompts, passed, strict=True)
    ]
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / "answers.json").write_text(json.dumps(rows), "utf-8")
    return folder
