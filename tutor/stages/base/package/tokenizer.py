"""The tokenizer of a GGUF, as files of a Hugging Face folder.

In: the metadata of a GGUF. Out: tokenizer.json and tokenizer_config.json, or the error for a splitting of text that is
not the file's. A byte-level BPE is built here: transformers' loader gives some splittings others, and adds tokens of
GPT-2 that the vocabulary has no rows for. For SentencePiece that loader is used. Reads no weights.
"""

import json
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, processors
from tokenizers.models import BPE

from tutor.errors import ArtifactError
from tutor.formats.models.gguf import Gguf
from tutor.formats.models.gguf_metadata import Metadata
from tutor.formats.models.pre_tokenizer import equivalent_names, ignores_merges, pre_tokenizer_name, splitter_of

CONTROL = 3
"""Type of a control token in a GGUF."""
USER_DEFINED = 4
"""Type of an added token that is text."""
UNUSED = 5
"""Type of a row without a token."""
NAMED = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""Names of special tokens in a GGUF by those of transformers."""


def write_tokenizer(path: Path, gguf: Gguf, metadata: Metadata, model: Path) -> None:
    """Write the tokenizer of a GGUF into the folder `model`. Raises ArtifactError for an unknown splitting of text."""
    split = metadata.pre_tokenizer
    if split:
        tokenizer = _byte_level(path, gguf, split, adds_bos=metadata.add_bos is not False)
    else:
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.save_pretrained(model)
    found = pre_tokenizer_name(model / "tokenizer.json")
    if split not in equivalent_names(found):
        raise ArtifactError(f"{path} splits text as {split!r}, its tokenizer was read as {found!r}")
    labels = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    for name in ("is_local", "local_files_only", "backend"):
        labels.pop(name, None)
    labels["add_bos_token"] = metadata.add_bos is not False
    # transformers 4 (pinned by llama.cpp's converter) knows this name, and not that of version 5
    labels["tokenizer_class"] = "PreTrainedTokenizerFast"
    text = json.dumps(labels, ensure_ascii=False, indent=1, sort_keys=True)
    (model / "tokenizer_config.json").write_text(text + "\n", "utf-8")


def _byte_level(path: Path, gguf: Gguf, split: str, *, adds_bos: bool) -> Any:
    """Return a byte-level BPE with the tokens, merges and splitting of a GGUF."""
    fields = gguf.fields
    tokens, merges = fields.get("tokenizer.ggml.tokens", []), fields.get("tokenizer.ggml.merges", [])
    kinds = list(fields.get("tokenizer.ggml.token_type", ())) or [1] * len(tokens)
    splitter = splitter_of(split)
    if splitter is None:
        raise ArtifactError(f"{path} splits text as {split!r}, which tutor does not know", "use another base")
    vocabulary = {token: id_ for id_, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED}
    pairs = [tuple(pair.split(" ", 1)) for pair in merges]
    core = Tokenizer(BPE(vocab=vocabulary, merges=pairs, ignore_merges=ignores_merges(split)))
    core.pre_tokenizer = splitter
    core.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, normalized=False, special=kind == CONTROL)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    core.add_tokens(added)
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in NAMED.items()}
    named = {f"{name}_token": tokens[id_] for name, id_ in ids.items() if id_ is not None}
    if adds_bos and ids["bos"] is not None:
        bos = named["bos_token"]
        single, pair = f"{bos} $A", f"{bos} $A {bos} $B"
        core.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(bos, ids["bos"])]
        )
    template = fields.get("tokenizer.chat_template")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, clean_up_tokenization_spaces=False, **named
    )
