"""The check of a base before training: what merging, converting or parity would refuse about it is refused here.

In: a model folder that `check_model_folder` accepts, and its facts. Out: numbers of what was compared, or the error.
llama.cpp's own converter writes the metadata and the tokenizer as the convert stage does, without a weight; the
tensors' names and shapes are those of transformers' class, and every tensor has a name in a GGUF; both tokenizers give
the same ids for the same texts; no number is beyond the range of the GGUF's 16 bits.
Loads no model, and holds one piece of one tensor in memory.
"""

import itertools
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tutor.artifacts.disk import read_json
from tutor.engines.llamacpp.convert import Conversion, to_gguf
from tutor.engines.llamacpp.tokenize import tokenize
from tutor.errors import ArtifactError
from tutor.formats.models.gguf_metadata import implied_metadata, vocabulary_differences
from tutor.formats.models.gguf_weights import weights_of
from tutor.formats.models.model_config import is_tied
from tutor.formats.models.model_folder import CANARIES, EMBEDDING, Facts, is_refusal, load_tokenizer, reason
from tutor.formats.models.safetensors import Stored, folder_weights
from tutor.formats.models.tensor_streams import largest_magnitude, pieces
from tutor.formats.rows.control_tokens import llamacpp_control_texts
from tutor.prompt.base_format import BaseFormat
from tutor.prompt.messages import conversation
from tutor.prompt.tutor_format import completion, render
from tutor.recipe.quantizations import BF16, F16

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

HEAD = "lm_head.weight"
"""Name of the weight that a tied base shares with its embedding."""
TOO_LARGE = {
    F16: {"F16": 0x7C00, "BF16": 0x4780, "F32": 0x477FF000},
    BF16: {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F7F8000},
}
"""Bits of the smallest magnitude that a GGUF's type rounds to infinity, by type; infinity and NaN are above."""
LARGEST = {F16: "FP16's 65504", BF16: "BF16's 3.39e38"}
"""Name of the largest number, by the type of a GGUF."""
CONTEXT = 4
"""Number of ids that an error shows on each side of a difference."""
AGAIN = "fetch it again, or name another base"
"""Next step for a folder whose files contradict each other."""


def check_base(model: Path, facts: Facts, scratch: Path) -> dict[str, int]:
    """Check a base; return the number of tensors, of metadata values and of token ids that were compared.

    Raises ArtifactError for a base that a later stage would refuse, HostError without llama.cpp.
    """
    stored = folder_weights(model)
    _check_tensors(model, stored)
    weights_of(model)  # raises for a tensor without a name in a GGUF
    expected = implied_metadata(model, facts)
    for tensor in stored.values():
        _check_values(tensor, expected.file_type)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        gguf = Path(folder) / "vocabulary.gguf"
        log.info("converting its vocabulary with llama.cpp")
        to_gguf(Conversion(model, gguf, facts.pre_tokenizer, vocabulary_only=True))
        if lines := vocabulary_differences(gguf, expected):
            raise ArtifactError(f"llama.cpp reads {model} otherwise than transformers: {'; '.join(lines)}", AGAIN)
        ids = _check_ids(model, gguf, facts)
    return {"tensors": len(stored), "metadata": len(vars(expected)), **ids}


def canary_text(eos: str) -> str:
    """Return the text that both tokenizers must make the same ids of: prose, code, a prompt and its answer, EOS."""
    return f"{plain_canary_text()}\n¿Qué es {eos} y a{eos}b?"


def plain_canary_text() -> str:
    """Return `canary_text` without the text of a control token."""
    prompt = render(conversation("¿Cuánto es 7 + 3?", "Eres un tutor.")) + completion("Son 10.")
    return "\n".join((*CANARIES, prompt))


