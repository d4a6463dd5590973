"""engines/hf/engine.py on a model with known answers: ends, stop texts, characters, sampling, limits."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
from support.models.learnt_model import ENDS, GREEDY, RUNS_ON, ask
from transformers import GenerationConfig

from tutor.engines.hf.engine import INCOMPLETE, TransformersEngine, _generation_config
from tutor.errors import ServiceError
from tutor.prompt.messages import conversation

pytestmark = pytest.mark.usefixtures("one_thread")


def test_answer_ends_at_eos_without_sending_or_counting_it(engine: TransformersEngine) -> None:
    answer, pieces = ask(engine, ENDS[0])
    assert (answer.text, answer.finish) == (ENDS[1], "eos")
    assert answer.tokens == len(ENDS[1].encode())
    assert answer.prompt_tokens == len("Instrucción: a\nRespuesta:".encode())
    assert "".join(pieces) == answer.text
    assert answer.seconds > 0
    assert answer.tokens_per_second > 0


def test_stop_text_ends_answer_and_no_part_of_it_is_sent(engine: TransformersEngine) -> None:
    answer, pieces = ask(engine, RUNS_ON[0])
    assert (answer.text, answer.finish) == (" Año 👩‍💻\nInsisto.", "stop")
    assert "".join(pieces) == answer.text
    sent = ""
    for piece in pieces:
        sent += piece
        assert answer.text.startswith(sent)


def test_prefix_of_stop_text_without_the_rest_is_sent(engine: TransformersEngine) -> None:
    _, pieces = ask(engine, RUNS_ON[0])
    assert "\nInsi" in pieces, pieces


def test_answer_without_stop_texts_continues(engine: TransformersEngine) -> None:
    answer, _ = ask(engine, RUNS_ON[0], replace(GREEDY, stops=()))
    assert answer.text == RUNS_ON[1]


def test_characters_of_several_tokens_are_sent_complete(engine: TransformersEngine) -> None:
    for question in ("a", "b"):
        _, pieces = ask(engine, question)
        assert all(INCOMPLETE not in piece for piece in pieces)
    assert any("ñ" in piece for piece in pieces)


@pytest.mark.parametrize("tokens", range(1, 19))
def test_cut_answer_has_finish_length_and_complete_characters(engine: TransformersEngine, tokens: int) -> None:
    answer, pieces = ask(engine, ENDS[0], replace(GREEDY, max_new_tokens=tokens))
    assert (answer.finish, answer.tokens) == ("length", tokens)
    assert answer.text == ENDS[1].encode()[:tokens].decode("utf-8", "ignore")
    assert "".join(pieces) == answer.text


def test_equal_seeds_give_equal_samples_others_differ(engine: TransformersEngine) -> None:
    wild = replace(GREEDY, temperature=2.0, max_new_tokens=40)
    first, again, other = (ask(engine, "z", replace(wild, seed=seed))[0].text for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_sampling_applies_top_p_and_no_default_top_k(engine: TransformersEngine) -> None:
    narrow = replace(GREEDY, temperature=1.0, top_p=1e-6)
    assert ask(engine, ENDS[0], narrow)[0].text == ENDS[1]
    config = _generation_config(replace(GREEDY, temperature=2.0), 10, engine)
    assert config.top_k == 0
    assert engine.model.generation_config.to_diff_dict() == GenerationConfig().to_diff_dict()


def test_full_context_ends_answer_and_longer_prompt_is_error(engine: TransformersEngine) -> None:
    room = 160 - len("Instrucción: \nRespuesta:".encode())
    answer, _ = ask(engine, "x" * (room - 1), replace(GREEDY, stops=()))
    assert answer.tokens <= 1
    with pytest.raises(ServiceError, match="160 tokens"):
        ask(engine, "x" * room)


def test_interrupted_answer_does_not_change_the_engine(engine: TransformersEngine) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.answer(conversation("a"), GREEDY, interrupt)
    assert ask(engine, ENDS[0])[0].text == ENDS[1]
