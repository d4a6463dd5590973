"""transformers answers: the base (4-bit where asked), a PEFT adapter, the base's own tokenizer; streamed.

In: model folders that are on this disk. Out: answers of the `Engine` protocol, and teacher-forced log-probabilities.
Does not fetch, train or merge, and never runs code that a model folder brings.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, StoppingCriteriaList

from tutor.engines.protocol import SCORE_ROWS, Answer, Finish, Generation
from tutor.errors import ArtifactError, HostError, ServiceError
from tutor.formats.models.model_folder import load_tokenizer
from tutor.prompt import Message, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INCOMPLETE = "\ufffd"
"""What a decoder shows for bytes of a character whose rest is still to come."""


class TransformersEngine:
    """A loaded model and its tokenizer; an `Engine`."""

    def __init__(self, name: str, model: Any, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer

    def answer(
        self, messages: Sequence[Message], generation: Generation, on_text: Callable[[str], None] | None = None
    ) -> Answer:
        """The answer to the last message. Raises ServiceError when the prompt is too long or the model fails."""
        started = time.perf_counter()
        prompt = list(self.tokenizer(render(messages))["input_ids"])
        room = int(self.model.config.max_position_embeddings) - len(prompt)
        if room < 1:
            raise ServiceError(f"the prompt has {len(prompt)} tokens, no less than the model's context")
        reader = _Reader(self.tokenizer, prompt[-1], generation.stops, on_text or _unheard)
        ids = torch.tensor([prompt], device=self.model.device)
        torch.manual_seed(generation.seed)
        try:
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=_generation_config(generation, room, self.tokenizer),
                stopping_criteria=StoppingCriteriaList([reader]),
            )
        except RuntimeError as error:  # out of memory; no number among the probabilities
            raise ServiceError(f"transformers cannot answer: {_first_line(error)}") from error
        reader.close()
        return Answer(
            text=reader.text,
            finish=reader.finish,
            prompt_tokens=len(prompt),
            tokens=len(reader.ids),
            seconds=time.perf_counter() - started,
            tokens_per_second=reader.tokens_per_second(started),
        )


class _Reader:
    """Reads one answer while it is generated: ids to text, pieces out, stop texts never; as a stopping criterion.

    Criteria run as soon as a token is chosen, one step before a streamer would get it.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", anchor: int, stops: Sequence[str], on_text: Callable[[str], None]
    ) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.finish: Finish = "length"
        self._tokenizer = tokenizer
        self._anchor = anchor  # the prompt's last token: some decoders drop the blank of a first one
        self._stops = stops
        self._on_text = on_text
        self._heard = 0  # characters already given to `on_text`
        self._times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Whether generation ends with the newest token, as transformers asks after each."""
        del scores
        if self.finish == "length":
            self._read(int(input_ids[0, -1]))
        return torch.tensor([self.finish == "stop"], device=input_ids.device)

    def _read(self, token: int) -> None:
        self._times.append(time.perf_counter())
        if token == self._tokenizer.eos_token_id:
            self.finish = "stop"
            return
        self.ids.append(token)
        self.text = self._decode([self._anchor, *self.ids])[len(self._decode([self._anchor])) :]
        found = [at for stop in self._stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.finish = "stop"
        else:
            self._hear(len(self.text) - _withheld(self.text, self._stops))

    def close(self) -> None:
        """Give out what was withheld; half a character at the very end is dropped."""
        self.text = self.text.rstrip(INCOMPLETE)
        self._hear(len(self.text))

    def tokens_per_second(self, started: float) -> float:
        """Of generation alone, so without the prompt's pass where more than one token came."""
        if len(self._times) > 1:
            return (len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-9)
        return len(self._times) / max(time.perf_counter() - started, 1e-9)

    def _hear(self, end: int) -> None:
        if end > self._heard:
            self._on_text(self.text[self._heard : end])
            self._heard = end

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _withheld(text: str, stops: Sequence[str]) -> int:
    """How many last characters may still become something else: half a character, or the beginning of a stop text."""
    whole = text.rstrip(INCOMPLETE)
    begun = (n for stop in stops for n in range(len(stop) - 1, 0, -1) if whole.endswith(stop[:n]))
    return len(text) - len(whole) + max(begun, default=0)


def _unheard(piece: str) -> None:
    del piece