def _check_tensors(model: Path, stored: Mapping[str, Stored]) -> None:
    """Raise ArtifactError for a tensor that is missing, additional, or of another shape than its configuration says."""
    config = read_json(model / "config.json")
    layers = {name.split(".")[2] for name in stored if name.startswith("model.layers.")}
    if len(layers) != config["num_hidden_layers"]:  # before a model of so many layers is made
        problem = f"config.json has num_hidden_layers {config['num_hidden_layers']}, the weights have {len(layers)}"
        raise ArtifactError(f"{model}: {problem}", AGAIN)
    shapes = _expected_shapes(model)
    if is_tied(config) and HEAD in stored:
        _check_tied(model, stored)
    if is_tied(config) and HEAD not in stored:
        shapes.pop(HEAD, None)
    if missing := sorted(shapes.keys() - stored):
        hint = 'set "tie_word_embeddings": true where the head is the embedding' if missing == [HEAD] else AGAIN
        raise ArtifactError(f"{model} lacks {missing[0]}{_more(missing)}, which its config.json implies", hint)
    if additional := sorted(stored.keys() - shapes):
        raise ArtifactError(
            f"{model} holds {additional[0]}{_more(additional)}, for which its config.json has no place", AGAIN
        )
    for name, tensor in stored.items():
        if tensor.shape != shapes[name]:
            raise ArtifactError(f"{model}: {name} is {tensor.shape}, its config.json implies {shapes[name]}", AGAIN)


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _expected_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that transformers makes of a configuration, by name."""
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        if not is_refusal(error):
            raise
        what = f"transformers cannot make a model of {model / 'config.json'}: {reason(error)}"
        raise ArtifactError(what, AGAIN) from error
    return {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}


def _check_tied(model: Path, stored: Mapping[str, Stored]) -> None:
    """Raise ArtifactError for a head of its own in a base that ties it."""
    head, embedding = stored[HEAD], stored[EMBEDDING]
    equal = (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and all(
        left.tobytes() == right.tobytes() for left, right in zip(pieces(head), pieces(embedding), strict=True)
    )
    if not equal:
        raise ArtifactError(
            f"{model} has tie_word_embeddings, and {HEAD} differs from {EMBEDDING}: one of the two is wrong",
            'set "tie_word_embeddings": false in config.json where the head was trained',
        )


def _check_values(tensor: Stored, kind: str) -> None:
    """Raise ArtifactError for NaN, and for a number that the type of the GGUF cannot hold."""
    limit = TOO_LARGE[kind][tensor.dtype]
    if any(largest_magnitude(bits) >= limit for bits in pieces(tensor)):
        raise ArtifactError(f"{tensor.path}: {tensor.name} holds NaN or a number beyond {LARGEST[kind]}", AGAIN)


def _check_ids(model: Path, gguf: Path, facts: Facts) -> dict[str, int]:
    """Compare the ids of texts; return their number, and whether texts with control tokens have others by rule.

    Raises ArtifactError where llama.cpp's ids are others: of prose, code and prompts for every tokenizer, of a text
    with control tokens unless SentencePiece puts no blank behind them and llama.cpp does.
    """
    tokenizer = load_tokenizer(model)
    text = canary_text(tokenizer.eos_token)
    prompts = [text]
    if sentencepiece := not facts.pre_tokenizer:
        prompts = [plain_canary_text()]
    if facts.prompt:
        messages = [*conversation("¿Cuánto es 7 + 3?"), {"role": "assistant", "content": "Son 10."}]
        prompts.append(BaseFormat.from_json(facts.prompt).render([*messages, *conversation("¿Y 7 - 3?")]))
    count = 0
    for prompt in prompts:
        ours: list[int] = tokenizer(prompt)["input_ids"]
        _require_equal(model, ours, tokenize(gguf, prompt), tokenizer)
        count += len(ours)
    blanks = sentencepiece and tokenizer(text)["input_ids"] != tokenize(gguf, text)
    if blanks:
        log.warning("%s: after the text of a control token in a question, llama.cpp's ids differ by a blank", model)
    added = (token.content for token in tokenizer.added_tokens_decoder.values())
    if alone := llamacpp_control_texts(tokenizer.get_vocab(), added):
        log.warning("%s: llama.cpp reads %s in a question as one control token", model, ", ".join(alone))
    return {"tokens": count, "control_texts_differ": int(blanks or bool(alone))}


def _require_equal(model: Path, ours: list[int], theirs: list[int], tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ArtifactError with the ids around the first difference."""
    if ours == theirs:
        return
    at = next(at for at, (left, right) in enumerate(itertools.zip_longest(ours, theirs)) if left != right)
    part = slice(max(at - CONTEXT, 0), at + CONTEXT)
    raise ArtifactError(
        f"the tokenizer of {model} gives other ids in llama.cpp: at id {at} of {tokenizer.decode(ours[part])!r} "
        f"expected {theirs[part]}, found {ours[part]} by transformers",
        'tokenizer changed? fetch the base again; or set prompt = "tutor", or name another base',
    )
