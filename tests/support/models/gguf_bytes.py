"""GGUF files byte by byte, and the facts of a base."""

import struct
from collections.abc import Sequence
from typing import Any

from tutor.formats.models.model_folder import Facts


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def texts(name: str, values: Sequence[str]) -> bytes:
    return field(name, 9, struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values)))


ARCHITECTURE = field("general.architecture", 8, text("llama"))


def tensor(name: str = "a", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def whole(
    fields: tuple[bytes, ...] = (ARCHITECTURE,),
    tensors: tuple[bytes, ...] = (tensor(),),
    data: bytes = b"\1" * 32,
    alignment: int = 32,
    head: bytes = b"GGUF" + struct.pack("<I", 3),
) -> bytes:
    """A GGUF file from its parts; by default with one F32 vector of 8 numbers."""
    content = head + struct.pack("<QQ", len(tensors), len(fields)) + b"".join(fields) + b"".join(tensors)
    return content + b"\0" * (-len(content) % alignment) + data


def facts(**other: Any) -> Facts:
    values: dict[str, Any] = {"source": "tiny", "model": "model", "weights": "0", "vocabulary": 3, "add_bos": True}
    return Facts(**{**values, "bos": 0, "eos": 1, "pad": None, "pre_tokenizer": "llama-bpe", **other})
