"""JSON schemas for generation: an object is generated with the properties that its schema names,
and no others.

Without `additionalProperties` a schema allows any, and a model may continue to invent them until
its tokens end. What is generated under the closed schema is valid under the given one, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reft_serve.errors import RequestInvalid

__all__ = ["closed"]

_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = (
    "items",
    "additionalProperties",
    "prefixItems",
    "anyOf",
    "oneOf",
    "contains",
    "propertyNames",
)
# Where one of these is, a closed part could contradict another part of the same object.
_COMBINING = frozenset(
    {
        "allOf",
        "not",
        "if",
        "dependentSchemas",
        "dependentRequired",
        "unevaluatedProperties",
        "$dynamicRef",
    }
)
_ALTERNATIVES = frozenset({"anyOf", "oneOf", "$ref"})


def closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` added if it is missing, unless parts of one
    object are combined in it.

    Changes it in place. Its depth is bounded by `structured_outputs.MAX_DEPTH`.

    Raises:
        RequestInvalid: `patternProperties` next to `properties`.
    """
    objects = list(_each(schema))
    for each in objects:
        if "properties" in each and "patternProperties" in each:
            raise RequestInvalid(
                "json: `patternProperties` together with `properties` are not supported"
            )
    if any(_combines(each) for each in objects):
        return schema
    for each in objects:
        if isinstance(each.get("properties"), Mapping):
            each.setdefault("additionalProperties", False)
    return schema


def _each(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, list):
        for member in schema:
            yield from _each(member)
    elif isinstance(schema, dict):
        yield schema
        for name in _MAPS:
            if isinstance(members := schema.get(name), dict):
                yield from _each(list(members.values()))
        for name in _SCHEMAS:
            yield from _each(schema.get(name))


def _combines(schema: dict[str, Any]) -> bool:
    names = schema.keys()
    return not names.isdisjoint(_COMBINING) or (
        "properties" in schema and not names.isdisjoint(_ALTERNATIVES)
    )
