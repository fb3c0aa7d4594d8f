"""Fields of requests: JSON's whole numbers (2.0 is one, and true is none) and the patterns of ids
and texts.
"""

from __future__ import annotations

from pydantic import BeforeValidator

__all__ = ["NO_NUL", "TENANT_ID", "TENANT_ID_OR_NAME", "JsonInteger"]

TENANT_ID = r"^tnt_[0-9a-f]{24}$"
TENANT_ID_OR_NAME = r"^(tnt_[0-9a-f]{24}|[a-z0-9][a-z0-9-]{0,62})$"
NO_NUL = r"^[^\x00]*$"
"""PostgreSQL has no text with this character."""


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


JsonInteger = BeforeValidator(_whole)
"""Accepts JSON Schema integers (1.0 is one) in a strict model; must be the last annotation."""
