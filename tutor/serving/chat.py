"""The conversation at the terminal: read a question, stream the answer, remember both as they came.

In: an engine, what it is asked with, and a terminal's three ends. Its texts are Spanish, as the tutor's are.
Does not know which engine answers, and does not touch stdin or stdout itself.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from tutor.engines.protocol import Answer, Engine, Generation
from tutor.prompt import Message

PROMPT = "tú> "
HELP = "/nuevo olvida la conversación · /salir (o Ctrl-D) termina · Ctrl-C interrumpe la respuesta"
COMMAND = re.compile(r"/[a-záéíóúñ]+")
CHARACTERS = 2
"""A token has about so many at least, in Spanish and code: for texts that no engine has counted yet."""


@dataclass(frozen=True)
class Terminal:
    """Where a conversation takes place."""

    read: Callable[[str], str]  # shows the prompt, gives a line; EOFError at its end, as input() does
    write: Callable[[str], None]  # pieces of answers, as they come
    note: Callable[[str], None]  # a line about the conversation; not part of it (stderr)


def converse(
    engine: Engine, generation: Generation, terminal: Terminal, *, system: str, context: int | None = None
) -> int:
    """Talk until /salir, the end of input or a second Ctrl-C at the prompt; the exit code.

    `context` is the served context in tokens: before it is full the oldest turns are forgotten, with a note.
    Raises ServiceError when the engine fails.
    """
    turns: list[Message] = []
    used = 0  # tokens of the conversation so far, as the engine counted them
    terminal.note(HELP)
    while (question := _next_question(terminal)) is not None:
        if question == "/nuevo":
            turns, used = [], 0
            terminal.note("Conversación nueva.")
        elif COMMAND.fullmatch(question):
            terminal.note(HELP if question == "/ayuda" else f"No conozco {question}. {HELP}")
        else:
            used += len(question) // CHARACTERS
            if context is not None and turns and used + generation.max_new_tokens > context:
                turns = _without_oldest(turns)
                terminal.note("La conversación ya no cabe en el contexto: olvido lo más antiguo.")
            asked: list[Message] = [*turns, {"role": "user", "content": question}]
            opening: list[Message] = [{"role": "system", "content": system}] if system else []
            text, answer = _answer(engine, generation, [*opening, *asked], terminal)
            if text.strip():
                turns = [*asked, {"role": "assistant", "content": text}]
            used = answer.prompt_tokens + answer.tokens if answer else used + len(text) // CHARACTERS
    return 0


def _next_question(terminal: Terminal) -> str | None:
    """The next line that is not blank; None when the person leaves."""
    interrupted = False
    while True:
        try:
            line = terminal.read(PROMPT).encode("utf-8", "replace").decode("utf-8").strip()
        except EOFError:
            terminal.write("\n")
            return None
        except KeyboardInterrupt:
            terminal.write("\n")
            if interrupted:
                return None
            interrupted = True
            terminal.note("Otra vez Ctrl-C para salir.")
            continue
        if line == "/salir":
            return None
        if line:
            return line
        interrupted = False


def _answer(
    engine: Engine, generation: Generation, messages: list[Message], terminal: Terminal
) -> tuple[str, Answer | None]:
    """The answer's text as it came, and the engine's record of it; None where Ctrl-C cut it short."""
    pieces: list[str] = []
    show = _shower(terminal.write)

    def hear(piece: str) -> None:
        pieces.append(piece)
        show(piece)

    answer = None
    try:
        answer = engine.answer(messages, generation, hear)
    except KeyboardInterrupt:
        terminal.write("\n")
        terminal.note("Respuesta interrumpida.")
        return "".join(pieces), None
    terminal.write("\n")
    if not answer.text.strip():
        terminal.note("El modelo no ha respondido nada: la pregunta no queda en la conversación.")
    elif answer.finish == "length":
        terminal.note(f"Respuesta cortada a los {answer.tokens} tokens (generate.max_new_tokens).")
    return answer.text, answer


def _shower(write: Callable[[str], None]) -> Callable[[str], None]:
    """A `write` that leaves out blanks before the first and after the last word of an answer."""
    pending: list[str] = []
    begun = False

    def show(piece: str) -> None:
        nonlocal begun
        pending.append(piece)
        text = "".join(pending) if begun else "".join(pending).lstrip()
        whole = text.rstrip()
        pending[:] = [text[len(whole) :]] if begun or whole else []
        if whole:
            begun = True
            write(whole)

    return show


def _without_oldest(turns: list[Message]) -> list[Message]:
    """The newer half of a conversation, from a question on; of a single exchange nothing."""
    exchanges = len(turns) // 2
    return turns[(exchanges + 1) // 2 * 2 :]
