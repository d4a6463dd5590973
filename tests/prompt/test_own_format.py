"""prompt/own_format.py: the base's original template, thoughts that it opens, bases without a template."""

import pytest
from support.models import chat_templates
from support.models.chat_templates import BOS, CHATML, EOS, FACTS, NO_SYSTEM, OPENS, TRIMS

from tutor.prompt.format import AnswerText, SplitAnswer
from tutor.prompt.messages import Message, conversation, with_line
from tutor.prompt.own_format import OwnFormat

TOKENS = {"bos_token": BOS, "eos_token": EOS}


def own(template: str, *, add_bos: bool = True) -> OwnFormat:
    return OwnFormat.from_template(template, TOKENS, FACTS.added, add_bos=add_bos)


def test_prompt_is_that_of_the_template():
    assert own(CHATML).render(conversation("¿Qué?")) == "<|im_start|>user\n¿Qué?<|im_end|>\n<|im_start|>assistant\n"
    assert own(OPENS).render(conversation("¿Qué?")) == "<｜User｜>¿Qué?<｜Assistant｜><think>\n"
    assert own(OPENS, add_bos=False).render(conversation("¿Qué?")).startswith(f"{BOS}<｜User｜>")


@pytest.mark.parametrize(
    ("template", "end"),
    [(CHATML, "<|im_end|>"), (OPENS, EOS), (TRIMS, "<|eot_id|>"), (NO_SYSTEM, "<end_of_turn>"), ("", None)],
)
def test_end_of_turn_is_the_token_behind_an_answer(template, end):
    assert own(template).end_id == FACTS.added.get(end)


def test_opened_thought_is_cut_off_and_without_end_is_no_answer():
    assert own(OPENS).reply("Veamos.\n</think>\n\nEs un tipo.") == SplitAnswer("Veamos.", "Es un tipo.")
    assert own(OPENS).reply("Veamos. Y además") == SplitAnswer("Veamos. Y además", "")


def test_thought_that_the_model_opens_is_cut_off():
    assert own(CHATML).reply("<think>Veamos.</think>\nEs un tipo.") == SplitAnswer("Veamos.", "Es un tipo.")
    assert own(CHATML).reply("<think>Veamos.") == SplitAnswer("Veamos.", "")
    assert own(CHATML).reply("Es <think> un tipo.") == SplitAnswer("", "Es <think> un tipo.")


def test_thought_is_streamed_apart():
    answers: list[str] = []
    thoughts: list[str] = []
    text = AnswerText(own(OPENS), answers.append, thoughts.append)
    for piece in ("Vea", "mos.\n</th", "ink>\n\nEs", " un tipo."):
        text.add(piece)
    assert ("".join(thoughts), "".join(answers)) == ("Veamos.", "Es un tipo.")


def test_system_text_without_a_place_goes_before_question():
    asked = conversation("¿Qué?", "Sé breve.")
    assert (
        own(NO_SYSTEM).render(asked) == "<start_of_turn>user\nSé breve.\n\n¿Qué?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert own(CHATML).render(asked).startswith("<|im_start|>system\nSé breve.<|im_end|>\n")


def test_base_without_a_template_gets_the_plain_question():
    turns: list[Message] = [*conversation("¿Qué?"), {"role": "assistant", "content": "Eso."}, *conversation("¿Y?")]
    assert own("").render(conversation("¿Qué?")) == "¿Qué?"
    assert own("").render(turns) == "¿Qué?\n\nEso.\n\n¿Y?"
    assert not own("").thinks


def test_template_that_refuses_a_question_raises_its_reason():
    with pytest.raises(ValueError, match="refuses this conversation: no user"):
        own("{{ raise_exception('no user') }}")


def test_thinks_where_the_template_has_the_tags():
    assert (own(OPENS).thinks, own(chat_templates.SWITCH).thinks, own(CHATML).thinks) == (True, True, False)
    assert (own(chat_templates.SWITCH).think, own(CHATML).think) == (True, None)


def test_line_is_a_paragraph_of_the_last_question():
    turns: list[Message] = [*conversation("¿Qué?"), {"role": "assistant", "content": "Eso."}, *conversation("¿Y?")]
    assert [each["content"] for each in with_line(turns, "Responde.")] == ["¿Qué?", "Eso.", "¿Y?\n\nResponde."]
    assert with_line(turns, "") == turns
