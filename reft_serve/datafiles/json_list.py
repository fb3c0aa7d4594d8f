"""One JSON list, element by element, in the memory of a few elements. No torch."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from reft_serve.datafiles.json_text import Broken, CutOff, TooLarge, decode, skip_space

__all__ = ["Element", "ListReader"]

_CHUNK = 256 << 10
# A number that the window cuts reads as a shorter one, with as much of `e-` or `.` after it.
_NUMBER_TAIL = 2


@dataclass(frozen=True, slots=True)
class Element:
    """An element of the list: `line` from 1, `size` in characters, `problems` as `json_text.decode`
    reports them.
    """

    line: int
    size: int
    value: Any
    problems: list[str]


class ListReader:
    """The text of a file that begins with `[`, seen through a window that moves over it.

    Args:
        stream: the file after its first bytes, `head`.
        row_bytes: an element that is not complete after this many characters is refused.
        file_bytes: most bytes of the file.
        chunk: bytes that are read at once, at least.
    """

    def __init__(
        self, stream: BinaryIO, head: bytes, row_bytes: int, file_bytes: int, chunk: int = _CHUNK
    ) -> None:
        self._stream = stream
        self._head = head
        self._row_bytes = row_bytes
        self._left = file_bytes
        self._chunk = chunk
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0
        self._ended = False
        # Where the window's text begins: its line, and the characters before it there.
        self.first_line = 1
        self._first_column = 0
        self._line = 1  # the line at the offset `_counted`
        self._counted = 0
        # of the whole file so far, and of its last line
        self._newlines_read = 0
        self._line_bytes = 0

    def elements(self) -> Iterator[Element]:
        """Each element.

        Raises:
            Broken: the text is not JSON; its `newlines` count from `first_line`.
            TooLarge: the file has too many bytes.
        """
        self._next()
        self._at += 1
        more = self._next() != "]"
        while more:
            value, end, problems = self._element()
            yield Element(self._current_line(), end - self._at, value, problems)
            self._at = end
            more = self._next() == ","
            if more:
                self._at += 1
                self._next()
        self._close()

    def _close(self) -> None:
        character = self._next()
        if character == "":
            raise CutOff("the list has no ] at its end", self._newlines())
        if character != "]":
            raise Broken(
                "is not JSON: expecting , or ] after an element of the list", self._newlines()
            )
        self._at += 1
        if self._next():
            raise Broken("has something after the end of the list", self._newlines())

    def _current_line(self) -> int:
        self._line += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def _newlines(self) -> int:
        return self._current_line() - self.first_line

    def _next(self) -> str:
        """The first character that is not white space; empty at the end."""
        while True:
            self._at = skip_space(self._text, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._read(self._chunk)

    def _element(self) -> tuple[Any, int, list[str]]:
        """The value at the window's offset; the window grows until it holds the whole of it."""
        while True:
            held = len(self._text) - self._at
            try:
                element = decode(self._text, self._at, self._first_column)
            except Broken:
                if self._ended:
                    raise
            else:
                if self._ended or len(self._text) - element[1] > _NUMBER_TAIL:
                    return element
            if held > self._row_bytes:
                raise Broken(
                    f"has a row of more than {self._row_bytes:,} bytes, which is the limit",
                    self._newlines(),
                )
            # Twice as much, so that an element is read a few times at most.
            self._read(max(held, self._chunk))

    def _read(self, size: int) -> None:
        """Forget the text before the offset, and read more after it."""
        begun = self._text.rfind("\n", 0, self._at)
        self._first_column = self._at - begun - 1 if begun >= 0 else self._first_column + self._at
        self.first_line = self._current_line()
        self._counted = 0
        chunk = self._head or self._stream.read(size)
        self._head = b""
        self._left -= len(chunk)
        if self._left < 0:
            raise TooLarge
        self._text = self._text[self._at :] + self._decoded(chunk)
        self._at = 0
        self._ended = not chunk

    def _decoded(self, chunk: bytes) -> str:
        before = self._newlines_read - self.first_line + 1
        nul = chunk.find(b"\0")
        if nul >= 0:
            raise Broken(
                "holds NUL bytes: save the file as UTF-8 text", before + chunk.count(b"\n", 0, nul)
            )
        try:
            text = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as exc:
            # the object begins with what the chunk before left over
            at = exc.start - (len(exc.object) - len(chunk))
            newline = chunk.rfind(b"\n", 0, max(at, 0))
            column = at - newline if newline >= 0 else self._line_bytes + at + 1
            sentence = f"is not UTF-8: byte 0x{exc.object[exc.start]:02x} at column {column}"
            raise Broken(sentence, before + chunk.count(b"\n", 0, max(at, 0))) from exc
        self._newlines_read += chunk.count(b"\n")
        newline = chunk.rfind(b"\n")
        self._line_bytes = (
            len(chunk) - newline - 1 if newline >= 0 else self._line_bytes + len(chunk)
        )
        return text
