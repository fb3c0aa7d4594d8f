"""The JSON values of a data file, each with the number of its line. No torch, so that the gateway can check an upload.

JSONL, or one JSON list over several lines as the paper's sets are published. Memory holds one line of JSONL, or the whole
of a list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from reft_serve.datafiles.faults import Faults

__all__ = ["Limits", "read_values"]

_SPACE = " \t\r\n"
_GAP = re.compile(f"[{_SPACE}]*")
_MAGIC = (
    (b"\xef\xbb\xbf", "begins with a byte-order mark: save the file as UTF-8 without one"),
    (b"\xff\xfe", "begins with the byte-order mark of UTF-16: save the file as UTF-8"),
    (b"\xfe\xff", "begins with the byte-order mark of UTF-16: save the file as UTF-8"),
    (b"\x1f\x8b", "is compressed by gzip: unpack the file first"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd: unpack the file first"),
    (b"PK\x03\x04", "begins a ZIP archive or an Excel sheet: unpack it, or export it as JSONL"),
    (b"PAR1", "begins a Parquet file: export it as JSONL"),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a data file may hold, in bytes and in rows. `unanswered`: instruction rows may lack an answer, as those that are
    asked but not judged do.
    """

    file_bytes: int = 512 << 20
    row_bytes: int = 4 << 20
    min_rows: int = 1
    max_rows: int = 1_000_000
    unanswered: bool = False


def read_values(stream: BinaryIO, limits: Limits, faults: Faults) -> Iterator[tuple[int, Any]]:
    """Each JSON value and the number, from 1, of the line that it begins on. What cannot be read goes to `faults`."""
    line = stream.readline(limits.row_bytes + 1)
    for magic, sentence in _MAGIC:
        if line.startswith(magic):
            faults.add(sentence, 1)
            return
    if line.lstrip().startswith(b"["):
        data = line + stream.read(max(limits.file_bytes + 1 - len(line), 0))
        if len(data) > limits.file_bytes:
            faults.add(_too_large(limits))
        else:
            yield from _list_values(data, limits, faults)
    else:
        yield from _line_values(stream, line, limits, faults)


def _too_large(limits: Limits) -> str:
    return f"the file has more than {limits.file_bytes:,} bytes, which is the limit"


def _line_values(stream: BinaryIO, line: bytes, limits: Limits, faults: Faults) -> Iterator[tuple[int, Any]]:
    """The values of JSONL from its first line, `line`, on."""
    number, size = 0, 0
    while line:
        number, size = number + 1, size + len(line)
        huge = len(line) > limits.row_bytes
        while huge and not line.endswith(b"\n") and line and size <= limits.file_bytes:
            line = stream.readline(limits.row_bytes)
            size += len(line)
        if size > limits.file_bytes:
            faults.add(_too_large(limits))
            return
        if huge:
            faults.add(f"has more than {limits.row_bytes:,} bytes, which is the limit", number)
        else:
            yield from _line_value(number, line, faults)
        line = stream.readline(limits.row_bytes + 1)


def _line_value(number: int, line: bytes, faults: Faults) -> Iterator[tuple[int, Any]]:
    try:
        text = _text(line).rstrip(_SPACE)
        if not text:
            raise _Broken("is empty")
        value, end, problems = _decode(text, _gap(text, 0))
        rest = _gap(text, end)
        if rest < len(text):
            raise _Broken(f"holds more than one JSON value: a second begins at column {rest + 1}")
    except _CutOff as exc:
        last = not line.endswith(b"\n")
        faults.add(f"{exc}: {'the file seems to be cut off' if last else 'each line must hold a whole one'}", number)
    except _Broken as exc:
        faults.add(str(exc), number)
    else:
        for problem in problems:
            faults.add(problem, number)
        if not problems:
            yield number, value


def _list_values(data: bytes, limits: Limits, faults: Faults) -> Iterator[tuple[int, Any]]:
    """The elements of one JSON list. After a fault in its text there is no telling where the next element begins."""
    at, number = 0, 1
    try:
        text = _text(data)
        for start, end, value, problems in _elements(text):
            number, at = number + text.count("\n", at, start), start
            for problem in problems:
                faults.add(problem, number)
            if end - start > limits.row_bytes:
                faults.add(f"has a row of more than {limits.row_bytes:,} bytes, which is the limit", number)
            elif not problems:
                yield number, value
    except _CutOff as exc:
        faults.add(f"{exc}: the file seems to be cut off", 1 + exc.newlines)
    except _Broken as exc:
        faults.add(str(exc), 1 + exc.newlines)


class _Broken(Exception):
    """Text that is not JSON, and how many newlines come before the fault."""

    def __init__(self, sentence: str, newlines: int = 0) -> None:
        super().__init__(sentence)
        self.newlines = newlines


class _CutOff(_Broken):
    """Text that ends where JSON cannot."""


def _elements(text: str) -> Iterator[tuple[int, int, Any, list[str]]]:
    """(start, end, value, problems) of each element of the list that `text` is. Raises _Broken."""
    at = _gap(text, text.index("[") + 1)
    more = not text.startswith("]", at)
    while more:
        value, end, problems = _decode(text, at)
        yield at, end, value, problems
        at = _gap(text, end)
        more = text.startswith(",", at)
        if more:
            at = _gap(text, at + 1)
    if at == len(text):
        raise _CutOff("the list has no ] at its end", text.count("\n"))
    if not text.startswith("]", at):
        raise _Broken("is not JSON: expecting , or ] after an element of the list", text.count("\n", 0, at))
    at = _gap(text, at + 1)
    if at < len(text):
        raise _Broken("has something after the end of the list", text.count("\n", 0, at))


def _decode(text: str, at: int) -> tuple[Any, int, list[str]]:
    """The JSON value at an offset, the offset of its end, and what Python reads but a data file must not hold.

    Raises:
        _Broken: with a sentence.
    """
    problems: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        held = dict(items)
        if len(held) < len(items):
            names = [name for name, _ in items]
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            problems.append(f"has the key {twice[:40]!r} twice in one object")
        return held

    def constant(name: str) -> None:
        problems.append(f"holds {name}, which is not a JSON value")

    decoder = json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant)
    try:
        value, end = decoder.raw_decode(text, at)
    except json.JSONDecodeError as exc:
        if exc.pos >= len(text) or exc.msg.startswith("Unterminated string"):
            raise _CutOff("ends in the middle of a JSON value", exc.lineno - 1) from exc
        raise _Broken(f"is not JSON: {exc.msg} at column {exc.colno}", exc.lineno - 1) from exc
    except RecursionError as exc:
        raise _Broken("is nested too deeply", text.count("\n", 0, at)) from exc
    except ValueError as exc:
        raise _Broken("holds a number of thousands of digits", text.count("\n", 0, at)) from exc
    return value, end, problems


def _text(data: bytes) -> str:
    nul = data.find(b"\0")
    if nul >= 0:
        raise _Broken("holds NUL bytes: save the file as UTF-8 text", data.count(b"\n", 0, nul))
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        column = exc.start - data.rfind(b"\n", 0, exc.start)
        sentence = f"is not UTF-8: byte 0x{data[exc.start]:02x} at column {column}"
        raise _Broken(sentence, data.count(b"\n", 0, exc.start)) from exc


def _gap(text: str, at: int) -> int:
    """The offset after the white space at `at`."""
    found = _GAP.match(text, at)
    assert found is not None
    return found.end()
