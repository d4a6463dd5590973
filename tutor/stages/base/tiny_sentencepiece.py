"""The SentencePiece tokenizers of tiny models, in the form of a hub repository of Llama 2, Mistral 7B or Gemma.

In: a text, special tokens. Out: tokenizer.model, tokenizer.json, tokenizer_config.json. Trains a BPE with bytes.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LEARNT = 700
"""Number of tokens that a tokenizer learns from the text, at most."""
UNKNOWN = "<unk>"
"""Text of the token for characters without a token; bytes stand for them, so that it is never used."""


def write_sentencepiece(
    folder: Path, text: str, named: Mapping[str, str | None], others: Sequence[str], labels_of: tuple[str, str]
) -> dict[str, int]:
    """Write a tokenizer; return the ids of all tokens.

    `named`: special tokens by kind; `labels_of`: the class of transformers and the chat template. A GemmaTokenizer
    puts no blank before a text, a LlamaTokenizer puts one.
    """
    import sentencepiece
    import transformers

    class_name, template = labels_of
    kinds = {"unk": UNKNOWN, **named}
    options: dict[str, Any] = {f"{kind}_piece": piece for kind, piece in kinds.items() if piece}
    options |= {f"{kind}_id": -1 for kind in ("bos", "eos", "pad", "unk")}
    options |= {f"{kind}_id": number for number, kind in enumerate(name for name in kinds if kinds[name])}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        vocab_size=LEARNT,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=class_name != "GemmaTokenizer",
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        user_defined_symbols=list(others),
        minloglevel=2,
        num_threads=1,
        **options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    labels: dict[str, Any] = {f"{kind}_token": piece for kind, piece in kinds.items() if piece}
    tokenizer = getattr(transformers, class_name).from_pretrained(folder, add_bos_token=bool(named["bos"]), **labels)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    ids: dict[str, int] = core["model"]["vocab"]
    specials = [piece for piece in (*kinds.values(), *others) if piece]
    fixed = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = {ids[piece]: {"content": piece, **fixed} for piece in specials}
    core["added_tokens"] = [{"id": id_, **token} for id_, token in sorted(added.items())]
    (folder / "tokenizer.json").write_text(json.dumps(core, ensure_ascii=False), "utf-8")
    labels |= {"add_bos_token": bool(named["bos"]), "add_eos_token": False, "clean_up_tokenization_spaces": False}
    labels |= {"added_tokens_decoder": {str(id_): token for id_, token in added.items()}}
    labels |= {"model_max_length": 2048, "tokenizer_class": class_name, "legacy": False, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(labels, ensure_ascii=False, indent=1), "utf-8")
    return ids
