"""Generate answers with a model that is loaded in transformers, and stream their text.

In: a loaded model, its tokenizer, a conversation. Out: answers of the `Engine` protocol.
Does not load a model, does not fetch, train or merge one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from tutor.engines.protocol import Answer, Finish, Generation
from tutor.engines.stop_texts import find_stop
from tutor.errors import ServiceError
from tutor.prompt.format import PromptFormat, end_token, withheld
from tutor.prompt.messages import Message
from tutor.prompt.tutor_format import TUTOR

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"
"""The character that a tokenizer decodes an incomplete UTF-8 sequence to."""


class TransformersEngine:
    """A loaded model and its tokenizer; an `Engine`."""

    def __init__(
        self, name: str, model: Any, tokenizer: "PreTrainedTokenizerBase", prompt: PromptFormat = TUTOR
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.prompt = prompt
        self.end_id = end_token(prompt, tokenizer)

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """Return the answer to the last message. Raises ServiceError when the prompt is too long or the model fails."""
        started = time.perf_counter()
        prompt = list(self.tokenizer(self.prompt.render(messages))["input_ids"])
        limit = int(self.model.config.max_position_embeddings) - len(prompt)
        if limit < 1:
            raise ServiceError(f"the prompt has {len(prompt)} tokens, too many for the model's context")
        reader = _Reader(self, prompt[-1], generation.stops, on_text or _ignore)
        ids = torch.tensor([prompt], device=self.model.device)
        torch.manual_seed(generation.seed)
        try:
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=_generation_config(generation, limit, self),
                stopping_criteria=StoppingCriteriaList([reader]),
            )
        except RuntimeError as error:  # out of memory, or NaN among the probabilities
            raise ServiceError(f"transformers cannot answer: {first_line(error)}") from error
        reader.close()
        split = self.prompt.reply(reader.text)
        return Answer(
            text=split.answer,
            thought=split.thought,
            finish=reader.finish,
            prompt_tokens=len(prompt),
            tokens=len(reader.ids),
            seconds=time.perf_counter() - started,
            tokens_per_second=reader.tokens_per_second(started),
        )

    @torch.no_grad()
    def logits(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[torch.Tensor]:
        """Yield for each (prompt ids, answer ids) the logits in fp32 that each answer id was chosen from."""
        for prompt, answer in rows:
            ids = torch.tensor([[*prompt, *answer]], device=self.model.device)
            found = self.model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
            yield found.float()


class _Reader:
    """A stopping criterion that decodes the answer, sends its text in pieces and holds stop texts back.

    Criteria run as soon as a token is chosen, one step before a streamer receives it.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        anchor: int,
        stops: Sequence[str],
        on_text: Callable[[str], None],
    ) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.finish: Finish = "length"
        self._tokenizer, self._end = engine.tokenizer, engine.end_id
        self._anchor = anchor  # the prompt's last token: some decoders drop a leading space
        self._stops = stops
        self._on_text = on_text
        self._sent = 0  # number of characters passed to `on_text`
        self._times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return whether generation ends; transformers calls this after every token."""
        del scores
        if self.finish == "length":
            self._read(int(input_ids[0, -1]))
        return torch.tensor([self.finish != "length"], device=input_ids.device)

    def _read(self, token: int) -> None:
        self._times.append(time.perf_counter())
        if token == self._end:
            self.finish = "eos"
            return
        self.ids.append(token)
        self.text = self._decode([self._anchor, *self.ids])[len(self._decode([self._anchor])) :]
        if (at := find_stop(self.text, self._stops)) is not None:
            self.text = self.text[:at]
            self.finish = "stop"
        else:
            self._send(len(self.text) - _withheld(self.text, self._stops))

    def close(self) -> None:
        """Send the text that was held back; an incomplete character at the end is dropped."""
        self.text = self.text.rstrip(INCOMPLETE)
        self._send(len(self.text))

    def tokens_per_second(self, started: float) -> float:
        """Return the speed of generation; without the prompt's forward pass when there is more than one token."""
        if len(self._times) > 1:
            return (len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-9)
        return len(self._times) / max(time.perf_counter() - started, 1e-9)

    def _send(self, end: int) -> None:
        if end > self._sent:
            self._on_text(self.text[self._sent : end])
            self._sent = end

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _withheld(text: str, stops: Sequence[str]) -> int:
    """Return how many last characters to hold back: an incomplete character, or the beginning of a stop text."""
    complete = text.rstrip(INCOMPLETE)
    return len(text) - len(complete) + withheld(complete, stops)


def _ignore(piece: str) -> None:
    del piece


def _generation_config(generation: Generation, limit: int, engine: TransformersEngine) -> GenerationConfig:
    """Return a complete configuration: transformers fills None from the base's generation_config.json."""
    pad, end = engine.tokenizer.pad_token_id, engine.end_id
    sampling: dict[str, Any] = {"do_sample": False}
    if generation.temperature > 0:
        # 0 turns top_k off: no recipe sets it, and the default of transformers is 50.
        sampling = {"do_sample": True, "temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=min(generation.max_new_tokens, limit),
        repetition_penalty=generation.repetition_penalty,
        eos_token_id=end,
        pad_token_id=end if pad is None else pad,
        bos_token_id=engine.tokenizer.bos_token_id,
        **sampling,
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
