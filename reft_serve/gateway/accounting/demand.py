"""Upper bound of a request's usage before it runs: the tokens to reserve, and the limits that bound
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reft_serve.config import TenantLimits
from reft_serve.errors import RequestInvalid

__all__ = ["Demand", "bounded", "demand_of"]

_BYTES_PER_TOKEN = 4
# What an engine generates in a second for one sequence, at most; of an engine that has not said
# what it did.
_TOKENS_PER_SECOND = 200


@dataclass(frozen=True, slots=True)
class Demand:
    """Tokens by a rule of thumb: of all prompts together, and the most that may be generated for
    all choices of them.
    """

    prompt: int
    completion: int
    sequences: int

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    def within(self, seconds: float) -> int:
        """The most that can have been generated in this time."""
        return min(self.completion, int(seconds * _TOKENS_PER_SECOND * self.sequences))


def bounded(
    limits: TenantLimits, body: Mapping[str, Any], fields: Sequence[str], default_tokens: int | None
) -> dict[str, Any]:
    """A request's body, in which the limit of its length is named if the caller names none.

    Args:
        limits: what the caller may use.
        body: the caller's.
        fields: the endpoint's fields for the most tokens of an answer, the preferred one first.
        default_tokens: what the engine generates at most if none of them is there; None: as long as
            its context.

    Raises:
        RequestInvalid: it asks for more choices or tokens than the limits allow.
    """
    if limits.choices is not None and (body.get("n") or 1) > limits.choices:
        raise RequestInvalid(f"n is at most {limits.choices} here", "n")
    most = limits.output_tokens
    if most is None or not fields:
        return dict(body)
    for name in fields:
        if (body.get(name) or 0) > most:
            raise RequestInvalid(f"{name} is at most {most} here", name)
    if any(body.get(name) is not None for name in fields):
        return dict(body)
    return {**body, fields[0]: most if default_tokens is None else min(most, default_tokens)}


def demand_of(body: Mapping[str, Any], fields: Sequence[str], default_tokens: int) -> Demand:
    """Upper bound of a request's usage.

    Args:
        body: as `bounded` returned it.
        fields: the endpoint's fields for the most tokens of an answer.
        default_tokens: what is assumed if none of them is there.
    """
    asked = next((body[name] for name in fields if body.get(name) is not None), default_tokens)
    texts = body.get("prompt") or body.get("messages") or body.get("input") or ""
    prompts = len(texts) if isinstance(body.get("prompt"), list) and not _is_tokens(texts) else 1
    sequences = prompts * (body.get("n") or 1)
    others = (body.get(name) for name in ("instructions", "tools", "text_pair"))
    size = sum(_size(part) for part in (texts, *others) if part)
    return Demand(size // _BYTES_PER_TOKEN, asked * sequences, sequences)


def _is_tokens(texts: Any) -> bool:
    return isinstance(texts, list) and bool(texts) and isinstance(texts[0], int)


def _size(texts: Any) -> int:
    """In characters; a token that is given as a number counts as one of usual length."""
    if isinstance(texts, str):
        return len(texts)
    if _is_tokens(texts):
        return len(texts) * _BYTES_PER_TOKEN
    if isinstance(texts, list) and all(isinstance(text, str) or _is_tokens(text) for text in texts):
        return sum(map(_size, texts))
    return len(json.dumps(texts))
