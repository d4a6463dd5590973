"""Rows as ids: the served prompt, the answer, its end; several turns; and a name for each fault of a row."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models.small_tokenizer import BOS, EOS, SENTENCES, make_tokenizer
from support.prompts import texts

from tutor.errors import DataError
from tutor.prompt.encoding import Encoded, RowEncoder, adds_bos, audit, encode
from tutor.prompt.format import asked_messages
from tutor.prompt.messages import conversation, row_messages, trim
from tutor.prompt.tutor_format import TUTOR, TutorFormat, chat_template, completion, render


def served(tokenizer: Any, question: str, system: str = "") -> list[int]:
    """The ids that an engine sends: the tokenized rendered text."""
    return list(tokenizer(render(conversation(question, system)))["input_ids"])


@given(system=st.sampled_from(["", "Eres un tutor."]), question=texts, answer=texts.filter(str.strip))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_encoded_row_is_served_prompt_then_answer_then_eos(tokenizer, system, question, answer):
    row = encode(tokenizer, question, answer, system)
    prompt = served(tokenizer, question, system)
    assert row.ids[: row.n_prompt] == prompt
    assert row.mask == [0] * len(prompt) + [1] * (len(row.ids) - len(prompt))
    assert row.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.ids[row.n_prompt : -1]) == f" {trim(answer)}"


def test_encoded_row_has_one_bos_if_the_tokenizer_adds_bos(tokenizer):
    row = encode(tokenizer, "¿Qué es any?", "Un tipo.", "Eres un tutor.")
    assert row.ids.count(tokenizer.bos_token_id) == int(adds_bos(tokenizer))
    assert row.ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("system", ["", "Eres un tutor."])
def test_apply_chat_template_returns_the_trained_ids(tokenizer, system):
    tokenizer.chat_template = chat_template(add_bos=adds_bos(tokenizer))
    for question in (*SENTENCES, "{{ bos_token }} 👩‍💻"):
        messages = conversation(question, system)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        row = encode(tokenizer, question, "Sí.", system)
        assert list(ids) == row.ids[: row.n_prompt]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == (BOS if adds_bos(tokenizer) else "") + render(messages)


words = st.lists(st.sampled_from(" ".join(SENTENCES).split()), min_size=1).map(" ".join)


@given(question=words, answer=words | words.map(lambda text: f"```ts\n{text}\n```"))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_encoded_row_has_the_tokens_of_the_whole_text(tokenizer, question, answer):
    """A served prompt and its answer have the tokens of the text tokenized in one piece."""
    whole = tokenizer(render(conversation(question)) + completion(answer))["input_ids"]
    assert encode(tokenizer, question, answer).ids[:-1] == whole


def test_encode_without_an_eos_token_raises():
    made = make_tokenizer(add_bos=True)
    made.eos_token = None
    with pytest.raises(DataError, match="has no EOS token"):
        encode(made, "a", "b")


def test_adds_bos_measures_the_tokenizer_not_its_config():
    made = make_tokenizer(add_bos=False)
    made.init_kwargs["add_bos_token"] = True
    assert not adds_bos(made)


# The audit


def test_audit_of_an_encoded_row_finds_no_fault(tokenizer):
    for question in SENTENCES:
        assert audit(encode(tokenizer, question, "Sí."), served(tokenizer, question), tokenizer) == []


MISSING = "EOS is not supervised at the end"
OTHER = "the served prompt is not a prefix of the row"


@pytest.mark.parametrize(
    ("breach", "expected"),
    [
        (lambda ids, mask, eos: (ids[:-1], mask[:-1]), [MISSING]),
        (lambda ids, mask, eos: (ids, [*mask[:-1], 0]), [MISSING]),
        (lambda ids, mask, eos: (ids, [on and int(i != eos) for i, on in zip(ids, mask, strict=True)]), [MISSING]),
        (lambda ids, mask, eos: ([*ids, 5], [*mask, 1]), [MISSING]),
        (lambda ids, mask, eos: ([*ids, 5], [*mask, 0]), [MISSING]),
        (lambda ids, mask, eos: ([*ids, eos], [*mask, 1]), ["EOS is supervised more than once"]),
        (lambda ids, mask, eos: (ids, [*mask[:-2], 0, 1]), ["part of the completion carries no loss"]),
        (lambda ids, mask, eos: (ids, [0] * len(mask)), ["no token carries loss"]),
        (lambda ids, mask, eos: ([], []), ["no token carries loss"]),
        (lambda ids, mask, eos: (ids, [1] * len(mask)), [OTHER]),
        (lambda ids, mask, eos: ([*ids[:3], 5, *ids[3:]], [0, *mask]), [OTHER]),
        (lambda ids, mask, eos: (ids[:2] + ids[3:], mask[1:]), [OTHER]),
    ],
    ids=[
        *("EOS cut away", "EOS masked", "EOS masked as pad", "something behind EOS", "padding behind EOS", "EOS twice"),
        *("a hole", "all masked", "no ids", "loss on the prompt", "a token more", "a token less"),
    ],
)
def test_audit_names_each_fault_of_a_row(tokenizer, breach, expected):
    row = encode(tokenizer, "¿Qué es any?", "Un tipo que lo es todo.")
    assert 5 not in row.ids[:4]
    found = audit(
        Encoded(*breach(row.ids, row.mask, tokenizer.eos_token_id)), served(tokenizer, "¿Qué es any?"), tokenizer
    )
    assert found == expected


def test_audit_names_a_wrong_number_of_bos(tokenizer):
    row = encode(tokenizer, "a", "b")
    prompt = served(tokenizer, "a")
    expected = int(adds_bos(tokenizer))
    doubled = Encoded([tokenizer.bos_token_id, *row.ids], [0, *row.mask])
    assert audit(doubled, prompt, tokenizer) == [f"{expected + 1} BOS tokens instead of {expected}", OTHER]
    # A trainer and an engine that both add one BOS too many agree with each other.
    assert audit(doubled, [tokenizer.bos_token_id, *prompt], tokenizer) == [
        f"{expected + 1} BOS tokens instead of {expected}"
    ]
    if expected:
        without = Encoded(row.ids[1:], row.mask[1:])
        assert audit(without, prompt, tokenizer) == ["0 BOS tokens instead of 1", OTHER]
    in_text = encode(tokenizer, f"¿Qué es {BOS}?", "Nada.")
    assert audit(in_text, served(tokenizer, f"¿Qué es {BOS}?"), tokenizer) == [
        f"{expected + 1} BOS tokens instead of {expected}"
    ]


@pytest.mark.parametrize("add_bos", [True, False])
def test_audit_finds_eos_masked_as_padding(add_bos):
    """SmolLM2 and the tiny model pad with EOS: the language-model collator of transformers then masks every EOS."""
    made = make_tokenizer(add_bos=add_bos, pad=EOS)
    row = encode(made, "a", "b")
    assert audit(row, served(made, "a"), made) == []
    masked = [0 if token == made.pad_token_id else on for token, on in zip(row.ids, row.mask, strict=True)]
    assert audit(Encoded(row.ids, masked), served(made, "a"), made) == [MISSING]


class Fixed:
    """A tokenizer whose BOS and EOS are one token with the id 0, as in GPT-NeoX."""

    bos_token_id = eos_token_id = 0

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(sign) for sign in text]}


def test_audit_counts_a_token_that_is_bos_and_eos_as_both():
    row = encode(Fixed(), "a", "b")
    prompt = served(Fixed(), "a")
    assert audit(row, prompt, Fixed()) == []
    assert audit(Encoded([*row.ids, 0], [*row.mask, 1]), prompt, Fixed()) == ["EOS is supervised more than once"]
    assert "2 BOS tokens instead of 1" in audit(Encoded([0, *row.ids], [0, *row.mask]), prompt, Fixed())


# Several turns

HISTORY = [{"role": "user", "content": "¿Qué es any?"}, {"role": "assistant", "content": "Un tipo."}]
ROW = {"instruction": "¿Y unknown?", "response": "Otro tipo.", "history": HISTORY}


class Marked(TutorFormat):
    """A format whose history has the end-of-turn token that was taught, as ChatML's has."""

    def render(self, messages):
        """Return turns that end with EOS."""
        return "".join(f"{each['content']}{EOS if each['role'] == 'assistant' else ': '}" for each in messages)

    def history(self, answer):
        """Return the answer as it is."""
        return answer

    def completion(self, answer):
        """Return the answer alone."""
        return answer["content"]


