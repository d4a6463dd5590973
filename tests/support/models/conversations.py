"""Conversations for traces: one turn, characters of several tokens, a history with texts that look like a template."""

from tutor.prompt import conversation

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
