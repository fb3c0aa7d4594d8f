"""Bounds on a JSON body, checked on its bytes before it is parsed, in linear time and without an
object per value.
"""

from __future__ import annotations

from reft_serve.errors import RequestInvalid

__all__ = ["JSON_CONTAINERS", "JSON_DEPTH", "JSON_DIGITS", "check_json"]

JSON_DEPTH = 64
"""Largest nesting depth."""
JSON_CONTAINERS = 1 << 16
"""Largest number of arrays and objects in a body."""
JSON_DIGITS = 400
"""Largest number of consecutive digits; the longest float written out has 309 before its point."""
_SIMPLE = 64 << 10
_LONG_NUMBER = b"0" * (JSON_DIGITS + 1)
_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def check_json(content: bytes, most_values: int) -> int:
    """Return an upper bound of the number of values in a JSON body; malformed JSON is left to the
    parser.

    Args:
        content: the body.
        most_values: the most that it may have.

    Raises:
        RequestInvalid: too many values, too deep, a number that is too long, or not UTF-8.
    """
    if b"\0" in content:
        raise RequestInvalid("the request body must be JSON in UTF-8")
    opens = content.count(b"[") + content.count(b"{")
    values = opens + content.count(b",")
    structure = content
    if len(content) > _SIMPLE or opens > JSON_DEPTH or values > most_values:
        structure = _without_texts(content, most_values)
        opens = structure.count(b"[") + structure.count(b"{")
        values = opens + structure.count(b",")
        _check_counts(opens, values, most_values)
        _check_depth(structure)
    if len(content) > JSON_DIGITS and _LONG_NUMBER in structure.translate(_DIGITS):
        if structure is content:
            structure = _without_texts(content, most_values)
        if _LONG_NUMBER in structure.translate(_DIGITS):
            raise RequestInvalid(f"a number in the body has more than {JSON_DIGITS} digits")
    return values


def _without_texts(content: bytes, most_values: int) -> bytes:
    """The body without what is inside quotes."""
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    if plain.count(b'"') > 4 * most_values:
        raise _too_many(most_values)
    return b"".join(plain.split(b'"')[::2])


def _check_counts(opens: int, values: int, most_values: int) -> None:
    if values > most_values:
        raise _too_many(most_values)
    if opens > JSON_CONTAINERS:
        raise RequestInvalid(f"the body has more than {JSON_CONTAINERS} lists and objects")


def _too_many(most_values: int) -> RequestInvalid:
    return RequestInvalid(f"the body has more than {most_values} values")


def _check_depth(structure: bytes) -> None:
    brackets = structure.translate(None, _NO_BRACKETS)
    for _ in range(JSON_DEPTH):
        shorter = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(shorter) == len(brackets):
            return
        brackets = shorter
    if brackets:
        raise RequestInvalid(f"the body is nested more than {JSON_DEPTH} levels deep")
