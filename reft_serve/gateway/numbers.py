"""JSON's whole numbers: 2.0 is one, and true is none."""

from __future__ import annotations

from pydantic import BeforeValidator

__all__ = ["WHOLE"]


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""Lets an integer of a strict model be what JSON Schema calls one; the last of its annotations."""
