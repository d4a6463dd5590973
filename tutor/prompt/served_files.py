"""Files of a merged model folder that name the chat template and the end of an answer.

In: the base's JSON objects, the prompt format. Out: the objects of the merged folder, for transformers, vLLM and
llama.cpp's converter alike. With prompt = "base" the end-of-turn token becomes EOS, because training taught it as the
end of every answer. Reads and writes no file.
"""

from collections.abc import Mapping
from typing import Any

from tutor.prompt.base_format import BaseFormat
from tutor.prompt.format import PromptFormat

Json = Mapping[str, Any]
"""A JSON object."""


def served_tokenizer_config(config: Json, prompt: PromptFormat, *, add_bos: bool) -> dict[str, Any]:
    """Return tokenizer_config.json with the served template, and the end of an answer as EOS."""
    return {**served_special_tokens(config, prompt), "chat_template": prompt.chat_template(add_bos=add_bos)}


def served_special_tokens(tokens: Json, prompt: PromptFormat) -> dict[str, Any]:
    """Return special_tokens_map.json, or another object with `eos_token`, with the end of an answer as EOS."""
    if not isinstance(prompt, BaseFormat):
        return dict(tokens)
    before = tokens.get("eos_token")
    if isinstance(before, Mapping):  # an added token with its properties
        return {**tokens, "eos_token": {**before, "content": prompt.end}}
    return {**tokens, "eos_token": prompt.end}


def served_model_config(config: Json, prompt: PromptFormat) -> dict[str, Any]:
    """Return config.json with the end of an answer as EOS, in the configuration of the text model too."""
    if prompt.end_id is None:
        return dict(config)
    named = {**config, "eos_token_id": prompt.end_id}
    if isinstance(text := config.get("text_config"), Mapping):
        named["text_config"] = {**text, "eos_token_id": prompt.end_id}
    return named


def served_generation_config(config: Json, prompt: PromptFormat) -> dict[str, Any]:
    """Return generation_config.json: an answer ends at its own end and at those that the base named."""
    if prompt.end_id is None:
        return dict(config)
    before = config.get("eos_token_id")
    others = [before] if isinstance(before, int) else before or []
    ends = [prompt.end_id, *(id_ for id_ in others if id_ != prompt.end_id)]
    return {**config, "eos_token_id": ends[0] if len(ends) == 1 else ends}
