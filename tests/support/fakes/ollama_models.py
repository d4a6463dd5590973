"""The models of the fake Ollama: their files, and how they render prompts and split answers (docs/facts.md)."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from support.models.gguf_bytes import field, tensor, text, texts, whole
from tutor.prompt.jinja import render_template

TOOL_WORDS, THINK_WORDS = ("tools", "tool_call"), ("<think>", "</think>")
CAPABILITY_WORDS = (*TOOL_WORDS, *THINK_WORDS)
"""Words in a GGUF's template that make Ollama >= 0.30 prefer it to the Modelfile's (docs/facts.md, 1)."""
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
KNOWN = {"chatml": (CHATML, "{{- range .Messages }}<|im_start|>{{ .Role }} ...", ["<|im_start|>", "<|im_end|>"])}
"""Jinja templates that Ollama recognises, each with its own Go template and stop texts for it."""
BOS = "<｜begin▁of▁sentence｜>"
"""Text of the token that tokenizers add; llama.cpp takes it from the beginning of a prompt."""
LIMIT = 100
"""Number of characters by which a template may differ from a known one and is still recognised."""
MARK = field("fake.facts", 8, b"")
"""Bytes before the facts in a file."""


def gguf(
    *,
    quantization: str = "Q8_0",
    chat_template: str = "",
    kind: str = "model",
    size: int = 2000,
    info: dict[str, str] | None = None,
    family: str = "llama",
    tokens: Sequence[str] = (),
) -> bytes:
    """Return a GGUF of at least `size` bytes; /api/show returns the key-values `info` of it.

    The first of `tokens` is its EOS.
    """
    header = {"quantization": quantization, "chat_template": chat_template, "kind": kind, "family": family}
    header |= {"info": info or {}, "size": size}
    fields = [field("general.architecture", 8, text(family))]
    fields += [field("tokenizer.chat_template", 8, text(chat_template))] if chat_template else []
    if tokens:
        fields += [texts("tokenizer.ggml.tokens", tokens), field("tokenizer.ggml.eos_token_id", 4, bytes(4))]
    fields += [field("fake.facts", 8, text(json.dumps(header)))]
    empty = len(whole(tuple(fields), (tensor(),), b""))
    numbers = max(size - empty, 4) // 4
    return whole(tuple(fields), (tensor(shape=(numbers,)),), b"x" * (4 * numbers))


def facts_of(data: bytes) -> dict[str, Any]:
    """Return the facts of a file of `gguf`."""
    start = data.index(MARK) + len(MARK) + 8
    facts: dict[str, Any] = json.loads(data[start : start + int.from_bytes(data[start - 8 : start], "little")])
    return facts


class Model:
    """A model on the server."""

    def __init__(self, body: dict[str, Any], facts: dict[str, Any], blob: str) -> None:
        self.body = body
        self.facts = facts
        self.blob = blob
        self.digest = hashlib.sha256(json.dumps([body, blob], sort_keys=True).encode()).hexdigest()

    @property
    def recognised(self) -> str | None:
        """The name of the known template that the file's resembles, where the request has none."""
        mine = self.facts["chat_template"]
        names = [name for name, (known, *_) in KNOWN.items() if known in mine and len(mine) - len(known) < LIMIT]
        return names[0] if names and "template" not in self.body else None

    @property
    def template(self) -> str:
        """The Go template of the model; empty where it has none."""
        return KNOWN[self.recognised][1] if self.recognised else str(self.body.get("template", ""))

    @property
    def thinks(self) -> bool:
        """Whether the template in use has thoughts."""
        return self.native and all(word in self.facts["chat_template"] for word in THINK_WORDS)

    @property
    def capabilities(self) -> list[str]:
        tools = self.native and any(word in self.facts["chat_template"] for word in TOOL_WORDS)
        return [*(["tools"] if tools else []), *(["thinking"] if self.thinks else []), "completion"]

    @property
    def native(self) -> bool:
        """Whether the GGUF's own template is in use: it has a capability word or is alone, and no parser is set."""
        mine = self.facts["chat_template"]
        declares_more = any(word in mine for word in CAPABILITY_WORDS)
        return bool(mine) and (declares_more or not self.template) and "parser" not in self.body

    def render(self, messages: list[dict[str, str]], *, think: bool | None = None) -> str:
        system = self.body.get("system", "")
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        if not self.native:
            return legacy(self.template or "{{ .Prompt }}", messages)
        *before, last = messages
        prefill = ("".join(THINK_WORDS) if self.thinks else "") + last["content"] if last["role"] == "assistant" else ""
        values = {"add_generation_prompt": True, "enable_thinking": think is not False, "bos_token": BOS}
        prompt = render_template(self.facts["chat_template"], before if prefill else messages, **values)
        return prompt.removeprefix(BOS) + prefill


def legacy(template: str, messages: list[dict[str, str]]) -> str:
    """Go's legacy mode for templates with .System, .Prompt and .Response: once a turn, the last one cut."""
    turns: list[dict[str, str]] = [{}]
    for message in messages:
        name = {"system": "System", "user": "Prompt", "assistant": "Response"}[message["role"]]
        if name != "Response" and "Prompt" in turns[-1]:
            turns.append({})
        turns[-1][name] = message["content"]
    parts = []
    for turn in turns:
        last = turn is turns[-1]
        text = template.partition("{{ .Response }}")[0] + "\0" if last else template
        system = "" if not turn.get("System") else r"\1"  # for Go's `if`, an empty text is none
        text = re.sub(r"{{ if \.System }}(.*?){{ end }}", system, text, flags=re.S)
        text = re.sub(r"{{ \.(System|Prompt|Response) }}", lambda m: turn.get(m[1], ""), text)  # noqa: B023
        parts.append(text.replace("\0", turn.get("Response", "")))
    return "".join(parts)


class Thought(str):
    """A piece of a thought."""


def split_thought(pieces: list[tuple[str, float]], *, opened: bool) -> Iterator[tuple[str, float]]:
    """The pieces of an answer as a chat sends them: tags are dropped, and a thought has another field."""
    opening, closing = THINK_WORDS
    for piece, logprob in pieces:
        if piece in THINK_WORDS:
            opened = piece == opening
        elif closing in piece:
            raise AssertionError("a tag is one piece")
        else:
            yield (Thought(piece) if opened else piece), logprob


def write_gguf(path: Path, **facts: Any) -> str:
    """Write a fake GGUF; return its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = gguf(**facts)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
