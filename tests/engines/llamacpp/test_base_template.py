"""prompt/base_format.py and own_format.py against the pinned llama-server, which renders a GGUF's template itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.models.chat_templates import BOS, CHATML, EOS, FACTS, NO_SYSTEM, OPENS, SUPPORTED

pytest.importorskip("torch")

from tutor.engines.llamacpp.convert import Conversion, to_gguf
from tutor.engines.llamacpp.server import serve
from tutor.engines.llamacpp.trace import rendered
from tutor.engines.protocol import Generation
from tutor.formats.models.pre_tokenizer import pre_tokenizer_name
from tutor.prompt.base_format import BaseFormat
from tutor.prompt.messages import Message
from tutor.prompt.own_format import OwnFormat
from tutor.prompt.template_analysis import analyse_template

QUESTION: Message = {"role": "user", "content": "¿Qué <es> & 'esto'?\n\n  {{ x }}"}
ANSWER: Message = {"role": "assistant", "content": "Un tipo.\n\n  Y más."}
SYSTEM: Message = {"role": "system", "content": "Sé breve.\n\n  Siempre."}
OTHER_EOS = 5
"""Id of a token that is not the EOS of the templates: a GGUF may name another one, and so does ours."""


@pytest.fixture(scope="module")
def with_template(real: None, chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a copy of the tiny model's GGUF with another chat template and another EOS."""
    import gguf
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    folder = tmp_path_factory.mktemp("templates")
    made = folder / "tiny-F16.gguf"
    to_gguf(Conversion(chat_model, made, pre_tokenizer_name(chat_model / "tokenizer.json")))

    def make(template: str) -> Path:
        reader = gguf.GGUFReader(made)
        writer = gguf.GGUFWriter(folder / "changed.gguf", "llama")
        string, number = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32
        changes = {
            gguf.Keys.Tokenizer.CHAT_TEMPLATE: MetadataDetails(string, template),
            gguf.Keys.Tokenizer.EOS_ID: MetadataDetails(number, OTHER_EOS),
        }
        copy_with_new_metadata(reader, writer, changes, [])
        return folder / "changed.gguf"

    return make


def talks(prompt: BaseFormat) -> list[list[Message]]:
    """Conversations that a format can write."""
    thought: Message = {**ANSWER, "reasoning": "Pienso."} if prompt.reasoning == "rows" else ANSWER
    found = [[QUESTION], [QUESTION, ANSWER, QUESTION], [QUESTION, thought, QUESTION, ANSWER, QUESTION]]
    found += [[SYSTEM, QUESTION], [SYSTEM, QUESTION, ANSWER, QUESTION]] * prompt.system
    return [*found, [QUESTION, {"role": "assistant", "content": "Un tip"}]] if prompt.prefill else found


@pytest.mark.llamacpp
@pytest.mark.parametrize("names", SUPPORTED, ids=" ".join)
def test_llama_server_renders_the_prompt_that_is_trained(with_template, tmp_path, names):
    prompt = analyse_template(SUPPORTED[names], FACTS, where="base", reasoning=names[1])
    gguf = with_template(prompt.chat_template(add_bos=True))
    with serve(gguf, context=512, threads=1, log=tmp_path / "log", own_template=True) as server:
        for messages in talks(prompt):
            expected = prompt.render(messages)
            assert rendered(server, messages) == expected
            for thinks in (True, False):
                sent = [{"reasoning_content" if k == "reasoning" else k: v for k, v in m.items()} for m in messages]
                body: dict[str, Any] = {"messages": sent, "chat_template_kwargs": {"enable_thinking": thinks}}
                assert server.post("/apply-template", body)["prompt"] == expected
        body = {"messages": [QUESTION], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        message = server.post("/v1/chat/completions", body)["choices"][0]["message"]
        in_thought = prompt.opened  # the server returns a text behind an open tag as a thought, any other as the answer
        assert bool(message.get("reasoning_content")) == in_thought
        assert bool(message["content"]) != in_thought


@pytest.mark.llamacpp
def test_llama_server_knows_when_a_template_was_not_fixed(with_template, tmp_path):
    """The values that are fixed matter: the base's own templates render another prompt in this server."""
    for name in ("MODES", "TRIMS", "BLANKS"):
        prompt = analyse_template(SUPPORTED[name, "none"], FACTS, where="base", reasoning="none")
        with serve(
            with_template(SUPPORTED[name, "none"]), context=512, threads=1, log=tmp_path / "log", own_template=True
        ) as server:
            messages = [QUESTION, ANSWER, QUESTION]
            assert rendered(server, messages) != prompt.render(messages)


@pytest.mark.llamacpp
@pytest.mark.parametrize("template", [CHATML, OPENS, NO_SYSTEM], ids=["CHATML", "OPENS", "NO_SYSTEM"])
def test_llama_server_renders_a_bases_own_prompt(with_template, tmp_path, template):
    own = OwnFormat.from_template(template, {"bos_token": BOS, "eos_token": EOS}, FACTS.added, add_bos=True)
    gguf = with_template(template)
    sampled = Generation(8, 0.8, 0.9, 1.0, 7, (), repeatable=True)
    with serve(gguf, context=512, threads=1, log=tmp_path / "log", own_template=True, prompt=own) as server:
        for messages in ([QUESTION], [QUESTION, ANSWER, QUESTION]):
            assert rendered(server, messages) == own.render(messages)
        first = server.answer([QUESTION], sampled)
        server.answer([QUESTION, ANSWER, QUESTION], sampled)
        again = server.answer([QUESTION], sampled)
        assert (again.text, again.thought, again.finish) == (first.text, first.thought, first.finish)
        assert first.prompt_tokens == len(server.tokenize(own.render([QUESTION])))
        assert bool(first.thought) == own.opened, "an opened thought of eight tokens has no end"
