"""Small byte-level tokenizers, made during the test."""

import json
import shutil
from pathlib import Path
from typing import Any

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SENTENCES = (
    "Instrucción: ¿Qué es una interfaz en TypeScript?\nRespuesta: Una interfaz describe la forma de un objeto.",
    "Instrucción: ¿Cómo se escribe un tipo genérico?\nRespuesta: Con un parámetro de tipo: `function id<T>(x: T): T`.",
    "La función suma dos números y devuelve el resultado; el compilador comprueba los tipos antes de ejecutar nada.",
    "```ts\ninterface Persona {\n  nombre: string;\n  edad: number;\n}\n```",
    "Cuando una variable puede ser nula, hay que comprobarlo antes de leer sus propiedades.",
)


def make_tokenizer(*, add_bos: bool, pad: str | None = None) -> Any:
    """A byte-level BPE of some Spanish sentences, with R1's special tokens, as transformers wraps it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (BOS, EOS)])
    if add_bos:
        ids = [(BOS, made.token_to_id(BOS))]
        made.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS, eos_token=EOS, pad_token=pad)


def write_byte_tokenizer(path: Path) -> Path:
    """Write a tokenizer.json that makes a token of every byte; return its path."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    made.save(str(path))
    return path


def write_base(base: Path, tokenizer: Path) -> None:
    """Write a base stage's folder that has this tokenizer.json and no weights."""
    (base / "model").mkdir(parents=True)
    shutil.copy(tokenizer, base / "model" / "tokenizer.json")
    facts = {"source": "tiny", "model": "model", "weights": "", "vocabulary": 256, "add_bos": False, "bos": None}
    (base / "base.json").write_text(
        json.dumps({**facts, "eos": 0, "pad": None, "pre_tokenizer": "", "check": {}, "prompt": {}}), "utf-8"
    )
