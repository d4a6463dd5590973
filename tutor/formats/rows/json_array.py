"""Read the elements of a JSON array one by one, from a stream that need not fit into memory.

In: a stream of bytes. Out: each element's value with its line, or its error. Keeps the text of one element and of one
chunk. Does not open files (jsonl.py).
"""

import codecs
from collections.abc import Callable, Generator
from typing import Any

from tutor.formats.rows.json_values import RowError, decode_value, not_utf8, skip_blanks, too_long

CHUNK = 2**16
"""Minimum number of bytes that are read at a time."""


class ArrayReader:
    """The part of an array's text that is being read; `read` returns at most so many bytes of the file."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0  # of the next character that counts
        self._counted = 0  # characters of the text whose line ends are in `line`
        self._line = 1
        self._column = 0  # characters of the text's first line that are no longer kept
        self._bytes = 0  # of the file, before those that are not decoded yet
        self._fault: RowError | None = None

    @property
    def line(self) -> int:
        """Line of the next character."""
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def next_sign(self) -> str:
        """Return the next character that is no blank, without reading it; "" at the end. Raises RowError."""
        while (at := skip_blanks(self._text, self._at)) == len(self._text):
            self._at = at
            if not self._more():
                return ""
        self._at = at
        return self._text[at]

    def skip(self) -> None:
        """Read one character."""
        self._at += 1

    def elements(self, max_bytes: int, *, last: bool = True) -> Generator[tuple[int, Any], None, bool]:
        """Yield line and value of each element behind the `[`, or the RowError that explains why it has none.

        `last`: nothing follows the array. Ends at a syntax error, and at an element that is much longer than
        `max_bytes`: where the next one starts is unknown. Returns whether it reached the end of the array.
        """
        try:
            mark = "," if self.next_sign() != "]" else "]"
            while mark == ",":
                self.next_sign()
                line = self.line
                yield line, self.value(max_bytes)
                mark = self.next_sign()
                if mark == ",":
                    self.skip()
            self.skip()
            if mark == "]" and not (last and self.next_sign()):
                return True
            yield self.line, RowError("the array goes wrong here: no comma, no ] or more text behind it")
        except RowError as fault:
            yield self.line, fault
        return False

    def value(self, max_bytes: int) -> Any:
        """Read one value. An error for its length is returned, one for its syntax raised."""
        while True:
            try:
                value, end = decode_value(self._text, self._at, self._column)
            except RowError as fault:
                if len(self._text) - self._at > max_bytes:
                    raise too_long(max_bytes) if fault.unfinished else fault from None
                if not self._more():
                    raise
                continue
            if end + len("e+") >= len(self._text) and self._more():
                continue  # a number may go on: json reads `1.5` in `1.5e+`
            size = len(self._text[self._at : end].encode())
            self._at = end
            return value if size <= max_bytes else too_long(max_bytes)

    def _more(self) -> bool:
        """Read as much again as is kept, so that a long element is not decoded often; False at the end of the file."""
        if self._fault:
            self._at = len(self._text)
            raise self._fault
        kept = self._text[self._at :]
        data = self._read(max(CHUNK, len(kept)))
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            text = error.object[: error.start].decode()
            self._fault = not_utf8(error, self._bytes)
        if not data and not self._fault:
            return False
        self._bytes += len(text.encode())
        before = self._text.rfind("\n", 0, self._at)
        self._column = self._at - before - 1 if before >= 0 else self._column + self._at
        self._line = self.line
        self._text, self._at, self._counted = kept + text, 0, 0
        return True
