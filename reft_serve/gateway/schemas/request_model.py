"""The base of every JSON object that a request may hold.

A field that is `null` is a field that was not given, regardless of its name: clients in Java, Go
and C# send all of their fields. A field that only marks something for another service is ignored,
if it is listed for this object (`client_fields`). Any other unknown field is refused by its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

__all__ = ["NULLS_ARE_ABSENT", "FreeObject", "NullsAreAbsent", "RequestModel"]


class RequestModel(BaseModel):
    """A JSON object of a request; `ignored` names the fields that are taken and sent no further."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    ignored: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        shadowed = cls.ignored.keys() & cls.model_fields.keys()
        assert not shadowed, f"{cls.__name__} serves what it ignores: {shadowed}"

    @model_validator(mode="before")
    @classmethod
    def _as_given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        ignored = cls.ignored
        return {
            name: value for name, value in body.items() if value is not None and name not in ignored
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        document = handler(schema)
        _allow_nulls(handler.resolve_ref_schema(document), cls.ignored)
        return document


class NullsAreAbsent:
    """An annotation that gives an object of another kind (a model of another package, a mapping)
    the same rule for null.
    """

    @staticmethod
    def __get_pydantic_json_schema__(
        schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The object's own schema, with null for every value that may be left out."""
        document = handler(schema)
        _allow_nulls(handler.resolve_ref_schema(document), {})
        return document


def _present(body: object) -> object:
    if not isinstance(body, dict):
        return body
    return {name: value for name, value in body.items() if value is not None}


NULLS_ARE_ABSENT = (BeforeValidator(_present), NullsAreAbsent())
"""Both annotations of the rule, for `Annotated[T, *NULLS_ARE_ABSENT]`."""


def _finite(body: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(body, allow_nan=False)
    except ValueError as exc:
        raise ValueError("its numbers must be finite") from exc
    return body


FreeObject = Annotated[dict[str, Any], AfterValidator(_finite)]
"""A free-form object of the caller, such as a JSON schema, in which null keeps its meaning."""


def _allow_nulls(schema: JsonSchemaValue, ignored: Mapping[str, str]) -> None:
    properties = schema.get("properties", {})
    for name, value in properties.items():
        if name not in schema.get("required", ()) and not _takes_null(value):
            properties[name] = {"anyOf": [value, {"type": "null"}]}
    for name, reason in ignored.items():
        properties[name] = {"description": f"Ignored: {reason}."}
    if ignored:
        schema["properties"] = properties
    rest = schema.get("additionalProperties")
    if rest is False:
        schema["additionalProperties"] = {"type": "null"}
    elif isinstance(rest, dict) and not _takes_null(rest):
        schema["additionalProperties"] = {"anyOf": [rest, {"type": "null"}]}


def _takes_null(schema: JsonSchemaValue) -> bool:
    return (
        schema.get("type") == "null"
        or any(map(_takes_null, schema.get("anyOf", ())))
        or not schema.keys() - {"title"}
    )
