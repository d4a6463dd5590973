"""prompt/served_files.py: every file names the end of an answer as EOS, and the template that is served."""

from support.models.chat_templates import CHATML, ENDS_TWICE, EOS, FACTS

from tutor.prompt.jinja import render_template
from tutor.prompt.served_files import (
    served_generation_config,
    served_model_config,
    served_special_tokens,
    served_tokenizer_config,
)
from tutor.prompt.template_analysis import analyse_template
from tutor.prompt.tutor_format import TUTOR, chat_template

PROMPT = analyse_template(CHATML, FACTS, where="base", reasoning="none")
END = FACTS.added["<|im_end|>"]


def test_end_of_an_answer_is_eos_in_all_files():
    given = {"eos_token": EOS, "chat_template": "old", "model_max_length": 8}
    written = served_tokenizer_config(given, PROMPT, add_bos=False)
    assert written == {"eos_token": "<|im_end|>", "chat_template": PROMPT.template, "model_max_length": 8}
    assert served_tokenizer_config({}, PROMPT, add_bos=True)["chat_template"] == PROMPT.chat_template(add_bos=True)
    properties = {"content": EOS, "lstrip": False}
    assert served_special_tokens({"eos_token": properties, "pad_token": EOS}, PROMPT) == {
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "pad_token": EOS,
    }
    assert served_model_config({"eos_token_id": [1, 2], "bos_token_id": 3}, PROMPT) == {
        "eos_token_id": END,
        "bos_token_id": 3,
    }
    nested = served_model_config({"text_config": {"eos_token_id": 1, "vocab_size": 9}}, PROMPT)
    assert nested == {"eos_token_id": END, "text_config": {"eos_token_id": END, "vocab_size": 9}}


def test_answer_ends_at_the_base_s_own_ends_too():
    ends = {
        given: served_generation_config({"eos_token_id": given}, PROMPT)["eos_token_id"] for given in (1, END, None)
    }
    assert ends == {1: [END, 1], END: END, None: END}
    assert served_generation_config({"eos_token_id": [1, END]}, PROMPT) == {"eos_token_id": [END, 1]}


def test_tutor_s_format_leaves_eos_as_it_is():
    given = {"eos_token": EOS, "eos_token_id": [1, 2]}
    assert served_tokenizer_config(given, TUTOR, add_bos=True) == {
        **given,
        "chat_template": chat_template(add_bos=True),
    }
    for served in (served_special_tokens, served_model_config, served_generation_config):
        assert served(given, TUTOR) == given


def test_template_keeps_the_meaning_of_eos():
    """A template that writes `eos_token` writes the base's, though EOS has another name in the merged model."""
    prompt = analyse_template(ENDS_TWICE, FACTS, where="base", reasoning="none")
    messages = [{"role": "user", "content": "a"}]
    written = render_template(prompt.template, messages, add_generation_prompt=False, eos_token=prompt.end)
    assert written == f"<|user|>\na<|end|>\n{EOS}"
