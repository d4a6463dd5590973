"""Change a valid input at random: bytes, JSON values, TOML lines.

In: a valid input and a seeded generator. Out: the changed input; one seed gives one input. Does not check what a reader
makes of it.
"""

import copy
import json
import struct
from random import Random
from typing import Any

INTEGERS = (0, 1, 2, 31, 32, 33, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 63) - 1, (1 << 64) - 1)
"""Counts, lengths and offsets at the limits of their types."""
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 1 << 31, 1 << 63, -(1 << 63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "x" * 70_000, "\0", "\ud800", "\x1b]52;c;eA==\x07", "\u202e", "../../etc/passwd", "/dev/zero", "<s>",
    "<|im_end|>", "{{ .Prompt }}", "%s%n", "hf_" + "A" * 34, [], {}, [[]], [None], {"": None}, {"type": "x"},
)  # fmt: skip
"""Values of every JSON type that readers are not expected to meet."""
TEXTS = (
    b"",
    b"\0",
    b"\n",
    b"\r\n",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"{",
    b"}",
    b"[" * 5000,
    b'"',
    b"\\u0000",
    b"9" * 5000,
)
"""Pieces of bytes to insert."""
FORMS = (">I", "<I", "<Q", "<B")
"""struct's forms of the integers that replace bytes."""


def bytes_of(raw: bytes, random: Random) -> bytes:
    """Return the bytes with one to three changes: a cut, an insertion, a doubled or removed part, integers, bits."""
    changed = bytearray(raw)
    for _ in range(random.randint(1, 3)):
        start = random.randrange(len(changed) + 1)
        end = min(len(changed), start + random.choice((1, 4, 8, 64, 4096)))
        action = random.randrange(6)
        if action == 0:
            del changed[start:]
        elif action == 1:
            changed[start:start] = random.choice(TEXTS)
        elif action == 2:
            changed[start:start] = changed[start:end]
        elif action == 3:
            del changed[start:end]
        elif action == 4:
            form = random.choice(FORMS)
            limit = 1 << 8 * struct.calcsize(form)
            number = struct.pack(form, random.choice(INTEGERS) % limit)
            changed[start : start + len(number)] = number
        elif changed:
            changed[start % len(changed)] ^= 1 << random.randrange(8)
    return bytes(changed)


def value_of(value: Any, random: Random) -> Any:
    """Return a copy of a JSON value with one to three values replaced, removed, renamed, nested or doubled."""
    root = [copy.deepcopy(value)]
    for _ in range(random.randint(1, 3)):
        holder, key = random.choice(_places(root))
        if key is None:
            continue
        action = random.randrange(6)
        if action == 0 and holder is not root:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[random.choice(("", "x", "Instruction", "__metadata__", "\u200b" + str(key)))] = holder.pop(key)
        elif action == 2:
            holder[key] = _nested(holder[key], random.choice((1, 2, 30)))
        elif action == 3 and isinstance(holder[key], str):
            holder[key] += random.choice([item for item in VALUES if isinstance(item, str)])
        elif action == 4 and isinstance(holder, list) and holder is not root:
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[key] = copy.deepcopy(random.choice(VALUES))
    return root[0]


def json_of(value: Any, random: Random) -> bytes:
    """Return a JSON value as bytes, changed as a value; one in four also as bytes."""
    raw = json.dumps(value_of(value, random), ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    return bytes_of(raw, random) if random.random() < 0.25 else raw


def lines_of(lines: list[str], random: Random) -> bytes:
    """Return lines of TOML with the value of one to three of them replaced; one in four also changed as bytes."""
    values = (
        "",
        "1",
        "-1",
        "0.5",
        "nan",
        "inf",
        "true",
        "[]",
        "{}",
        "''",
        "'x'",
        "1979-05-27",
        "[[[[1]]]]",
        "0x" + "f" * 99,
    )
    changed = list(lines)
    for _ in range(random.randint(1, 3)):
        index = random.randrange(len(changed))
        name, equals, _ = changed[index].partition("=")
        odd = [json.dumps(item) for item in VALUES if isinstance(item, str) and "\ud800" not in item]
        changed[index] = (
            f"{name}{equals} {random.choice((*values, *odd))}" if equals else random.choice(("", "[x]", "[train]"))
        )
    raw = "\n".join(changed).encode()
    return bytes_of(raw, random) if random.random() < 0.25 else raw


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every value below a container, as the container that holds it and its key."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found: list[tuple[Any, Any]] = []
    for key, item in items:
        found += [(node, key), *_places(item)]
    return found


def _nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value
