"""Read a JSON file that is one object with one list of rows: `{"version": 1, "data": [...]}`.

In: a reader at the object's beginning. Out: the elements of its list, one by one, with their lines. Keeps the text of
one element, and skips the other values.
"""

from collections.abc import Iterator
from typing import Any

from tutor.formats.importing.names import KNOWN, folded
from tutor.formats.rows.json_array import ArrayReader
from tutor.formats.rows.json_values import RowError, printable


def find_list(reader: ArrayReader, max_bytes: int) -> str:
    """Read up to the first element of the object's list of objects; return its key, "" where it has none.

    An object with the keys of a row is a row: it has no list either.
    """
    reader.skip()
    try:
        while reader.next_sign() == '"':
            key = _key(reader, max_bytes)
            if folded(key) in KNOWN:
                return ""
            if reader.next_sign() == "[":
                reader.skip()
                if reader.next_sign() == "{":
                    return key
                _skip_elements(reader, max_bytes)
            else:
                _skip_value(reader, max_bytes)
            if reader.next_sign() != ",":
                return ""
            reader.skip()
    except RowError:
        return ""
    return ""


def read_list(reader: ArrayReader, key: str, max_bytes: int) -> Iterator[tuple[int, Any]]:
    """Yield the elements of the list that `find_list` found; an error for a second list, or for what is no JSON."""
    whole = yield from reader.elements(max_bytes, last=False)
    try:
        while whole and reader.next_sign() == ",":
            reader.skip()
            reader.next_sign()
            line, other = reader.line, _key(reader, max_bytes)
            if reader.next_sign() == "[":
                names = f"{printable(key)} and {printable(other)}"
                yield line, RowError(f"the file has two lists, {names}", "save each in a file of its own")
                return
            _skip_value(reader, max_bytes)
        if whole and reader.next_sign() != "}":
            yield reader.line, RowError("the object does not end here: no comma and no }")
        elif whole:
            reader.skip()
            if reader.next_sign():
                yield reader.line, RowError("more text follows the object that holds the list")
    except RowError as fault:
        yield reader.line, fault


def _key(reader: ArrayReader, max_bytes: int) -> str:
    key = reader.value(max_bytes)
    if not isinstance(key, str) or reader.next_sign() != ":":
        raise RowError("the object goes wrong here: no key, or no colon behind it")
    reader.skip()
    return key


def _skip_value(reader: ArrayReader, max_bytes: int) -> None:
    reader.next_sign()
    if isinstance(fault := reader.value(max_bytes), RowError):
        raise fault


def _skip_elements(reader: ArrayReader, max_bytes: int) -> None:
    for _, found in reader.elements(max_bytes, last=False):
        if isinstance(found, RowError):
            raise found
