"""The prompt format of this project, defined once for training and for every engine.

    [system\\n\\n]Instrucción: {question}\\nRespuesta:     the prompt: no token carries loss
     {answer}<EOS>                                       the completion: every token carries loss

In: messages. Out: the prompt text, the completion, the Jinja template of the tokenizer, the Go template and stop
strings of Ollama. A later turn follows its predecessor after one blank line. The prompt ends without a blank: the model
itself produces ` {answer}`, so history is sent unchanged, blank included. No template here writes BOS text for
llama.cpp or Ollama: their tokenizers add BOS exactly where training had it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from tutor.prompt.format import SplitAnswer
from tutor.prompt.messages import Message, check_messages, trim

QUESTION = "Instrucción: "
CUE = "\nRespuesta:"
TURN_END = "\n\n"
STOPS = ("\nInstrucción:",)
"""Stop strings in addition to EOS: they end an answer that goes on with the next question."""

GO_TEMPLATE = (
    "{{ if .System }}{{ .System }}"
    + TURN_END
    + "{{ end }}"
    + QUESTION
    + "{{ .Prompt }}"
    + CUE
    + "{{ .Response }}"
    + TURN_END
)
"""Template of Ollama's legacy form: executed once a turn, and cut after `.Response` in the last turn (template.go)."""

JINJA_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- if message['content'] -%}{{- message['content'] + '\\n\\n' -}}{%- endif -%}"
    "{%- elif message['role'] == 'user' -%}{{- 'Instrucción: ' + message['content'] + '\\nRespuesta:' -}}"
    "{%- else -%}{{- message['content'] -}}{%- if not loop.last -%}{{- '\\n\\n' -}}{%- endif -%}"
    "{%- endif -%}{%- endfor -%}"
)
BOS_PREFIX = "{{- bos_token -}}"
"""Start of the Jinja template: apply_chat_template adds no BOS; llama.cpp strips it, and its tokenizer adds BOS."""


def chat_template(*, add_bos: bool) -> str:
    """Return the Jinja template, with BOS for a tokenizer that adds BOS to plain text."""
    return (BOS_PREFIX if add_bos else "") + JINJA_TEMPLATE


def render(messages: Sequence[Message]) -> str:
    """Return the exact prompt text, without BOS, of at most one system text and alternating user and assistant turns.

    A last assistant message is a prefill: the answer continues it. Raises ValueError as `check_messages`.
    """
    check_messages(messages)
    parts: list[str] = []
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "system":
            parts.append(content + TURN_END)
        elif message["role"] == "user":
            parts.append(QUESTION + content + CUE)
        else:
            parts.append(content + (TURN_END if index + 1 < len(messages) else ""))
    return "".join(parts)


def completion(answer: str) -> str:
    """Return the training target after the cue: one blank and the answer. EOS follows as an id, never as text."""
    return " " + trim(answer)


@dataclass(frozen=True)
class TutorFormat:
    """This project's format as a `PromptFormat`; its end of an answer is the tokenizer's EOS."""

    kind: ClassVar[Literal["tutor", "base"]] = "tutor"
    stops: ClassVar[tuple[str, ...]] = STOPS
    think: ClassVar[bool | None] = None
    tags: ClassVar[tuple[str, str]] = ("", "")
    end_id: ClassVar[int | None] = None
    go_template: ClassVar[str] = GO_TEMPLATE

    def chat_template(self, *, add_bos: bool) -> str:
        """Return the Jinja template of the merged tokenizer."""
        return chat_template(add_bos=add_bos)

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt text; raises ValueError as `check_messages`. An earlier answer has its leading blank."""
        return render(messages)

    def history(self, answer: Message) -> Message:
        """Return an answer with the blank before it, as the model generates it."""
        return {"role": answer["role"], "content": completion(answer["content"])}

    def completion(self, answer: Message) -> str:
        """Return one blank and the answer."""
        return completion(answer["content"])

    def reply(self, text: str) -> SplitAnswer:
        """Return the whole text as the answer: this format has no thoughts."""
        return SplitAnswer("", text)


TUTOR = TutorFormat()
"""The format itself, which has no state."""
