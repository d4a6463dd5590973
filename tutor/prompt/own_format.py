"""The base as a person asks it: its own chat template as transformers and llama-server render it, unchanged.

In: the template, the special tokens that it names. Out: the prompt; a generated text split in thought and answer. Not
for training: base_format.py is the fixed variant that is trained and served. A base without a template is asked with
the plain text of the question.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tutor.prompt.base_format import TAGS
from tutor.prompt.fixed_template import DAY
from tutor.prompt.format import SplitAnswer
from tutor.prompt.jinja import NO_TOOLS, TemplateError, render_template
from tutor.prompt.messages import Message, check_messages, trim

QUESTION: Message = {"role": "user", "content": "¿Qué es una interfaz?"}
"""Question with which a template shows what it writes around one."""
ANSWER = "Un tipo con nombre."
"""Answer with which a template shows what it writes around one."""
SYSTEM = "Enseñas programación."
"""System text with which a template shows whether it has a place for one."""


@dataclass(frozen=True)
class OwnFormat:
    """A base's original template as a `PromptFormat`; a template that names the date has DAY, so that runs repeat."""

    template: str  # Jinja; "": the base has none
    tokens: Mapping[str, str]  # texts of special tokens by the template's variable: bos_token, eos_token, ...
    add_bos: bool  # the tokenizer puts BOS before plain text
    system: bool = False  # the template has a place for a system text
    opened: bool = False  # the prompt ends within a thought
    end_id: int | None = None  # None: the tokenizer's EOS

    kind: ClassVar[Literal["tutor", "base"]] = "base"
    stops: ClassVar[tuple[str, ...]] = ()
    tags: ClassVar[tuple[str, str]] = TAGS
    go_template: ClassVar[str] = ""

    @classmethod
    def from_template(
        cls, template: str, tokens: Mapping[str, str], added: Mapping[str, int], *, add_bos: bool
    ) -> "OwnFormat":
        """Return the format of a template; `added`: ids of added tokens by text. Raises ValueError as `render`."""
        plain = cls(template, dict(tokens), add_bos)
        if not template:
            return plain
        opened = plain.render([QUESTION]).rstrip().endswith(TAGS[0])
        return replace(plain, system=plain._has_system(), opened=opened, end_id=plain._end(added))

    @property
    def thinks(self) -> bool:
        """Whether the template knows thoughts."""
        return self.opened or all(tag in self.template for tag in TAGS)

    @property
    def think(self) -> bool | None:
        """Whether Ollama separates thoughts; None where it finds no tags in the template, and refuses the setting."""
        return True if all(tag in self.template for tag in TAGS) else None

    def chat_template(self, *, add_bos: bool) -> str:
        """Return the template itself."""
        del add_bos
        return self.template

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that the template writes, without a BOS that the tokenizer adds.

        A system text goes before the first question where the template has no place for one. Raises ValueError as
        `check_messages`, and for a conversation that the template refuses.
        """
        check_messages(messages)
        if not self.template:
            return "\n\n".join(message["content"] for message in messages)
        if messages[0]["role"] == "system" and not self.system:
            messages = _without_system(messages)
        try:
            text = self._render(messages)
        except TemplateError as error:
            raise ValueError(f"the base's chat template refuses this conversation: {error}") from None
        bos = self.tokens.get("bos_token", "")
        return text.removeprefix(bos) if self.add_bos else text

    def history(self, answer: Message) -> Message:
        """Return an earlier answer as an engine gets it back, without its thought."""
        return {"role": answer["role"], "content": trim(answer["content"])}

    def completion(self, answer: Message) -> str:
        """Return an answer without blanks around it; nothing is trained on it."""
        return trim(answer["content"])

    def reply(self, text: str) -> SplitAnswer:
        """Return a generated text as thought and answer; a thought without an end has no answer."""
        rest = text.lstrip()
        if not (self.opened or rest.startswith(TAGS[0])):
            return SplitAnswer("", text)
        thought, closed, answer = rest.removeprefix(TAGS[0]).partition(TAGS[1])
        return SplitAnswer(thought.strip(), answer.lstrip("\n") if closed else "")

    def _render(self, messages: Sequence[Message]) -> str:
        return render_template(
            self.template, messages, day=DAY, add_generation_prompt=True, **{**NO_TOOLS, **self.tokens}
        )

    def _has_system(self) -> bool:
        try:
            return SYSTEM in self._render([{"role": "system", "content": SYSTEM}, QUESTION])
        except TemplateError:
            return False

    def _end(self, added: Mapping[str, int]) -> int | None:
        """Return the id of the token with which the template ends an answer; None where it shows none."""
        conversation: list[Message] = [QUESTION, {"role": "assistant", "content": ANSWER}, QUESTION]
        try:
            after = self._render(conversation).partition(ANSWER)[2].lstrip()
        except TemplateError:
            return None
        found = max((text for text in added if text and after.startswith(text)), key=len, default=None)
        return None if found is None else added[found]


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """Return messages whose system text is the beginning of the first question."""
    system, first, *rest = messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]
