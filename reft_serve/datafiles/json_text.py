"""Strict parsing of one JSON value: rejects extensions that Python's reader accepts. No torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

__all__ = ["SPACE", "Broken", "CutOff", "TooLarge", "decode", "decoded", "skip_space"]

SPACE = " \t\r\n"
_SPACES = re.compile(f"[{SPACE}]*")
_MOST_PROBLEMS = 20


class Broken(Exception):
    """Text that is not JSON, and how many newlines come before the fault."""

    def __init__(self, sentence: str, newlines: int = 0) -> None:
        super().__init__(sentence)
        self.newlines = newlines


class CutOff(Broken):
    """Text that ends where JSON cannot."""


class TooLarge(Exception):
    """A file of more bytes than are taken."""


def decode(text: str, at: int, first_column: int = 0) -> tuple[Any, int, list[str]]:
    """The JSON value at an offset, the offset of its end, and what Python reads but a data file
    must not hold.

    Args:
        text: it may begin in the middle of a line, after `first_column` characters.

    Raises:
        Broken: with a sentence.
    """
    problems: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        held = dict(items)
        if len(held) < len(items) and len(problems) < _MOST_PROBLEMS:
            problems.append(f"has the key {_repeated(items)[:40]!r} twice in one object")
        return held

    def constant(name: str) -> None:
        if len(problems) < _MOST_PROBLEMS:
            problems.append(f"holds {name}, which is not a JSON value")

    decoder = json.JSONDecoder(object_pairs_hook=pairs, parse_constant=constant)
    try:
        value, end = decoder.raw_decode(text, at)
    except json.JSONDecodeError as exc:
        if exc.pos >= len(text) or exc.msg.startswith("Unterminated string"):
            raise CutOff("ends in the middle of a JSON value", exc.lineno - 1) from exc
        column = exc.colno + (first_column if exc.lineno == 1 else 0)
        raise Broken(f"is not JSON: {exc.msg} at column {column}", exc.lineno - 1) from exc
    except RecursionError as exc:
        raise Broken("is nested too deeply", text.count("\n", 0, at)) from exc
    except ValueError as exc:
        raise Broken("holds a number of thousands of digits", text.count("\n", 0, at)) from exc
    return value, end, problems


def _repeated(items: list[tuple[str, Any]]) -> str:
    """The first key that is there a second time."""
    counts = Counter(name for name, _ in items)
    return next(name for name, count in counts.items() if count > 1)


def decoded(data: bytes) -> str:
    """The text of UTF-8. Raises Broken if it is none."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise Broken("holds NUL bytes: save the file as UTF-8 text", data.count(b"\n", 0, nul))
    try:
        return data.decode()
    except UnicodeDecodeError as exc:
        column = exc.start - data.rfind(b"\n", 0, exc.start)
        sentence = f"is not UTF-8: byte 0x{data[exc.start]:02x} at column {column}"
        raise Broken(sentence, data.count(b"\n", 0, exc.start)) from exc


def skip_space(text: str, at: int) -> int:
    """The offset after the white space at `at`."""
    space = _SPACES.match(text, at)
    assert space is not None
    return space.end()
