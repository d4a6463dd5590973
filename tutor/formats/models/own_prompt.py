"""How a person asks the base: its own chat template, as its tokenizer files have it.

In: the base stage's folder. Out: the prompt format. Needs no transformers, so that images without it can ask the base.
Asks no model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutor.artifacts.disk import read_json
from tutor.errors import ArtifactError
from tutor.formats.models.model_folder import read_facts
from tutor.prompt.own_format import OwnFormat

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that transformers passes to a template."""


def read_own_prompt(base: Path) -> OwnFormat:
    """Return the original template of a base as a prompt format; `base` is the folder of the base stage.

    A base without a template gets its questions as plain text. Raises ArtifactError for a template that does not
    render a question.
    """
    facts, model = read_facts(base)
    config = read_json(model / "tokenizer_config.json")
    added = _added_tokens(model, config)
    texts = {id_: text for text, id_ in added.items()}
    tokens = {name: text for name in NAMES if (text := _text(config.get(name)))}
    for name, id_ in (("bos_token", facts.bos), ("eos_token", facts.eos)):
        if name not in tokens and id_ in texts:
            tokens[name] = texts[id_]
    try:
        return OwnFormat.from_template(_template(model, config), tokens, added, add_bos=facts.add_bos)
    except ValueError as error:
        raise ArtifactError(f"{model}: {error}", "the base cannot be asked its own way: name another base") from None


def _template(model: Path, config: Mapping[str, Any]) -> str:
    """The chat template of a folder, the default one of several; "" where there is none. A file of its own is first."""
    path = model / "chat_template.jinja"
    if path.is_file():
        return path.read_text("utf-8")
    found = config.get("chat_template") or ""
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, Mapping)}
        found = named.get("default") or ""
    return str(found)


def _added_tokens(model: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """The ids of a tokenizer's added tokens by text."""
    found = {_text(token): int(id_) for id_, token in config.get("added_tokens_decoder", {}).items()}
    if (model / "tokenizer.json").is_file():
        listed = json.loads((model / "tokenizer.json").read_text("utf-8")).get("added_tokens", [])
        found |= {token["content"]: token["id"] for token in listed}
    return found


def _text(token: object) -> str:
    """The text of a special token, which a file has as it is or with its properties."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""
