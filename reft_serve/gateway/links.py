"""OpenAPI links: what one operation's answer has that another one takes. Programs follow them, and
so do the tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["Responses", "leads_to", "link"]

Responses = dict[int | str, dict[str, Any]]


def link(
    operation: str, parameters: Mapping[str, str], body: Mapping[str, str | int] | None = None
) -> dict[str, Any]:
    """A link to an operation, by its id.

    Args:
        operation: the operation's id in the OpenAPI document.
        parameters: each a value, or an expression like `$response.body#/id`.
        body: of its request, if it has one; values may be expressions.
    """
    found: dict[str, Any] = {"operationId": operation, "parameters": dict(parameters)}
    return found if body is None else found | {"requestBody": dict(body)}


def leads_to(status: int, links: Iterable[dict[str, Any]]) -> Responses:
    """A route's `responses` entry for this status."""
    return {status: {"links": {each["operationId"]: each for each in links}}}