def _generation_config(generation: Generation, room: int, tokenizer: "PreTrainedTokenizerBase") -> GenerationConfig:
    """Ours alone: whatever stays None here would be filled from the base's generation_config.json."""
    pad = tokenizer.pad_token_id
    sampling: dict[str, Any] = {"do_sample": False}
    if generation.temperature > 0:
        # top_k 0 is off: transformers' own default of 50 is in no recipe.
        sampling = {"do_sample": True, "temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=min(generation.max_new_tokens, room),
        repetition_penalty=generation.repetition_penalty,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
    )


def load(
    model: Path, adapter: Path | None, *, quantization: Literal["nf4", "int8", "none"], precision: str
) -> TransformersEngine:
    """An engine on a model folder, with a PEFT adapter over it where one is named.

    Raises ArtifactError when a folder is incomplete or the two do not fit, HostError when memory does not suffice.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer.eos_token_id is None:
        raise ArtifactError(f"{model}: the tokenizer has no EOS token, so no answer could end")
    loaded = load_base(model, quantization, precision)
    loaded.generation_config = GenerationConfig()
    if adapter is not None:
        loaded = _with_adapter(loaded, adapter)
    name = f"transformers ({'' if quantization == 'none' else quantization.upper() + ', '}{precision})"
    return TransformersEngine(name, loaded.eval(), tokenizer)


def load_base(folder: Path, quantization: str, precision: str, *, sharded: bool = False, in_ram: bool = False) -> Any:
    """A model in 4 bits (NF4, double-quantized), in 8 (LLM.int8) or as it is, computing in `precision`.

    On this process's GPU, or the CPU where there is none or `in_ram` says so; `sharded`: FSDP will distribute it over
    the GPUs. Raises ArtifactError when the folder cannot be loaded, HostError when memory does not suffice.
    """
    dtype = DTYPES[precision]
    configs: dict[str, dict[str, Any]] = {
        "nf4": {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": quant_storage(precision, sharded=sharded),
        },
        "int8": {"load_in_8bit": True},
    }
    config = BitsAndBytesConfig(**configs[quantization]) if quantization in configs else None
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=config,
            device_map={"": torch.cuda.current_device() if torch.cuda.is_available() and not in_ram else "cpu"},
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"cannot load {folder}: {_first_line(error)}") from error
    except torch.OutOfMemoryError as error:
        raise HostError(
            f"the GPU has no room for {folder}", "end what else uses it, or set train.quantization to nf4"
        ) from error
    # transformers fills these with random numbers, with no more than a warning.
    if bad := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
        raise ArtifactError(f"{folder} lacks {len(bad)} tensors, or has them in another shape: {bad[0]}")
    if sharded:
        model.__dict__.pop("hf_device_map", None)  # accelerate moves it to the GPUs, and refuses one that is placed
    return model


def quant_storage(precision: str, *, sharded: bool) -> torch.dtype:
    """The numbers that 4-bit weights are stored as: FSDP parts only those of the type that is computed in."""
    return DTYPES[precision] if sharded else torch.uint8


def _with_adapter(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            raise ArtifactError(f"{adapter / name} is missing", "run: tutor train")
    try:
        return PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = _first_line(error)
        raise ArtifactError(f"the adapter {adapter} does not fit its base: {reason}", "run: tutor train") from error


@torch.no_grad()
def score(model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
    """Log-probabilities (nats) of each row's answer ids, given its prompt ids and the answer so far; in float32.

    `model` is an engine's model; rows are (prompt ids, answer ids). A pass a row, so that no padding has a say, but
    few logits at a time: all of a row's, of a vocabulary of 128,256, would be more than a training step takes.
    """
    head = model.get_output_embeddings()
    decoder = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    scores = []
    for prompt, answer in rows:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
        parts = zip(*(torch.split(part, SCORE_ROWS) for part in (hidden, ids[0, len(prompt) :])), strict=True)
        scores.append([value for states, chosen in parts for value in _log_probabilities(head(states), chosen)])
    return scores


def _log_probabilities(logits: torch.Tensor, chosen: torch.Tensor) -> list[float]:
    found: list[float] = torch.log_softmax(logits.float(), dim=-1).gather(1, chosen[:, None])[:, 0].tolist()
    return found


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
