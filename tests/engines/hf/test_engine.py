"""engines/hf/engine.py on a tiny Llama that has learnt three answers by heart, so that what it says is known."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from support.tolerances import forward_error, largest_logit
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tutor.engines.hf import engine as hf
from tutor.engines.hf.loading import load, load_base
from tutor.engines.hf.score import answer_logprobs
from tutor.engines.protocol import SCORE_ROWS, Generation
from tutor.errors import ArtifactError, ServiceError
from tutor.prompt import Encoded, conversation, encode

ENDS = ("a", " Sí, ñandú 🎉.")
RUNS_ON = ("b", " Año 👩‍💻\nInsisto.\nInstrucción: c\nRespuesta: no")
GREEDY = Generation(max_new_tokens=80, temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=1)
EOS = "<fin>"


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, so that each accent and emoji is split over several."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.model = models.BPE(vocab={sign: number for number, sign in enumerate(alphabet)}, merges=[])
    core.add_special_tokens([AddedToken(EOS, normalized=False, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, clean_up_tokenization_spaces=False)


def learn_by_heart(model: LlamaForCausalLM, rows: list[Encoded]) -> None:
    """Both rows as one padded batch until hardly any doubt is left."""
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


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """More threads only wait for each other on a model this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose generation_config.json asks for wild sampling, as a published chat model's may."""
    out = tmp_path_factory.mktemp("model")
    tokenizer = bytes_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    learn_by_heart(model, [encode(tokenizer, *pair) for pair in (ENDS, RUNS_ON)])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    wild = {"do_sample": True, "temperature": 9.0, "top_k": 3, "repetition_penalty": 5.0, "max_length": 3}
    (out / "generation_config.json").write_text(json.dumps(wild), "utf-8")
    return out


@pytest.fixture(scope="module")
def engine(folder: Path) -> hf.TransformersEngine:
    return load(folder, None, quantization="none", precision="fp32")


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    base = LlamaForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(base, config).save_pretrained(out)
    return out


def ask(engine: hf.TransformersEngine, question: str, generation: Generation = GREEDY) -> tuple[hf.Answer, list[str]]:
    pieces: list[str] = []
    return engine.answer(conversation(question), generation, pieces.append), pieces


def test_answer_ends_at_eos_without_sending_or_counting_it(engine: hf.TransformersEngine) -> None:
    answer, pieces = ask(engine, ENDS[0])
    assert (answer.text, answer.finish) == (ENDS[1], "stop")
    assert answer.tokens == len(ENDS[1].encode())
    assert answer.prompt_tokens == len("Instrucción: a\nRespuesta:".encode())
    assert "".join(pieces) == answer.text
    assert answer.seconds > 0
    assert answer.tokens_per_second > 0


def test_stop_text_ends_answer_and_no_part_of_it_is_sent(engine: hf.TransformersEngine) -> None:
    answer, pieces = ask(engine, RUNS_ON[0])
    assert (answer.text, answer.finish) == (" Año 👩‍💻\nInsisto.", "stop")
    assert "".join(pieces) == answer.text
    heard = ""
    for piece in pieces:
        heard += piece
        assert answer.text.startswith(heard)


def test_prefix_of_a_stop_text_is_sent_when_it_ends_otherwise(engine: hf.TransformersEngine) -> None:
    _, pieces = ask(engine, RUNS_ON[0])
    assert "\nInsi" in pieces, pieces


def test_answer_without_stop_texts_continues(engine: hf.TransformersEngine) -> None:
    answer, _ = ask(engine, RUNS_ON[0], replace(GREEDY, stops=()))
    assert answer.text == RUNS_ON[1]


def test_characters_of_several_tokens_are_sent_complete(engine: hf.TransformersEngine) -> None:
    for question in ("a", "b"):
        _, pieces = ask(engine, question)
        assert all(hf.INCOMPLETE not in piece for piece in pieces)
    assert any("ñ" in piece for piece in pieces)


@pytest.mark.parametrize("tokens", range(1, 19))
def test_cut_answer_has_finish_length_and_complete_characters(engine: hf.TransformersEngine, tokens: int) -> None:
    answer, pieces = ask(engine, ENDS[0], replace(GREEDY, max_new_tokens=tokens))
    assert (answer.finish, answer.tokens) == ("length", tokens)
    assert answer.text == ENDS[1].encode()[:tokens].decode("utf-8", "ignore")
    assert "".join(pieces) == answer.text


