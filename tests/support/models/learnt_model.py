"""A tiny Llama that has learnt two answers by heart, and a byte tokenizer, for tests with known answers."""

import pytest

torch = pytest.importorskip("torch")
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tutor.engines.hf.engine import TransformersEngine
from tutor.engines.protocol import Answer, Generation
from tutor.prompt.encoding import Encoded
from tutor.prompt.messages import conversation

ENDS = ("a", " Sí, ñandú 🎉.")


RUNS_ON = ("b", " Año 👩‍💻\nInsisto.\nInstrucción: c\nRespuesta: no")


GREEDY = Generation(max_new_tokens=80, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=1)


EOS = "<fin>"


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, which splits accents and emoji over several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.model = models.BPE(vocab={sign: number for number, sign in enumerate(alphabet)}, merges=[])
    core.add_special_tokens([AddedToken(EOS, normalized=False, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, clean_up_tokenization_spaces=False)


def learn_by_heart(model: LlamaForCausalLM, rows: list[Encoded]) -> None:
    """Train on the rows, as one padded batch, until the loss is below 0.02."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
    mask = torch.tensor([row.mask + [0] * (width - len(row.ids)) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = model(input_ids=ids, labels=labels).loss
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.02


def ask(engine: TransformersEngine, question: str, generation: Generation = GREEDY) -> tuple[Answer, list[str]]:
    pieces: list[str] = []
    return engine.answer(conversation(question), generation, pieces.append), pieces
