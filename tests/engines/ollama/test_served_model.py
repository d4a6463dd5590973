"""engines/ollama/served_model.py, prompts.py and trace.py with templates of a base, against the fake server."""

from typing import Any

import pytest
from support.fakes import ollama as fake
from support.fakes.ollama import FakeOllama
from support.models.chat_templates import CHATML, FACTS, OPENS, SUPPORTED, SWITCH

from tutor.engines.ollama.client import Ollama
from tutor.engines.ollama.engine import OllamaServer
from tutor.engines.ollama.prompts import check_prompts
from tutor.engines.ollama.served_model import Description, check_answer, check_description, differences
from tutor.engines.ollama.trace import trace
from tutor.engines.protocol import Generation
from tutor.errors import GateError, ServiceError
from tutor.prompt.base_format import BaseFormat
from tutor.prompt.format import SplitAnswer
from tutor.prompt.messages import conversation
from tutor.prompt.template_analysis import analyse_template

GREEDY = Generation(24, 0.0, 1.0, 1.0, 7, ())
THOUGHT = ["<think>", "\n", "Pienso", ".", "\n", "</think>", "\n\n", "Una", " interfaz", "."]
"""Tokens of an answer with a thought; of R1, whose prompt has the first two."""
SYSTEM = "Eres «tutor»."


def base_format(template: str, reasoning: Any = "none") -> BaseFormat:
    return analyse_template(template, FACTS, where="base", reasoning=reasoning)


def put(server: FakeOllama, template: str, **body: Any) -> None:
    """Put a model without TEMPLATE on the server, whose file has a template of its own."""
    facts = {"quantization": "Q8_0", "chat_template": template}
    server.models["own:latest"] = fake.Model({"system": SYSTEM, **body}, facts, "")


def described(prompt: BaseFormat, template: str) -> Description:
    capabilities = ("thinking", "completion") if prompt.think is not None else ("completion",)
    return Description(template, SYSTEM, {}, capabilities, "llama", "Q8_0")


def pieces(server: FakeOllama, texts: list[str]) -> None:
    server.reply_to = lambda _: [(text, -0.1) for text in texts]


@pytest.mark.parametrize(("name", "reasoning"), SUPPORTED)
def test_templates_of_bases_are_rendered_as_in_training(
    server: FakeOllama, api: Ollama, name: str, reasoning: str
) -> None:
    prompt = base_format(SUPPORTED[name, reasoning], reasoning)
    system = SYSTEM if prompt.system else ""
    put(server, prompt.chat_template(add_bos=True), system=system)
    check_description(
        api,
        "own",
        Description(
            prompt.chat_template(add_bos=True), system, {}, described(prompt, "").capabilities, "llama", "Q8_0"
        ),
        is_native=True,
    )
    assert check_prompts(api, "own", system, prompt) >= 6


def test_template_that_ollama_replaces_is_refused_by_name(server: FakeOllama, api: Ollama) -> None:
    chatml = fake.KNOWN["chatml"][0]
    put(server, chatml)
    prompt = base_format(chatml)
    expected = described(prompt, chatml)
    with pytest.raises(GateError, match=r"template is '.*range .Messages.*took it for 'chatml', and serves .* its own"):
        check_description(api, "own", expected, is_native=True, recognised="chatml")
    put(server, prompt.chat_template(add_bos=True))
    check_description(api, "own", described(prompt, prompt.chat_template(add_bos=True)), is_native=True)


def test_tools_of_a_template_are_no_difference_and_thoughts_are() -> None:
    shown = {"template": "x", "capabilities": ["tools", "thinking", "completion"], "details": {"family": "qwen3"}}
    without = Description("x", "", {}, ("completion",), "qwen3", "")
    assert [line.partition(" ")[0] for line in differences(shown, without, is_native=True)] == ["capabilities"]
    assert differences(shown, Description("x", "", {}, ("thinking", "completion"), "qwen3", ""), is_native=True) == []
    assert differences(shown, Description("x", "", {}, ("thinking", "completion"), "qwen3", "")) != []


