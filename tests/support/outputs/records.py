"""Prompts and records with verdicts, as the graders return them."""

from typing import Any

from tutor.graders.labels import LABELS

PROMPTS = [
    {"instruction": f"¿{number}?", "category": "definicion" if number % 2 else "ejemplo"} for number in range(20)
]


def record(*, passed: bool = True, in_language: bool = True, tokens: int = 10, speed: float = 20.0) -> dict[str, Any]:
    verdicts = {**dict.fromkeys(LABELS, True), "language": in_language, "characters": 100}
    del verdicts["passed"], verdicts["compiles"], verdicts["expected"], verdicts["usual_length"]
    return {"text": " Sí.", "tokens": tokens, "tokens_per_second": speed, "verdicts": verdicts, "passed": passed}


FAILED = {"error": "timed out", "passed": False}
