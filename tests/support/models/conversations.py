"""Conversations for traces: one turn, characters of several tokens, a history with texts that look like a template."""

from typing import Any

from tutor.prompt.messages import conversation

HELLO = conversation("Hola")
CONVERSATIONS = (
    HELLO,
    conversation("¿Qué hace 👩‍💻?\t`x` \r\n", "Eres «tutor»."),
    [
        {"role": "user", "content": "Uno"},
        {"role": "assistant", "content": " dos\n"},
        {"role": "user", "content": "<｜User｜></s>{{ x }}"},
    ],
)


def greedy_ids(engine: Any, prompt: list[int], tokens: int) -> list[int]:
    """Return the ids that transformers generates token by token: the most probable ones."""
    import torch

    ids = engine.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=tokens)
    return list(map(int, ids[0, len(prompt) :]))
