"""A model of an Ollama server as an `Engine`.

In: a model's name, its prompt format, conversations. Out: streamed answers, thought and answer apart. Sends the
unchanged history and names every sampler. Cuts an answer at a stop text itself, because Ollama does not return whether
one of them or the end-of-sequence token ended it. Does not set the context or other load-time settings, because another
value would load the model again. Truncates nothing: a prompt that is too long is an error.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tutor.engines.ollama.answers import ChatEvent, ChatMessage
from tutor.engines.ollama.client import Ollama, connect
from tutor.engines.ollama.protocol import LOOP_ERROR, MissingError, parse_parameters
from tutor.engines.protocol import Answer, Finish, Generation
from tutor.engines.stop_texts import find_stop
from tutor.errors import ServiceError
from tutor.prompt.format import PromptFormat, withheld
from tutor.prompt.messages import Message
from tutor.prompt.tutor_format import TUTOR

logger = logging.getLogger(__name__)

REPEATED_PIECES = 30
"""Number of equal pieces after which Ollama ends an answer without its last event (llm/llama_server.go)."""
FINISHES: dict[str, Finish] = {"stop": "eos", "length": "length"}
"""Finish reasons by Ollama's `done_reason`, for a request without stop texts: it is "stop" after one of them, too."""


@contextlib.contextmanager
def serve(
    model: str, host: str | None = None, prompt: PromptFormat = TUTOR, *, raw: bool = False
) -> Iterator["OllamaServer"]:
    """A published model as an engine. Raises ServiceError when there is no server or no such model."""
    with connect(host) as server:
        yield OllamaServer(server, model, prompt, raw=raw)


class OllamaServer:
    """An `Engine`: one model of an Ollama server. The constructor reads the model's description from the server.

    `raw`: the prompts are rendered here, whatever template the model has on the server.
    """

    name = "ollama"

    def __init__(self, server: Ollama, model: str, prompt: PromptFormat = TUTOR, *, raw: bool = False) -> None:
        description = server.show(model)
        if description is None:
            hint = "publish it: tutor publish; list the models: tutor models"
            raise MissingError(f"Ollama at {server.host} has no model {model}", hint)
        self._server = server
        self._model = model
        self._prompt = prompt
        self._raw = raw
        # Refused with 400 for a model without the capability, and true by default for one with it.
        self._think = {"think": bool(prompt.think)} if thinks(description) else {}
        self.context = served_context(server.host, description)

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """The answer to the last message. Raises ServiceError when the server fails or ends without its last event.

        Raises ValueError for a conversation that Ollama would render otherwise than the format.
        """
        started = time.monotonic()
        written = Generated(self._prompt.tags, generation.stops, on_text)
        end: ChatEvent | None = None
        # Leaving this block in any way closes the connection, which ends the generation too.
        with contextlib.closing(self._events(messages, generation)) as events:
            for event in events:
                written.add(event.message)
                end = event if event.done else end
                if written.stopped:
                    break
        written.close()
        seconds = time.monotonic() - started
        finish = "stop" if written.stopped else FINISHES.get(end.done_reason) if end else None
        if finish is None:
            raise ServiceError(f"Ollama: {_why_unfinished(written.pieces, end)}", "the answer is incomplete; ask again")
        if end is None:  # cut here: the counts of the last event are missing
            prompt, tokens, speed = self._prompt_tokens(messages, generation), len(written.pieces), written.speed
        else:
            prompt, tokens = end.prompt_eval_count, end.eval_count
            # Durations are in nanoseconds, and left out when zero.
            speed = tokens / end.eval_duration * 1e9 if end.eval_duration else 0.0
        if self.context and prompt + tokens > self.context:
            logger.warning(
                "the context of %d tokens was full: the beginning of the conversation was lost", self.context
            )
        reply = self._prompt.reply(written.text)
        return Answer(
            text=reply.answer,
            finish=finish,
            prompt_tokens=prompt,
            tokens=tokens - (finish == "eos"),
            seconds=seconds,
            tokens_per_second=speed,
            thought=reply.thought,
        )

    def _prompt_tokens(self, messages: Sequence[Message], generation: Generation) -> int:
        """Return the number of a prompt's tokens, from an answer of one token; the server has the prompt cached."""
        with contextlib.closing(self._events(messages, replace(generation, max_new_tokens=1))) as events:
            return max(event.prompt_eval_count for event in events)

    def _events(self, messages: Sequence[Message], generation: Generation) -> Generator[ChatEvent, None, None]:
        """The events of an answer to messages, or to the prompt that the format makes of them."""
        body = self._request(generation)
        if not self._raw:
            return self._server.chat({**body, "messages": sent_messages(messages, self._prompt), **self._think})
        # Without `think` the server would take the thought out of the text where it knows the model's tags.
        return self._completed({**body, "prompt": self._prompt.render(messages), "raw": True, "think": False})

    def _completed(self, body: Mapping[str, Any]) -> Generator[ChatEvent, None, None]:
        with contextlib.closing(self._server.complete(body)) as events:
            for event in events:
                message = ChatMessage(content=event.response)
                yield ChatEvent(message=message, **event.model_dump(exclude={"response"}))

    def _request(self, generation: Generation) -> dict[str, Any]:
        options: dict[str, Any] = {
            "num_predict": generation.max_new_tokens,  # above 0: Ollama reads 0 as no limit
            "temperature": generation.temperature,
            "top_p": generation.top_p,
            "top_k": generation.top_k,
            "repeat_penalty": generation.repetition_penalty,
            "seed": generation.seed,
            "stop": [],  # in place of the Modelfile's: `answer` cuts
        }
        if self.context:
            # The penalty of transformers covers the full sequence; Ollama's default is 64 tokens.
            options["repeat_last_n"] = self.context
        # With Ollama's default of `truncate` old turns, or the middle of a long one, would be dropped silently.
        return {"model": self._model, "stream": True, "truncate": False, "options": options}


