"""A conversation at the terminal: read a question, stream the answer, keep both unchanged as history.

In: an engine, its sampling settings, a prompt format, a terminal. Out: the texts on that terminal, in Spanish like
those of the tutor; a thought apart from its answer. Independent of the engine; does not use stdin or stdout directly.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from tutor.engines.protocol import Answer, Engine, Generation
from tutor.prompt.format import AnswerText, PromptFormat, SplitAnswer
from tutor.prompt.messages import Message, display_start
from tutor.prompt.tutor_format import TUTOR

PROMPT = "tú> "
HELP = "/nuevo olvida la conversación · /salir (o Ctrl-D) termina · Ctrl-C interrumpe la respuesta"
COMMAND = re.compile(r"/[a-záéíóúñ]+")
CHARACTERS_PER_TOKEN = 2
"""Lower bound of characters per token in Spanish and code, for texts that no engine has counted yet."""


@dataclass(frozen=True)
class Terminal:
    """Input and outputs of a conversation."""

    read: Callable[[str], str]  # prints the prompt and returns a line, like input(); raises EOFError at the end
    write: Callable[[str], None]  # gets the pieces of an answer while it is generated
    note: Callable[[str], None]  # gets lines about the conversation (stderr)
    think: Callable[[str], None] = lambda _: None  # gets the pieces of a thought, before those of its answer
    end_thought: Callable[[], None] = lambda: None


def converse(
    engine: Engine,
    generation: Generation,
    terminal: Terminal,
    *,
    system: str,
    context: int | None = None,
    prompt: PromptFormat = TUTOR,
) -> int:
    """Run the conversation until /salir, the end of input or a second Ctrl-C at the prompt; return the exit code.

    `context` is the served context in tokens: before it is full, the oldest turns are dropped, with a note.
    Raises ServiceError when the engine fails.
    """
    turns: list[Message] = []
    used = 0  # number of tokens of the conversation, as the engine counted them
    terminal.note(HELP)
    while (question := _next_question(terminal)) is not None:
        if question == "/nuevo":
            turns, used = [], 0
            terminal.note("Conversación nueva.")
        elif COMMAND.fullmatch(question):
            terminal.note(HELP if question == "/ayuda" else f"No conozco {question}. {HELP}")
        else:
            used += len(question) // CHARACTERS_PER_TOKEN
            if context is not None and turns and used + generation.max_new_tokens > context:
                turns = _without_oldest(turns)
                terminal.note("La conversación ya no cabe en el contexto: olvido lo más antiguo.")
            asked: list[Message] = [*turns, {"role": "user", "content": question}]
            opening: list[Message] = [{"role": "system", "content": system}] if system else []
            given = ShownAnswer(prompt, terminal)
            answer = _answer(engine, generation, [*opening, *asked], given)
            if given.split.answer.strip():
                turns = [*asked, sent_back(prompt, given.split)]
            text = given.split.thought + given.split.answer
            used = answer.prompt_tokens + answer.tokens if answer else used + len(text) // CHARACTERS_PER_TOKEN
    return 0


def sent_back(prompt: PromptFormat, given: SplitAnswer) -> Message:
    """Return an answer as history: unchanged in the tutor's format, else as the base's template was trained."""
    message = {"role": "assistant", "content": given.answer, "reasoning": given.thought}
    return prompt.history(message) if prompt.kind == "base" else {"role": "assistant", "content": given.answer}


def _next_question(terminal: Terminal) -> str | None:
    """Return the next line that is not blank; None at the end of the conversation."""
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


class ShownAnswer:
    """Shows a text while it is generated: the thought, and the answer without the blanks around it."""

    def __init__(self, prompt: PromptFormat, terminal: Terminal) -> None:
        self.terminal = terminal
        self.split = SplitAnswer("", "")  # after `close`
        self._text = AnswerText(prompt, self._write, terminal.think)
        self._trimmed = _trimmed(terminal.write)

    def add(self, piece: str) -> None:
        """Show a piece of the generated text."""
        self._text.add(piece)

    def close(self) -> None:
        """End the text, whole or interrupted."""
        self.split = self._text.close()
        self.terminal.end_thought()
        self.terminal.write("\n")

    def _write(self, piece: str) -> None:
        self.terminal.end_thought()
        self._trimmed(piece)


def _answer(engine: Engine, generation: Generation, messages: list[Message], shown: ShownAnswer) -> Answer | None:
    """Show the answer and return the engine's record of it, which is None after Ctrl-C."""
    note = shown.terminal.note
    try:
        answer = engine.answer(messages, generation, shown.add)
    except KeyboardInterrupt:
        shown.close()
        note("Respuesta interrumpida.")
        return None
    shown.close()
    if not answer.text.strip():
        if answer.thought and answer.finish == "length":
            note(f"El razonamiento se ha cortado a los {answer.tokens} tokens (generate.max_new_tokens).")
        note("El modelo no ha respondido nada: la pregunta no queda en la conversación.")
    elif answer.finish == "length":
        note(f"Respuesta cortada a los {answer.tokens} tokens (generate.max_new_tokens).")
    return answer


def _trimmed(write: Callable[[str], None]) -> Callable[[str], None]:
    """Return a `write` that drops blanks before the first and after the last word of an answer."""
    pending: list[str] = []
    begun = False

    def write_trimmed(piece: str) -> None:
        nonlocal begun
        pending.append(piece)
        text = "".join(pending) if begun else display_start("".join(pending))
        whole = text.rstrip()
        if begun or whole:
            pending[:] = [text[len(whole) :]]
        if whole:
            begun = True
            write(whole)

    return write_trimmed


def _without_oldest(turns: list[Message]) -> list[Message]:
    """Return the newer half of a conversation, beginning with a question; empty for a single exchange."""
    exchanges = len(turns) // 2
    return turns[(exchanges + 1) // 2 * 2 :]