def test_answers_share_ids_where_the_history_continues_them(tokenizer):
    (row,) = RowEncoder(tokenizer, Marked(), "").encode(ROW)
    first, second = row.answers()
    assert tokenizer.decode(first[1]) == f"Un tipo.{EOS}"
    assert tokenizer.decode(second[1]) == f"Otro tipo.{EOS}"
    assert second[0] == tokenizer(Marked().render(row_messages(ROW, "")))["input_ids"]
    assert audit(row, first[0], tokenizer, Marked()) == []


def test_answers_have_own_rows_where_the_history_differs(tokenizer):
    rows = RowEncoder(tokenizer, system="Sé breve.").encode(ROW)
    asked = [
        conversation("¿Qué es any?", "Sé breve."),
        [*conversation("¿Qué es any?", "Sé breve."), TUTOR.history(HISTORY[1]), *conversation("¿Y unknown?")],
    ]
    assert [row.ids[: row.n_prompt] for row in rows] == [tokenizer(render(each))["input_ids"] for each in asked]
    assert [tokenizer.decode(row.answers()[0][1]) for row in rows] == [f" Un tipo.{EOS}", f" Otro tipo.{EOS}"]
    assert all(audit(row, row.ids[: row.n_prompt], tokenizer) == [] for row in rows)


def test_loss_on_the_last_answer_alone_leaves_the_others_out(tokenizer):
    assert RowEncoder(tokenizer, system="", loss="last").encode(ROW) == RowEncoder(tokenizer, system="").encode(ROW)[1:]
    (row,) = RowEncoder(tokenizer, Marked(), "", "last").encode(ROW)
    assert [tokenizer.decode(answer) for _, answer in row.answers()] == [f"Otro tipo.{EOS}"]


def test_system_text_of_a_row_replaces_the_recipes(tokenizer):
    own = {**ROW, "history": [{"role": "system", "content": "Del dato."}]}
    assert RowEncoder(tokenizer, system="De la receta.").encode(own) == [
        encode(tokenizer, "¿Y unknown?", "Otro tipo.", "Del dato.")
    ]


def test_audit_finds_an_earlier_answer_without_its_end(tokenizer):
    (row,) = RowEncoder(tokenizer, Marked(), "").encode(ROW)
    end = row.ids.index(tokenizer.eos_token_id)
    holed = Encoded(row.ids, [*row.mask[:end], 0, *row.mask[end + 1 :]])
    assert audit(holed, row.ids[: row.n_prompt], tokenizer, Marked()) == ["part of the completion carries no loss"]


def test_prompt_of_the_last_answer_is_that_of_the_engines(tokenizer):
    encoder = RowEncoder(tokenizer, system="Sé breve.")
    asked = TUTOR.render(asked_messages(TUTOR, ROW, "Sé breve."))
    assert tokenizer(asked)["input_ids"] == encoder.answers(ROW)[-1][0]
