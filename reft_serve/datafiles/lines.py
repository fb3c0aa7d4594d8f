"""The JSON values of a data file, each with the number of its line. No torch, so that the gateway
can check an upload.

JSONL, or one JSON list over several lines as the paper's sets are published. Memory holds a few
rows at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from reft_serve.datafiles.faults import Faults
from reft_serve.datafiles.json_list import ListReader
from reft_serve.datafiles.json_text import (
    SPACE,
    Broken,
    CutOff,
    TooLarge,
    decode,
    decoded,
    skip_space,
)

__all__ = ["MAX_ROWS", "MAX_ROW_BYTES", "FileLimits", "read_values"]

MAX_ROW_BYTES = 4 << 20
MAX_ROWS = 1_000_000

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
class FileLimits:
    """Limits of a data file in bytes and rows. `unanswered`: instruction rows may lack an answer,
    for evaluation without a metric.
    """

    file_bytes: int = 512 << 20
    row_bytes: int = MAX_ROW_BYTES
    min_rows: int = 1
    max_rows: int = MAX_ROWS
    unanswered: bool = False


def read_values(stream: BinaryIO, limits: FileLimits, faults: Faults) -> Iterator[tuple[int, Any]]:
    """Each JSON value and the number, from 1, of the line that it begins on. What cannot be read
    goes to `faults`.
    """
    line = stream.readline(limits.row_bytes + 1)
    for magic, sentence in _MAGIC:
        if line.startswith(magic):
            faults.add(sentence, 1)
            return
    if line.lstrip().startswith(b"["):
        yield from _list_values(stream, line, limits, faults)
    else:
        yield from _line_values(stream, line, limits, faults)


def _too_large(limits: FileLimits) -> str:
    return f"the file has more than {limits.file_bytes:,} bytes, which is the limit"


def _line_values(
    stream: BinaryIO, line: bytes, limits: FileLimits, faults: Faults
) -> Iterator[tuple[int, Any]]:
    """The values of JSONL from its first line, `line`, on."""
    number = 0
    size = 0
    while line:
        number = number + 1
        size = size + len(line)
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
        text = decoded(line).rstrip(SPACE)
        if not text:
            raise Broken("is empty")
        value, end, problems = decode(text, skip_space(text, 0))
        rest = skip_space(text, end)
        if rest < len(text):
            raise Broken(f"holds more than one JSON value: a second begins at column {rest + 1}")
    except CutOff as exc:
        last = not line.endswith(b"\n")
        faults.add(
            f"{exc}: "
            f"{'the file seems to be cut off' if last else 'each line must hold a whole one'}",
            number,
        )
    except Broken as exc:
        faults.add(str(exc), number)
    else:
        for problem in problems:
            faults.add(problem, number)
        if not problems:
            yield number, value


def _list_values(
    stream: BinaryIO, head: bytes, limits: FileLimits, faults: Faults
) -> Iterator[tuple[int, Any]]:
    """The elements of one JSON list. After a fault in its text the next element cannot be
    located.
    """
    reader = ListReader(stream, head, limits.row_bytes, limits.file_bytes)
    try:
        for element in reader.elements():
            for problem in element.problems:
                faults.add(problem, element.line)
            if element.size > limits.row_bytes:
                faults.add(
                    f"has a row of more than {limits.row_bytes:,} bytes, which is the limit",
                    element.line,
                )
            elif not element.problems:
                yield element.line, element.value
    except TooLarge:
        faults.add(_too_large(limits))
    except CutOff as exc:
        faults.add(f"{exc}: the file seems to be cut off", reader.first_line + exc.newlines)
    except Broken as exc:
        faults.add(str(exc), reader.first_line + exc.newlines)
