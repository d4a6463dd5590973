"""Folder of the parity stage, with the record of a file that answers like the fake Ollama."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tutor.artifacts.disk import write_json
from tutor.artifacts.manifest import require_stage
from tutor.artifacts.stage_folder import writing
from tutor.engines.trace import EOS_TEXT, Step, Trace
from tutor.pipeline.registry import BY_NAME
from tutor.prompt.tutor_format import TUTOR
from tutor.recipe.settings import Recipe
from tutor.stages.parity.compare import Observation
from tutor.stages.parity.conversations import make_conversations
from tutor.stages.parity.gate import HandOff
from tutor.stages.parity.record import to_record

PIECES = (" Una", " interfaz", " describe", " un", " objeto", ".")
"""Answer of the fake server to every question."""


def trace(pieces: Sequence[str] = PIECES, logprob: float = -0.1, prompt_tokens: int = 1) -> Trace:
    """Return the trace of an answer of these pieces, with a second candidate three nats below each."""
    steps = [Step(piece, logprob, ((piece, logprob), ("", logprob - 3.0))) for piece in pieces]
    return Trace((*steps, Step(EOS_TEXT, logprob, ((EOS_TEXT, logprob), (" y", logprob - 3.0)))), "eos", prompt_tokens)


def write_parity(recipe: Recipe, build: Path, refused: dict[str, str] | None = None, missing: str = "") -> Path:
    """Write the folder of a parity stage that found no difference, or that refused; return its path.

    `missing`: why transformers did not run.
    """
    folder = build / recipe.name
    fields = dict(BY_NAME["parity"].recipe_fields(recipe))
    fields["input.convert"] = require_stage(folder / "gguf", "convert").fingerprint
    conversations = make_conversations(
        [{"instruction": "¿Qué es any?", "response": "Lo que sea."}],
        recipe.system,
        lambda prompt: len(prompt.split()) < 200,
    )
    served = recipe.ollama.quantization
    seen = []
    for conversation in conversations:
        prompt = conversation.prompt(TUTOR)
        words = len(prompt.split())
        found = trace(prompt_tokens=words) if conversation.reach in ("everywhere", "served") else None
        seen.append(
            to_record(Observation(conversation.name, prompt, (1,) * words, words, None, found), candidates=True)
        )
    with writing(folder / "parity", "parity", fields) as (out, results):
        record = {
            "served": served,
            "steps": 16,
            "conversations": [asdict(conversation) for conversation in conversations],
        }
        write_json(out / "reference.json", {**record, "engines": {served: seen}})
        hand_offs = [HandOff("merge", "base + adapter", "merged", missing=missing).record()] if missing else []
        results.update({"hand_offs": hand_offs}, **({"refused": refused} if refused else {}))
    return folder / "parity"