class Generated:
    """The text that the model generates, up to a stop text: Ollama sends a thought apart, and without its tags.

    With a format without thoughts, those of a model that is not ours are left out. `on_text` receives the text in
    pieces, and no part of a stop text.
    """

    def __init__(
        self, tags: tuple[str, str], stops: Sequence[str] = (), on_text: Callable[[str], None] | None = None
    ) -> None:
        self.text = ""
        self.pieces: list[str] = []
        self.stopped = False  # by a stop text
        self._opening, self._closing = tags
        self._in_thought = False
        self._stops, self._on_text = stops, on_text
        self._sent = 0  # number of characters passed to `on_text`
        self._times: list[float] = []  # of the pieces

    def add(self, message: ChatMessage) -> None:
        """Add the piece of an event, with the tags that belong between it and the piece before."""
        if not (piece := self._piece(message)):
            return
        self.pieces.append(piece)
        self._times.append(time.monotonic())
        self.text += piece
        if (at := find_stop(self.text, self._stops)) is not None:
            self.text, self.stopped = self.text[:at], True
        self._send(len(self.text) - (0 if self.stopped else withheld(self.text, self._stops)))

    def close(self) -> None:
        """Send the text that was held back."""
        self._send(len(self.text))

    @property
    def speed(self) -> float:
        """Tokens per second between the first piece and the last, of one token each."""
        seconds = self._times[-1] - self._times[0] if self._times else 0.0
        return (len(self._times) - 1) / seconds if seconds else 0.0

    def _piece(self, message: ChatMessage) -> str:
        if not self._opening:
            return message.content
        opening = closing = ""
        if message.thinking and not self._in_thought:
            opening, self._in_thought = self._opening, True
        if message.content and self._in_thought:
            closing, self._in_thought = self._closing, False
        return opening + message.thinking + closing + message.content

    def _send(self, end: int) -> None:
        if self._on_text and end > self._sent:
            self._on_text(self.text[self._sent : end])
        self._sent = max(end, self._sent)


def sent_messages(messages: Sequence[Message], prompt: PromptFormat) -> list[dict[str, str]]:
    """Messages as Ollama gets them: it gives no template the thought of an earlier answer.

    Raises ValueError for turns that Ollama would drop or join, and for those that the format cannot write.
    """
    sent = [{"role": message["role"], "content": message["content"]} for message in messages]
    prompt.render(sent)
    return sent


def thinks(description: Mapping[str, Any]) -> bool:
    """Whether Ollama switches and separates thoughts of a model, by its description in /api/show."""
    return "thinking" in description.get("capabilities", ())


def served_context(host: str, description: Mapping[str, Any]) -> int | None:
    """The context of a model in tokens, from /api/show; None when its Modelfile sets none."""
    context = parse_parameters(description).get("num_ctx")
    if context is not None and type(context) is not int:
        raise ServiceError(
            f"the answer of Ollama at {host} to POST /api/show has a wrong parameters.num_ctx: {context!r:.60}",
            "publish again",
        )
    return context


def _why_unfinished(pieces: Sequence[str], end: ChatEvent | None) -> str:
    """The reason of an incomplete stream: another last event, Ollama's limit on repeated tokens, or a lost server."""
    if end:
        return f"the answer ended with done_reason {end.done_reason!r:.60}"
    last = {piece.strip() for piece in pieces[-REPEATED_PIECES:]}
    if len(pieces) >= REPEATED_PIECES and len(last) == 1:
        return f"{LOOP_ERROR} ({last.pop()[:20]!r})"
    return f"the stream ended after {len(pieces)} pieces without its last event"
