"""The `openai` client's own types as judges: the client itself takes whatever comes, so an answer
is validated here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from openai import BaseModel
from openai.types import Completion

__all__ = ["strict", "strict_each"]

_M = TypeVar("_M", bound=BaseModel)


def strict(found: _M) -> _M:
    """The answer as it is, once its type has judged strictly what came over the wire.

    Raises:
        pydantic.ValidationError: a field that the type wants is missing, or has another type.
    """
    _judge(found, found.to_dict(warnings=False))
    return found


def strict_each(stream: Iterable[_M]) -> list[_M]:
    """Every event of a stream, or object of a list."""
    found = list(stream)
    for each in found:
        wire: dict[str, Any] = each.to_dict(warnings=False)
        # it has no type for chunks, in which OpenAI too gives no reason but the last
        if isinstance(each, Completion):
            for choice in wire["choices"]:
                choice["finish_reason"] = choice["finish_reason"] or "stop"
        _judge(each, wire)
    return found


def _judge(found: BaseModel, wire: dict[str, Any]) -> None:
    type(found).model_validate(wire, strict=True)
