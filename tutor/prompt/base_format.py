"""The base's own chat template as a prompt format (the recipe's prompt = "base").

In: what the base stage found in the template (template_analysis.py). Out: the prompt as the template writes it, the
completion as the template continues it, a generated text split in thought and answer. The template is fixed
(fixed_template.py), so every engine that renders it writes the same prompt. Does not choose how the model thinks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from tutor.prompt.format import SplitAnswer
from tutor.prompt.jinja import NO_TOOLS, TemplateError, literal, render_template
from tutor.prompt.messages import Message, check_messages, trim

Reasoning = Literal["none", "empty", "rows"]
"""What stands between the tags of a thought: no tags, nothing, or the `reasoning` of the rows."""
TAGS = ("<think>", "</think>")
"""Texts around a thought: those that Ollama and llama.cpp look for in a template."""


@dataclass(frozen=True)
class BaseFormat:
    """A base's template as a `PromptFormat`; its fields are `prompt` of base.json."""

    template: str  # Jinja, fixed
    bos: str  # text; "" where the tokenizer has none
    add_bos: bool  # the tokenizer puts BOS before plain text
    writes_bos: bool  # the template does too
    end: str  # token that ends an answer
    end_id: int
    lead: str  # blanks that the template writes before an answer
    tail: str  # blanks that the template writes between an answer and its end
    system: bool  # the template has a place for a system text
    prefill: bool  # every engine continues an answer that was begun in the same way
    reasoning: Reasoning
    tags: tuple[str, str] = ("", "")  # of a thought, where the template knows them
    opening: str = ""  # what an answer writes before its thought; the prompt may have the tag already
    closing: str = ""  # what an answer writes behind its thought
    opened: bool = False  # the prompt ends within a thought

    kind: ClassVar[Literal["tutor", "base"]] = "base"
    stops: ClassVar[tuple[str, ...]] = ()
    go_template: ClassVar[str] = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "BaseFormat":
        """Return the format that `to_json` described. Raises TypeError for other fields."""
        return cls(**{**values, "tags": tuple(values["tags"])})

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "tags": list(self.tags)}

    @property
    def think(self) -> bool | None:
        """Whether Ollama separates thoughts; None where it finds no tags in the template, and refuses the setting."""
        if not all(tag in self.template for tag in TAGS):
            return None
        return self.reasoning == "rows"

    def chat_template(self, *, add_bos: bool) -> str:
        """Return the template; with BOS at its start for a tokenizer that adds it where the base's wrote none."""
        if not add_bos or self.writes_bos or not self.bos:
            return self.template
        return "{{- %s }}%s" % (literal(self.bos), self.template)  # noqa: UP031

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that the template writes, without a BOS that the tokenizer adds.

        A last assistant message is a prefill: it follows the prompt. Raises ValueError as `check_messages`, and for a
        system text or a prefill where the template has no place for one.
        """
        check_messages(messages)
        if messages[0]["role"] == "system" and not self.system:
            raise ValueError("the base's chat template has no place for a system text")
        *before, last = messages
        prefill = ""
        if last["role"] == "assistant":
            if not self.prefill:
                raise ValueError("engines continue an answer under the base's chat template in different ways")
            messages, prefill = before, last["content"]
        try:
            text = render_template(self.template, messages, add_generation_prompt=True, **NO_TOOLS)
        except TemplateError as error:
            raise ValueError(f"the base's chat template refuses this conversation: {error}") from None
        return (text.removeprefix(self.bos) if self.add_bos else text) + prefill

    def history(self, answer: Message) -> Message:
        """Return an earlier answer as an engine gets it back, without its thought: Ollama sends none to a template."""
        return {"role": answer["role"], "content": trim(answer["content"])}

    def completion(self, answer: Message) -> str:
        """Return what the model writes up to the end-of-turn token: the thought where supervised, and the answer.

        An answer without a thought has an empty one, as the base's template writes it.
        """
        return self._thought(answer) + self.lead + trim(answer["content"]) + self.tail

    def _thought(self, answer: Message) -> str:
        if self.reasoning != "rows":
            return ""
        return self.opening + answer.get("reasoning", "").strip() + self.closing

    def reply(self, text: str) -> SplitAnswer:
        """Return a generated text as thought and answer; a thought without an end has no answer."""
        first, last = self.tags
        rest = text.lstrip()
        opens = bool(first) and rest.startswith(first)
        if not (opens or self.opened):
            return SplitAnswer("", self._answer(text))
        thought, closed, answer = rest.removeprefix(first).partition(last)
        if not closed:
            return SplitAnswer(thought.strip(), "")
        return SplitAnswer(thought.strip(), self._answer(answer.lstrip("\n")))

    def _answer(self, text: str) -> str:
        return text.removeprefix(self.lead).removesuffix(self.tail)
