"""Bounds on structured outputs: what is too large is refused by name, in time that grows with
nothing.
"""

from __future__ import annotations

import time
from typing import Any

import pytest

from reft_serve import structured_outputs
from reft_serve.errors import RequestInvalid
from reft_serve.structured_outputs import (
    MAX_CHOICES,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_LENGTH,
    MAX_STRING,
    check_request,
)


def response_format(schema: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    }


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


TOO_LARGE = {
    "minItems": (
        {"type": "array", "minItems": 2**31, "prefixItems": [{}, {}]},
        "minItems over 4,096",
    ),
    "maxItems": ({"type": "array", "maxItems": MAX_ITEMS + 1}, "maxItems over"),
    "a float": ({"type": "array", "minItems": 1e300}, "minItems over"),
    "not a number": ({"type": "array", "minItems": float("nan")}, "minItems over"),
    "minLength": ({"type": "string", "minLength": MAX_LENGTH + 1}, "minLength over"),
    "properties": ({"type": "object", "maxProperties": 10**9}, "maxProperties over"),
    "const": ({"const": "x" * 600_000}, f"a string of more than {MAX_STRING:,} characters"),
    "a name": ({"properties": {"x" * 600_000: {}}}, "a string of more than"),
    "enum": ({"enum": list(range(60_000))}, f"more than {MAX_CHOICES:,} choices"),
    "values": ({"anyOf": [{}] * 60_000}, "more than 50,000 values"),
    "bytes": ({"anyOf": [{"const": "x" * 8_000}] * 100}, "more than 262,144 bytes"),
    "depth": (nested(MAX_DEPTH), "nesting deeper than 64 levels"),
    "very deep": (nested(100_000), "nesting deeper than 64 levels"),
    "pattern": (
        {"type": "string", "pattern": "a{1,1000000}"},
        "repetition more than 100,000 times",
    ),
    "a long pattern": ({"type": "string", "pattern": "(a|b)" * 2_000}, "more than"),
    "pattern names": (
        {"patternProperties": {"a{99999999999999999999}": {}}},
        "repetition more than",
    ),
}


@pytest.mark.parametrize(("schema", "sentence"), TOO_LARGE.values(), ids=TOO_LARGE)
@pytest.mark.parametrize(
    "where", ["response_format", "text.format", "structured_outputs.json", "tools[0]"]
)
def test_a_schema_that_is_too_large_is_refused_wherever_it_is(
    schema: Any, sentence: str, where: str
) -> None:
    body = {
        "response_format": response_format(schema),
        "text.format": {"text": {"format": {"type": "json_schema", "schema": schema}}},
        "structured_outputs.json": {"structured_outputs": {"json": schema}},
        "tools[0]": {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]
        },
    }[where]
    began = time.process_time()
    with pytest.raises(RequestInvalid, match=sentence) as refused:
        check_request(body)
    assert refused.value.param == where
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"regex": "a{1,100001}"}, "repetition more than"),
        ({"regex": "ab" * 5_000}, "a regular expression of more than 8,192 bytes"),
        ({"grammar": "root ::= " + "a " * 20_000}, "a grammar of more than 32,768 bytes"),
        ({"grammar": "start: A~1..999999\nA: /a/"}, "repetition more than"),
        ({"choice": [f"choice {i}" for i in range(60_000)]}, "more than 2,048 choices"),
        ({"choice": ["x" * 9_000]}, "a string of more than"),
        ({"json": '{"type": "array", "minItems": 2147483648}'}, "minItems over"),
        ({"json": "{"}, "is not JSON"),
        ({"json": "[" * 300_000}, "a schema of more than"),
        ({"structural_tag": {"structures": [{"schema": {"minItems": 10**12}}]}}, "minItems over"),
        (
            {"structural_tag": '{"structures": [{"schema": {"minItems": 1000000}}]}'},
            "minItems over",
        ),
    ],
)
def test_other_constraints_are_bounded_too(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestInvalid, match=sentence):
        check_request({"structured_outputs": given})


def test_the_values_of_all_tools_count_together() -> None:
    tool = {
        "function": {
            "parameters": {"properties": {f"p{i}": {"type": "string"} for i in range(300)}}
        }
    }
    check_request({"tools": [tool] * 10})
    with pytest.raises(RequestInvalid, match="more than 50,000 values in all"):
        check_request({"tools": [tool] * 100})


def test_ordinary_requests_pass() -> None:
    schema = {
        "type": "object",
        "properties": {
            f"p{i}": {"type": "string", "maxLength": 500, "pattern": r"^\w{1,64}$"}
            for i in range(300)
        },
        "required": ["p0"],
    }
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(16)
    ]
    constraints = {"regex": r"\d{3,4}", "choice": ["yes", "no"], "json": None, "json_object": True}
    body = response_format(schema) | {
        "tools": tools,
        "structured_outputs": constraints,
        "text": {"format": None},
    }
    check_request(body)
    for odd in (
        {},
        {"tools": None},
        {"text": "x"},
        {"structured_outputs": [1]},
        {"response_format": 3},
        {"tools": 3},
    ):
        check_request(odd)


def test_bounds_are_numbers_that_the_page_can_name() -> None:
    for name in structured_outputs.__all__:
        if name.isupper():
            assert isinstance(getattr(structured_outputs, name), int)
