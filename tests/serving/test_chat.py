"""serving/chat.py: whole transcripts with a scripted engine, and the prompts that the engine received."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from support.models.chat_templates import FACTS, OPENS, SWITCH

from tutor.engines.protocol import Answer, Finish, Generation
from tutor.errors import ServiceError
from tutor.prompt.base_format import BaseFormat
from tutor.prompt.format import PromptFormat
from tutor.prompt.messages import Message
from tutor.prompt.template_analysis import analyse_template
from tutor.prompt.tutor_format import TUTOR
from tutor.serving.chat import HELP, PROMPT, Terminal, converse

GENERATION = Generation(max_new_tokens=50, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=1)
CTRL_C = KeyboardInterrupt()
CTRL_D = EOFError()


@dataclass
class Scripted:
    """Engine that answers with one script entry each, in pieces of three characters; raises exceptions in an entry."""

    script: list[list[str | BaseException]]
    finish: Finish = "stop"
    tokens: int = 5
    name: str = "scripted"
    prompt: PromptFormat = TUTOR
    prompts: list[str] = field(default_factory=list)

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        prompt = self.prompt.render(messages)  # raises for messages that cannot be rendered
        self.prompts.append(prompt)
        assert on_text is not None
        text = ""
        for part in self.script.pop(0):
            if isinstance(part, BaseException):
                raise part
            for start in range(0, len(part), 3):
                on_text(part[start : start + 3])
            text += part
        given = self.prompt.reply(text)
        return Answer(given.answer, self.finish, len(prompt), self.tokens, 1.0, 5.0, given.thought)


@dataclass
class Person:
    """User that types lines, or keys that raise an exception; keeps the screen and the notes."""

    lines: list[str | BaseException]
    screen: str = ""
    notes: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)

    def read(self, prompt: str) -> str:
        self.screen += prompt
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        self.screen += line + "\n"
        return line

    def write(self, piece: str) -> None:
        self.screen += piece

    @property
    def terminal(self) -> Terminal:
        return Terminal(self.read, self.write, self.notes.append, self.thoughts.append)


def run_chat(
    engine: Scripted, lines: list[str | BaseException], system: str = "", context: int | None = None
) -> Person:
    person = Person(lines)
    terminal, prompt = person.terminal, engine.prompt
    assert converse(engine, GENERATION, terminal, system=system, context=context, prompt=prompt) == 0
    assert not person.lines, "the chat ended early"
    return person


def test_answers_are_shown_trimmed_and_sent_back_unchanged() -> None:
    engine = Scripted([[" Una interfaz.\n\n", "Dos.\n"], [" Sí."]])
    person = run_chat(engine, ["¿Qué es?", "¿Seguro?", "/salir"])
    assert person.screen == (f"{PROMPT}¿Qué es?\nUna interfaz.\n\nDos.\n{PROMPT}¿Seguro?\nSí.\n{PROMPT}/salir\n")
    assert engine.prompts == [
        "Instrucción: ¿Qué es?\nRespuesta:",
        "Instrucción: ¿Qué es?\nRespuesta: Una interfaz.\n\nDos.\n\n\nInstrucción: ¿Seguro?\nRespuesta:",
    ]


def test_indentation_of_an_answer_is_shown() -> None:
    person = run_chat(Scripted([[" ", "  ", "  return x;\n", "}\n"], ["\n", "\n Sí."]]), ["x", "y", "/salir"])
    assert person.screen == f"{PROMPT}x\n    return x;\n}}\n{PROMPT}y\nSí.\n{PROMPT}/salir\n"


def test_system_text_opens_every_prompt() -> None:
    engine = Scripted([[" a"], [" b"]])
    run_chat(engine, ["x", "y", CTRL_D], system="Eres un tutor.")
    assert all(prompt.startswith("Eres un tutor.\n\nInstrucción: x") for prompt in engine.prompts)


def test_slash_commands_are_not_sent_to_the_engine() -> None:
    engine = Scripted([[" a"], [" b"]])
    person = run_chat(engine, ["x", "/nuevo", "/ayuda", "/nada", "y", "/salir"])
    assert engine.prompts[1] == "Instrucción: y\nRespuesta:"
    assert person.notes[:3] == [HELP, "Conversación nueva.", HELP]
    assert person.notes[3].startswith("No conozco /nada.")


def test_question_that_begins_with_a_slash_is_sent() -> None:
    engine = Scripted([[" a"]])
    run_chat(engine, ["/* ¿qué es esto? */", "/salir"])
    assert "/* ¿qué es esto? */" in engine.prompts[0]


def test_blank_lines_are_not_sent() -> None:
    engine = Scripted([])
    run_chat(engine, ["", "  \t", CTRL_D])
    assert engine.prompts == []


def test_ctrl_c_during_an_answer_keeps_the_partial_text() -> None:
    engine = Scripted([[" Una inter", CTRL_C], [" b"]])
    person = run_chat(engine, ["x", "y", "/salir"])
    assert "Una inter\n" in person.screen
    assert "Respuesta interrumpida." in person.notes
    assert engine.prompts[1] == "Instrucción: x\nRespuesta: Una inter\n\nInstrucción: y\nRespuesta:"


def test_ctrl_c_before_the_first_word_drops_the_question() -> None:
    engine = Scripted([[CTRL_C], [" b"]])
    run_chat(engine, ["x", "y", "/salir"])
    assert engine.prompts[1] == "Instrucción: y\nRespuesta:"


@pytest.mark.parametrize("nothing", ["", " ", "\n"])
def test_empty_answer_drops_its_question_with_a_note(nothing: str) -> None:
    engine = Scripted([[" a"], [nothing], [" c"]])
    person = run_chat(engine, ["x", "y", "z", "/salir"])
    assert engine.prompts[2] == "Instrucción: x\nRespuesta: a\n\nInstrucción: z\nRespuesta:"
    assert "no ha respondido nada" in person.notes[1]


def test_second_ctrl_c_at_the_prompt_ends_the_chat() -> None:
    engine = Scripted([[" a"]])
    person = run_chat(engine, [CTRL_C, "x", CTRL_C, "", CTRL_C, CTRL_C])
    assert len(engine.prompts) == 1
    assert person.notes.count("Otra vez Ctrl-C para salir.") == 3


def test_cut_answer_is_noted_outside_the_text() -> None:
    person = run_chat(Scripted([[" a"]], finish="length", tokens=50), ["x", "/salir"])
    assert person.notes[-1] == "Respuesta cortada a los 50 tokens (generate.max_new_tokens)."
    assert "cortada" not in person.screen


def test_oldest_turns_are_dropped_when_the_context_is_full() -> None:
    engine = Scripted([[" a"] for _ in range(4)])
    # The scripted engine counts characters as tokens: two exchanges and an answer fit, three do not.
    person = run_chat(engine, ["u", "v", "w", "x", "/salir"], context=50 + 75)
    assert engine.prompts[2].startswith("Instrucción: u")
    assert engine.prompts[3].startswith("Instrucción: w")
    assert len([note for note in person.notes if "olvido" in note]) == 1


def test_invalid_characters_from_the_terminal_are_replaced() -> None:
    engine = Scripted([[" a"]])
    run_chat(engine, ["¿qu\udce9?", "/salir"])
    engine.prompts[0].encode("utf-8")


def test_engine_error_ends_the_chat() -> None:
    with pytest.raises(ServiceError):
        run_chat(Scripted([[ServiceError("gone")]]), ["x"])


def with_thoughts(template: str) -> BaseFormat:
    return analyse_template(template, FACTS, where="base", reasoning="rows")


@pytest.mark.parametrize(
    ("template", "opening"), [(SWITCH, "<think>\n"), (OPENS, "")], ids=["the answer opens it", "the prompt opens it"]
)
def test_thought_is_shown_apart_and_the_history_is_the_formats(template: str, opening: str) -> None:
    prompt = with_thoughts(template)
    engine = Scripted(
        [[f"{opening}¿Es a <b\n", "o c?\n</think>\n\nUna `<i>`.\n"], [f"{opening}a\n</think>\n\nSí."]], prompt=prompt
    )
    person = run_chat(engine, ["¿Qué?", "¿Y?", "/salir"])
    assert person.screen == f"{PROMPT}¿Qué?\nUna `<i>`.\n{PROMPT}¿Y?\nSí.\n{PROMPT}/salir\n"
    assert "".join(person.thoughts) == "¿Es a <b\no c?" + "a"
    asked: list[Message] = [{"role": "user", "content": "¿Qué?"}, {"role": "user", "content": "¿Y?"}]
    answer = {"role": "assistant", "content": "Una `<i>`.", "reasoning": "¿Es a <b\no c?"}
    assert engine.prompts[1] == prompt.render([asked[0], answer, asked[1]])


def test_thought_without_an_end_is_noted_and_drops_its_question() -> None:
    engine = Scripted([["<think>\nEs"], ["Sí."]], finish="length", tokens=50, prompt=with_thoughts(SWITCH))
    person = run_chat(engine, ["¿Qué?", "¿Y?", "/salir"])
    assert "".join(person.thoughts) == "Es"
    assert person.notes[1] == "El razonamiento se ha cortado a los 50 tokens (generate.max_new_tokens)."
    assert "no queda en la conversación" in person.notes[2]
    assert "¿Qué?" not in engine.prompts[1]


def test_ctrl_c_in_a_thought_drops_the_question() -> None:
    engine = Scripted([["<think>\nEs", CTRL_C], ["Sí."]], prompt=with_thoughts(SWITCH))
    assert "Respuesta interrumpida." in run_chat(engine, ["¿Qué?", "¿Y?", "/salir"]).notes
    assert "¿Qué?" not in engine.prompts[1]
