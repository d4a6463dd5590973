"""A random Llama with a byte-level BPE, in the form of a hub repository, and a fake of llama.cpp's converter."""

from pathlib import Path
from typing import Any

import pytest

from tutor.formats.models.pre_tokenizer import LLAMA3

RECOGNISER = """
import logging

class Writer:
    def __init__(self):
        self.metadata = {}

    def add_string(self, key, value):
        self.metadata[key] = value

class ModelBase:
    @staticmethod
    def load_hparams(folder, is_mistral):
        return {"model_type": "llama", "architectures": None}

class TextModel(ModelBase):
    def __init__(self):
        self.gguf_writer = Writer()

    def prepare_metadata(self, vocab_only):
        self.gguf_writer.add_string("theirs", str(vocab_only))

    def get_vocab_base_pre(self, tokenizer):
        found = open(__file__.replace("base.py", "identified.txt")).read()
        if not found:
            logging.warning("** chkhsh:  " + "ab" * 32)
            raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
        if found == "broken":
            raise ValueError("Can not map tensor 'model.layers.0.self_attn.q_proj.weight.absmax'")
        return found
"""


TEXTS = (
    "¿Qué es una interfaz en TypeScript? El niño preguntó: «¿y los genéricos?».",
    "function suma(a: number): number {\n  if (a > 10) {\n    return a + 1234567;\n  }\n\treturn 0;\n}\n\n\n",
    "  dos espacios, 3.14 y 98765,  `código`… ¡ñandú!\r\nI'm sure, WE'LL see 👩‍💻🎉 e\u0301",
    "x   1\n\n2\t\t3\n   4. 你好",  # blanks before a digit: where splitting digits off or not differs
    "<s>Instrucción: ¿<s>?\nRespuesta:",
)


def make_tiny(folder: Path, splitter: Any, *, bos: bool = True) -> Path:
    """A random Llama and a byte-level BPE with this pre-tokenizer, in the form of a hub repository."""
    torch = pytest.importorskip("torch")
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = splitter
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=598, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    core.train_from_iterator(TEXTS, trainer)
    core.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in ("<s>", "</s>")])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    rope = {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={**rope, "high_freq_factor": 4.0, "original_max_position_embeddings": 256},
        initializer_range=0.2,  # logits far enough apart for one answer in every precision
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    for token, number in tokenizer.get_vocab().items():
        if not token.isascii() or token in names.values():
            # Never the largest logit: an answer is plain text, and does not end by itself.
            model.lm_head.weight.data[number] = 0
    model.half().save_pretrained(folder)
    return folder


def llama3_splitter() -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    return Sequence([Split(Regex(LLAMA3), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