def test_prompt_of_a_client_without_think_is_compared_too(server: FakeOllama, api: Ollama) -> None:
    """The switch is not fixed in this file: the server sets it to what a request says, and to true without."""
    put(server, SWITCH)
    with pytest.raises(GateError, match="gets another prompt than in training: /api/chat sends"):
        check_prompts(api, "own", SYSTEM, base_format(SWITCH, "empty"))


def test_server_without_rendered_prompts_cannot_prove_a_template(server: FakeOllama, api: Ollama) -> None:
    prompt = base_format(CHATML)
    put(server, prompt.chat_template(add_bos=True))
    server.shows_prompts = False
    with pytest.raises(GateError, match="does not return its prompts, so that nothing shows which template"):
        check_prompts(api, "own", SYSTEM, prompt)
    rows = base_format(OPENS, "rows")
    put(server, rows.chat_template(add_bos=True))
    with pytest.raises(ServiceError, match="without which thoughts cannot be compared"):
        trace(api, "own", conversation("Hola"), 4, rows)


@pytest.mark.parametrize(("template", "texts"), [(SWITCH, THOUGHT), (OPENS, THOUGHT[2:])], ids=["Qwen3", "R1"])
def test_thought_and_answer_are_apart(server: FakeOllama, api: Ollama, template: str, texts: list[str]) -> None:
    prompt = base_format(template, "rows")
    put(server, prompt.chat_template(add_bos=True))
    pieces(server, texts)
    received: list[str] = []
    answer = OllamaServer(api, "own", prompt).answer(conversation("Hola"), GREEDY, received.append)
    assert (answer.thought, answer.text) == ("Pienso.", "Una interfaz.")
    assert prompt.reply("".join(received)) == SplitAnswer("Pienso.", "Una interfaz.")
    asked = server.bodies("POST /api/chat")[-1]
    assert (asked["think"], asked["options"]["stop"]) == (True, [])
    assert check_answer(api, "own", prompt).thought == "Pienso."
    assert trace(api, "own", conversation("Hola"), 16, prompt).text == "".join(texts)
    assert server.bodies("POST /api/generate")[-1]["raw"] is True


def test_thought_without_an_end_has_no_answer(server: FakeOllama, api: Ollama) -> None:
    prompt = base_format(OPENS, "rows")
    put(server, prompt.chat_template(add_bos=True))
    pieces(server, ["Pienso", " y", " pienso"])
    answer = OllamaServer(api, "own", prompt).answer(conversation("Hola"), GREEDY)
    assert (answer.thought, answer.text) == ("Pienso y pienso", "")
    assert check_answer(api, "own", prompt).thought == "Pienso y pienso"


def test_tags_that_no_engine_prints_are_refused(server: FakeOllama, api: Ollama) -> None:
    """As of control tokens: a chat has the thought, and the generated text no tag around it."""
    prompt = base_format(SWITCH, "rows")
    put(server, prompt.chat_template(add_bos=True))
    printed = [text for text in THOUGHT if "think>" not in text]
    server.script("POST /api/generate", fake.stream(*map(fake.completion, printed), LAST))
    pieces(server, THOUGHT)
    with pytest.raises(GateError, match=r"separates thoughts otherwise than its format.*the thought 'Pienso\.'"):
        check_answer(api, "own", prompt)


LAST = {"done": True, "done_reason": "stop", "prompt_eval_count": 3, "eval_count": 4}


def test_continued_answer_and_earlier_thoughts_are_not_sent(server: FakeOllama, api: Ollama) -> None:
    prompt = base_format(OPENS, "rows")
    put(server, prompt.chat_template(add_bos=True))
    engine = OllamaServer(api, "own", prompt)
    answered = {"role": "assistant", "content": "Hola.", "reasoning": "Saludo."}
    with pytest.raises(ValueError, match=r"continue an answer .* in different ways"):
        engine.answer([*conversation("Hola"), answered], GREEDY)
    engine.answer([*conversation("Hola"), answered, *conversation("¿Y?")], GREEDY)
    assert server.bodies("POST /api/chat")[-1]["messages"][1] == {"role": "assistant", "content": "Hola."}
