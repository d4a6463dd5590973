"""A tiny random model of each family, in the form of a hub repository, as transformers' own classes save it.

In: a folder, a name of FAMILIES, a text for its tokenizer. Out: weights, config.json, a small tokenizer with the
family's splitting, its special tokens and a short form of its chat template. Weights are random and large enough that
greedy answers are not one repeated token; on request they are trained on the text for seconds. Answers no question.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tutor.formats.architectures import ARCHITECTURES
from tutor.formats.models.pre_tokenizer import LLAMA3, TEKKEN
from tutor.stages.base.tiny_sentencepiece import write_sentencepiece
from tutor.stages.base.tiny_templates import CHATML, HEADERS, INST, MODES, OPENS, SWITCHED, TURNS

VOCABULARY = 768
"""Number of rows of each embedding: more than the tokens of its tokenizer, as Qwen's have."""
LEARNT = 700
"""Number of tokens that a tokenizer learns from the text, at most."""
QWEN2 = LLAMA3.replace("{1,3}", "")
"""Split pattern of Qwen 2 and 3: Llama 3's, with each digit alone."""
BIASED = "llama_bias"
"""Name of the Llama whose linear layers have biases."""
PREFIXED = "llama_sentencepiece"
"""Name of the Llama whose tokenizer puts a blank before a text, as those of Llama 2 and Mistral 7B."""
WINDOWED = "mistral_window"
"""Name of the Mistral with a sliding window."""
DISTILLED = "qwen2_r1"
"""Name of the Qwen 2 with the tokens and the template of DeepSeek's R1."""


@dataclass(frozen=True)
class Family:
    """What a tiny model has: its family, its tokenizer and what its configuration adds."""

    model_type: str
    split: str
    template: str
    bos: str | None  # put before every text
    eos: str
    others: tuple[str, ...]  # special tokens
    thoughts: tuple[str, ...] = ()  # tokens around a thought, which are printed
    reasonings: tuple[str, ...] = ("none",)  # values of the recipe's `reasoning` with prompt = "base"
    pad: str | None = None
    nfc: bool = False
    layers: int = 2
    sentencepiece: str = ""  # class of its tokenizer, without `split`
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, str | None]:
        """Special tokens by their kind in a configuration."""
        return {"bos": self.bos, "eos": self.eos, "pad": self.pad}


TIED: Mapping[str, Any] = {"tie_word_embeddings": True}
"""Setting of a model whose head is its embedding."""
THINK = ("<think>", "</think>")
"""Tokens around a thought."""
_LLAMA = Family(
    "llama",
    LLAMA3,
    HEADERS,
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    others=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
_QWEN = Family("qwen2", QWEN2, CHATML, bos=None, eos="<|im_end|>", pad="<|endoftext|>", others=("<|im_start|>",))
_MISTRAL = Family("mistral", TEKKEN, INST, bos="<s>", eos="</s>", others=("[INST]", "[/INST]"))
_GEMMA = Family(
    "gemma3_text",
    "",
    TURNS,
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    others=("<start_of_turn>", "<end_of_turn>"),
    sentencepiece="GemmaTokenizer",
    layers=7,
    config={**TIED, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
)
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    PREFIXED: replace(
        _MISTRAL,
        model_type="llama",
        split="",
        sentencepiece="LlamaTokenizer",
        reasonings=(),  # llama.cpp reads another blank behind its control tokens: prompt = "base" is refused
        config={"max_position_embeddings": 2048},
    ),
    BIASED: replace(_LLAMA, config={"attention_bias": True, "mlp_bias": True}),
    "qwen2": replace(_QWEN, nfc=True, config=TIED),
    DISTILLED: replace(
        _QWEN,
        template=OPENS,
        bos="<｜begin▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        pad="<｜end▁of▁sentence｜>",
        others=("<｜User｜>", "<｜Assistant｜>"),
        thoughts=THINK,
        reasonings=("empty", "rows"),
    ),
    "qwen3": replace(
        _QWEN,
        model_type="qwen3",
        template=SWITCHED,
        nfc=True,
        thoughts=THINK,
        reasonings=("none", "empty", "rows"),
        config={**TIED, "head_dim": 32},
    ),
    "mistral": replace(_MISTRAL, config={"sliding_window": None}),
    WINDOWED: replace(_MISTRAL, config={"sliding_window": 128}),
    "gemma3_text": _GEMMA,
    "smollm3": replace(
        _QWEN,
        model_type="smollm3",
        split=LLAMA3,
        template=MODES,
        thoughts=THINK,
        reasonings=("none", "rows"),
        layers=4,
        config=TIED,
    ),
}
"""The tiny models by name; those of a family's `model_type` alone are its plain form."""


def make_family(folder: Path, name: str, text: str, seed: int, *, warm: bool = False) -> Path:
    """Write the tiny model `name` of FAMILIES into `folder`; return the folder.

    Its tokenizer learns `text`, and so does the model if `warm`: it then writes no bytes that are no UTF-8.
    """
    import torch
    import transformers

    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    if family.sentencepiece:
        ids = write_sentencepiece(folder, text, family.named, family.others, (family.sentencepiece, family.template))
    else:
        ids = _write_tokenizer(folder, family, text)
    class_name = ARCHITECTURES[family.model_type].class_name
    model_class = getattr(transformers, class_name)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": family.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **{f"{kind}_token_id": ids[token] if token else None for kind, token in family.named.items()},
        **family.config,
    }
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**settings))
    _scale(model)
    if warm:
        from tokenizers import Tokenizer

        from tutor.stages.base.tiny_model import warm_up

        warm_up(
            model, Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids, seed
        )
    _make_rare(model, json.loads((folder / "tokenizer.json").read_text("utf-8")))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def _scale(model: Any) -> None:
    """Draw weights, biases and norms: every kind of tensor moves the logits, which are some nats apart."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                weight.normal_(std=0.25)
            elif weight.ndim > 1:
                weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
            elif name.endswith("bias"):
                weight.normal_(std=0.5)
            else:
                weight.add_(torch.empty_like(weight).normal_(std=0.2))


def _make_rare(model: Any, tokenizer: Mapping[str, Any]) -> None:
    """Shrink the rows of special tokens and zero those without a token: no greedy answer holds or ends with one."""
    import torch

    special = [token["id"] for token in tokenizer["added_tokens"]]
    last = max(*special, *tokenizer["model"]["vocab"].values())
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[special] *= 0.5
            table[last + 1 :] = 0


def _write_tokenizer(folder: Path, family: Family, text: str) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json; return the ids of all tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    core = Tokenizer(models.BPE())
    if family.nfc:
        core.normalizer = normalizers.NFC()
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(family.split), behavior="isolated"), bytes_]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=LEARNT, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(text.splitlines(keepends=True), trainer)
    specials = [*filter(None, family.named.values()), *family.others]
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token in family.thoughts])
    if family.bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos} $B",
            special_tokens=[(family.bos, core.token_to_id(family.bos))],
        )
    ids: dict[str, int] = core.get_vocab()
    core.save(str(folder / "tokenizer.json"))
    labels = {
        **{f"{kind}_token": token for kind, token in family.named.items() if token},
        "add_bos_token": bool(family.bos),
        "chat_template": family.template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(labels, ensure_ascii=False, indent=1), "utf-8")
    return ids