def test_equal_seeds_give_equal_samples_others_differ(engine: hf.TransformersEngine) -> None:
    wild = replace(GREEDY, temperature=2.0, max_new_tokens=40)
    first, again, other = (ask(engine, "z", replace(wild, seed=seed))[0].text for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_sampling_applies_top_p_and_no_default_top_k(engine: hf.TransformersEngine) -> None:
    narrow = replace(GREEDY, temperature=1.0, top_p=1e-6)
    assert ask(engine, ENDS[0], narrow)[0].text == ENDS[1]
    config = hf._generation_config(replace(GREEDY, temperature=2.0), 10, engine.tokenizer)
    assert config.top_k == 0
    assert engine.model.generation_config.to_diff_dict() == GenerationConfig().to_diff_dict()


def test_full_context_ends_answer_and_longer_prompt_is_error(engine: hf.TransformersEngine) -> None:
    room = 160 - len("Instrucción: \nRespuesta:".encode())
    answer, _ = ask(engine, "x" * (room - 1), replace(GREEDY, stops=()))
    assert answer.tokens <= 1
    with pytest.raises(ServiceError, match="160 tokens"):
        ask(engine, "x" * room)


def test_interrupted_answer_does_not_change_the_engine(engine: hf.TransformersEngine) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.answer(conversation("a"), GREEDY, interrupt)
    assert ask(engine, ENDS[0])[0].text == ENDS[1]


def test_loaded_adapter_changes_the_answer(engine: hf.TransformersEngine, folder: Path, adapter: Path) -> None:
    tuned = load(folder, adapter, quantization="none", precision="fp32")
    row = encode(engine.tokenizer, *ENDS)
    rows = [(row.ids[: row.n_prompt], row.ids[row.n_prompt :])]
    assert sum(answer_logprobs(tuned.model, rows)[0]) < sum(answer_logprobs(engine.model, rows)[0]) - 1
    assert ask(tuned, ENDS[0])[0].text != ENDS[1]
    assert tuned.model.generation_config.top_k is None


@pytest.mark.parametrize(("quantization", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantized_model_answers_and_is_named_as_quantized(folder: Path, quantization: str, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    engine = load(folder, None, quantization=quantization, precision="fp32")
    assert quantization.upper() in engine.name
    assert type(engine.model.model.layers[0].mlp.up_proj).__name__ == kind
    assert ask(engine, ENDS[0])[0].tokens > 0


def test_answer_logprobs_equal_those_of_a_plain_forward_pass(engine: hf.TransformersEngine) -> None:
    rows = [([5, 6, 7], [8, 9]), ([1], [2, 3, 4, 256])]
    bound = forward_error(engine.model.config, 5) * largest_logit(engine.model, rows)
    for (prompt, answer), scores in zip(rows, answer_logprobs(engine.model, rows), strict=True):
        with torch.no_grad():
            table = torch.log_softmax(engine.model(input_ids=torch.tensor([prompt + answer])).logits[0], -1)
        expected = [table[len(prompt) - 1 + n, token].item() for n, token in enumerate(answer)]
        assert scores == pytest.approx(expected, abs=bound)


def test_answer_logprobs_of_a_learnt_row_are_near_zero(engine: hf.TransformersEngine) -> None:
    row = encode(engine.tokenizer, *ENDS)
    [scores] = answer_logprobs(engine.model, [(row.ids[: row.n_prompt], row.ids[row.n_prompt :])])
    assert len(scores) == len(ENDS[1].encode()) + 1
    assert math.exp(-sum(scores) / len(scores)) < 1.1


def test_load_of_faulty_folder_raises_error_with_its_path(folder: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"adapter_config\.json is missing"):
        load(folder, tmp_path, quantization="none", precision="fp32")
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        load(tmp_path, None, quantization="none", precision="fp32")
    for path in adapter.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "r": 8}), "utf-8")
    with pytest.raises(ArtifactError, match="does not fit its base"):
        load(folder, tmp_path, quantization="none", precision="fp32")


def test_answer_logprobs_in_parts_equal_those_of_all_logits(tiny: Path) -> None:
    model = load_base(tiny, "none", "fp32")
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 250, (2 * SCORE_ROWS + 90,), generator=draw).tolist()
    rows = [(ids[:9], ids[9:]), (ids[:1], ids[1 : SCORE_ROWS + 1]), (ids[:80], ids[80:81])]
    bound = forward_error(model.config, len(ids)) * largest_logit(model, rows)
    for (prompt, answer), found in zip(rows, answer_logprobs(model, rows), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        whole = torch.log_softmax(logits.float(), dim=-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
        assert found == pytest.approx(whole, abs=bound)
        # A mean of errors that go up and down alike: one is as large as the bound, many cancel.
        assert math.fsum(found) == pytest.approx(math.fsum(whole), abs=bound * math.sqrt(len(found)))
